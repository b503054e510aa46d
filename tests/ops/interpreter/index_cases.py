"""Worker of tests/ops/test_index_attention_triton.py, run by path with TRITON_INTERPRET=1: the
kernels of an index in Triton's interpreter, against its definition. Arguments: names of groups of
cases; prints one line per failure.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import gather_cases
import torch
from torch import Tensor

from ops.index_attention import (
    IndexSpec,
    Teacher,
    reference,
    select_blocks,
    teach_index,
    tile,
    triton_backend,
    within,
)
from ops.index_attention.kernels import configs
from ops.index_attention.triton_backend import Gradients, IndexTile
from ops.sparse_attention import SparseAttentionSpec, pool_entries, sparse_attention
from ops.sparse_attention.entries import CoarseEntries
from ops.testing import assert_close, poisoned_memory

INF, NAN = math.inf, math.nan


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LARGEST = {
    "random": normals(5, 70),
    "equal": torch.full((2, 70), -1.5),
    "zeros of either sign": torch.tensor([0.0, -0.0, 1e-45, -1e-45] * 9).view(1, -1),
    "many equal": normals(4, 70).round(),
    "infinities": torch.tensor([[INF, -INF, 3.0, INF, -INF, -3.0, INF, -INF] * 3]),
    "fewer than are wanted": torch.tensor([[-INF] * 30 + [2.0, 1.0, -INF, 2.0]]),
    "none": torch.full((2, 9), -INF),
    "neighbours in their last bit": (1.0 + normals(1, 70).round() * 2**-23),
    "all of them": normals(2, 4),
    "not a number": torch.tensor([[1.0, NAN, INF, 2.0, -NAN, NAN]]),
    "no values": normals(3, 0),
    "no rows": normals(0, 9),
}


def check_largest(values: Tensor) -> None:
    """Place for place what plain torch takes, in chunks and at once."""
    by_row = values.view(1, 1, *values.shape)
    for number in (1, 5, 16):
        found = triton_backend.largest(values, number)
        position = torch.zeros(1, len(values), dtype=torch.int64)
        expected = tile.choose(by_row, position, IndexSpec("dsa", 1, number))[0, 0]
        far = torch.iinfo(torch.int64).max
        rising = torch.where(expected < 0, far, expected).sort(-1).values
        rising = torch.where(rising == far, -1, rising)
        assert torch.equal(found.long(), rising), f"{number}: {found} is not {rising}"


@dataclass(frozen=True)
class Case:
    spec: IndexSpec
    heads: int = 3
    width: int = 8
    queries: int = 37
    first_position: int = 0
    weighted: bool = False
    dtype: torch.dtype = torch.float32
    whole: bool = False
    """Numbers are small integers: equal scores abound, and no order of their sums is another."""

    def index(self) -> IndexTile:
        def numbers(*shape: int, seed: int) -> Tensor:
            x = normals(*shape, seed=seed)
            return (x.mul(1.3).round() if self.whole else x).to(self.dtype)

        length = self.first_position + self.queries
        keys = length // self.spec.block_size if self.spec.pools_keys else length
        return IndexTile(
            numbers(self.queries, self.heads, self.width, seed=1),
            numbers(keys, self.width, seed=2),
            numbers(self.queries, self.heads, seed=3) if self.weighted else None,
            self.first_position,
            self.spec,
        )


CASES = {
    "tokens": Case(IndexSpec("dsa", 1, 5), 9, weighted=True),
    "blocks by head": Case(IndexSpec("msa", 8, 3), 2),
    "means of four": Case(IndexSpec("qsa", 4, 2)),
    "later tokens": Case(IndexSpec("dsa", 1, 7), 2, 40, 9, 90, weighted=True),
    "large blocks, the last one cut": Case(IndexSpec("msa", 64, 2), 2, 16, 11, 150),
    "entries of three": Case(IndexSpec("qsa", 3, 4), 17, 24, 20, 31, weighted=True),
    "one query": Case(IndexSpec("dsa", 1, 4), 1, queries=1, weighted=True),
    "no complete block": Case(IndexSpec("qsa", 4, 2), queries=3),
}
WHOLE = {f"{name}, ties": replace(case, whole=True) for name, case in CASES.items()}
HALF = {
    f"{name} {dtype}": replace(CASES[name], dtype=dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for name in ("tokens", "blocks by head", "later tokens")
}


def exact(index: IndexTile) -> IndexTile:
    parts = (None if x is None else x.double().requires_grad_() for x in index[:3])
    return IndexTile(*parts, *index[3:])


def plain_scores(index: IndexTile) -> Tensor:
    queries, keys, weights, first, spec = index
    position = first + torch.arange(len(queries)).unsqueeze(0)
    of_weights = None if weights is None else weights.unsqueeze(0)
    scores = tile.block_scores(queries.unsqueeze(0), keys.unsqueeze(0), of_weights, position, spec)
    return scores[0]


def check_scores(case: Case) -> None:
    index = case.index()
    with poisoned_memory():
        found = triton_backend.block_scores(index, with_best=True)
    expected = plain_scores(exact(index))
    never = expected.isinf()
    assert torch.equal(found.values.isinf(), never), "what a query may choose differs"
    both = [x.masked_fill(never, 0.0) for x in (found.values, expected)]
    assert_close("scores", *both, case.dtype)
    assert (found.best is None) == (case.spec.rule != "msa")
    if found.best is not None:
        # the key that gave a block its score, the first of equal ones
        keys, position = index.keys.double(), index.first_position + torch.arange(case.queries)
        by_key = torch.einsum("qcw,nw->cqn", index.queries.double(), keys)
        by_key = by_key.masked_fill(torch.arange(len(keys)) > position[:, None], -INF)
        size = case.spec.block_size
        padded = torch.nn.functional.pad(by_key, (0, -len(keys) % size), value=-INF)
        blocks = padded.unflatten(-1, (-1, size))
        largest = blocks == blocks.amax(-1, keepdim=True)
        place = torch.where(largest, torch.arange(size), size).amin(-1)
        place += size * torch.arange(place.shape[-1])
        assert torch.equal(found.best.long()[~never], place[~never]), "best keys differ"


def check_choice(case: Case) -> None:
    """Id for id what the definition takes, from scores that have the bits of plain torch."""
    index = case.index()
    queries, keys, weights, first, spec = index
    scores = triton_backend.block_scores(index).values
    assert torch.equal(scores, plain_scores(index)), "scores differ in bits"
    position = first + torch.arange(case.queries).unsqueeze(0)
    found = triton_backend.choose(scores.unsqueeze(0), position, spec)[0]
    choices = case.heads if spec.by_head else 1
    size = 1 if spec.pools_keys else spec.block_size
    for at in range(case.queries):
        seen = first + at + 1
        seen = seen // spec.block_size if spec.pools_keys else seen
        by_key = reference.token_scores(
            queries[at], keys[:seen], None if weights is None else weights[at], spec
        )
        by_block = [x.amax(1) for x in by_key.split(size, 1)] if seen else []
        for choice in range(choices):
            values = torch.stack([x[choice] for x in by_block]) if by_block else torch.zeros(0)
            if spec.rule == "msa":
                values[-1] = INF
            taken = sorted(reference.best(values, spec.top_k))
            own = found[choice, at]
            assert own[own >= 0].tolist() == taken, f"query {at}: {own} is not {taken}"


def check_grads(case: Case) -> None:
    """Gradients of scores that some of the choices have, in two tiles of queries."""
    index = case.index()
    scores = triton_backend.block_scores(index, with_best=True)
    position = index.first_position + torch.arange(case.queries).unsqueeze(0)
    chosen = triton_backend.choose(scores.values.unsqueeze(0), position, index.spec)[0]
    grads = normals(*chosen.shape, seed=7)
    columns, places = chosen, chosen.clamp_min(0).long()
    if scores.best is not None:
        columns = scores.best.gather(-1, places).masked_fill(chosen < 0, -1)

    def run() -> Gradients:
        into = Gradients(
            *(
                None if x is None else torch.full_like(x, NAN, dtype=torch.float32)
                for x in index[:3]
            )
        )
        into.keys.fill_(0.0)
        cut = case.queries // 3
        with poisoned_memory():
            for at in (slice(0, cut), slice(cut, case.queries)):
                part = index._replace(
                    queries=index.queries[at],
                    weights=None if index.weights is None else index.weights[at],
                    first_position=index.first_position + at.start,
                )
                of_weights = None if into.weights is None else into.weights[at]
                triton_backend.add_grads(
                    part,
                    columns[:, at].contiguous(),
                    grads[:, at].contiguous(),
                    Gradients(into.queries[at], into.keys, of_weights),
                )
        return into

    ours, again = run(), run()
    theirs = exact(index)
    loss = torch.where(chosen < 0, 0.0, plain_scores(theirs).gather(-1, places)) * grads
    leaves = [x for x in theirs[:3] if x is not None]
    expected = iter(
        torch.autograd.grad(loss.sum(), leaves, allow_unused=True, materialize_grads=True)
    )
    for name, one, two in zip(Gradients._fields, ours, again, strict=True):
        assert (one is None) == (two is None) == (getattr(index, name) is None)
        if one is not None and two is not None:
            assert torch.equal(one, two), f"{name} differ from one run to the next"
            assert_close(name, one, next(expected), case.dtype)


WITHIN = {
    "plain": SparseAttentionSpec(block_size=4, coarse_block_size=2, top_k=3, window_size=5),
    "no sinks, short documents whole": SparseAttentionSpec(
        block_size=8, coarse_block_size=4, top_k=2, window_size=1, num_sink_blocks=0
    ),
    "nothing to choose": SparseAttentionSpec(
        block_size=4, coarse_block_size=4, top_k=2, window_size=60
    ),
}


def check_within(spec: SparseAttentionSpec) -> None:
    """The choice inside sparse attention, of an index whose scores have many equals."""
    bounds = [0, 45, 45, 46, 83]
    queries, keys = normals(83, 2, 6).mul(1.3).round(), normals(83, 6, seed=1).mul(1.3).round()
    found, expected = (select_blocks(queries, keys, bounds, spec, b) for b in ("triton", "torch"))
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@dataclass(frozen=True)
class Taught:
    """An index inside sparse attention that learns."""

    spec: SparseAttentionSpec = WITHIN["plain"]
    bounds: tuple[int, ...] = (0, 37, 37, 38, 57)
    heads: int = 4
    kv_heads: int = 2
    bias: bool = False
    masked: bool = False
    dtype: torch.dtype = torch.float32

    def parts(self) -> list[Tensor]:
        """q, k, v, queries and keys of the index, bias."""
        length = self.bounds[-1]
        shapes = (
            *((length, self.heads, 16), (length, self.kv_heads, 16), (length, self.kv_heads, 16)),
            *((length, self.kv_heads, 6), (length, 6), (length, self.heads)),
        )
        return [normals(*x, seed=n).to(self.dtype) for n, x in enumerate(shapes)]


TAUGHT = {
    "plain": Taught(bias=True, masked=True),
    "means, no first blocks": Taught(
        SparseAttentionSpec(
            block_size=4, coarse_block_size=4, top_k=2, window_size=1, num_sink_blocks=0, order=0
        ),
        kv_heads=1,
    ),
    "short documents whole": Taught(
        SparseAttentionSpec(
            block_size=4, coarse_block_size=2, top_k=2, window_size=4, min_sparse_length=25
        ),
        heads=2,
        bias=True,
    ),
    "groups of three": Taught(heads=3, kv_heads=1, masked=True),
    "as many entries of a block as a step takes": Taught(
        SparseAttentionSpec(
            block_size=16, coarse_block_size=1, top_k=1, window_size=1, num_sink_blocks=0
        ),
        (0, 80),
    ),
    "nothing selected": Taught(
        SparseAttentionSpec(block_size=4, coarse_block_size=2, top_k=0, window_size=5), bias=True
    ),
    "nothing to choose": Taught(WITHIN["nothing to choose"]),
    "variances cut": Taught(
        SparseAttentionSpec(
            block_size=4, coarse_block_size=2, top_k=1, window_size=5, max_variance=0.05
        )
    ),
}
TAUGHT_HALF = {
    f"{name} {dtype}": replace(TAUGHT[name], dtype=dtype, **changes)
    for dtype in (torch.bfloat16, torch.float16)
    for name, changes in (("plain", {"heads": 8}), ("means, no first blocks", {}))
}


def check_taught(case: Taught) -> None:
    """Masses, divergence and gradients: by plain torch in fp64, and what the definition says."""
    spec, bounds, length = case.spec, list(case.bounds), case.bounds[-1]
    rounded = case.parts()
    q, k, v, queries, keys, bias = (x.double() for x in rounded)
    options = {"bias": bias} if case.bias else {}
    cu = torch.tensor(bounds)
    selected = select_blocks(queries, keys, bounds, spec)
    found = sparse_attention(q, k, v, cu, spec, selected=selected, backend="chunked", **options)
    # in the dtype of the keys, as the op has them; in any order
    entries = CoarseEntries(*(x.to(case.dtype) for x in pool_entries(q, k, v, cu, spec)))
    chosen, lse = found.selected.flip(-1), found.lse
    ours = Teacher(*rounded[:2], entries, chosen, lse, rounded[5] if case.bias else None)
    exact = CoarseEntries(*(x.double() for x in entries))
    theirs = Teacher(q, k, exact, chosen, lse, options.get("bias"))
    counts = torch.arange(length) % 5 != 2 if case.masked else None

    for part in within._tiles(bounds, spec, case.kv_heads, True):
        number = part.num_blocks - spec.num_sink_blocks
        if number <= 0:
            continue
        there = part.candidates(spec, q)
        expected = within._masses(theirs, part, there, spec) * there
        with poisoned_memory():
            given = within._masses_by_kernels(
                within._for_kernels(ours, case.dtype), part, there.sum(-1, dtype=torch.int32), spec
            )
        known = there[:, spec.num_sink_blocks :]
        assert not (given[..., :number] * ~known).any(), "masses beyond the candidates"
        assert not expected[..., : spec.num_sink_blocks].any()
        assert_close("masses", given[..., :number], expected[..., -number:], case.dtype)

    def run(backend: str, teacher: Teacher, parts: list[Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in parts]
        with poisoned_memory():
            total = teach_index(*leaves, teacher, bounds, spec, counts, backend)
        if not total.requires_grad:
            return [total]
        return [total.detach(), *torch.autograd.grad(3 * total, leaves)]

    one, two = (run("triton", ours, rounded[3:5]) for _ in range(2))
    if case.masked:
        with torch.no_grad():
            (value,) = run("triton", ours, rounded[3:5])
        assert torch.equal(value, one[0]), "the value hangs on whether it learns"
    expected = run("torch", theirs, [queries, keys])
    assert (expected[0] > 0.1) == (spec.window_size < 60)
    for name, a, b, c in zip(("divergence", "queries", "keys"), one, two, expected, strict=True):
        assert torch.equal(a, b), f"{name} differ from one run to the next"
        assert_close(name, a, c, case.dtype)

    # The definition has entries that are not rounded.
    if case.dtype == torch.float32 and case.heads == 4:
        leaves = [x.requires_grad_() for x in (queries, keys)]
        said = reference.reference_within(q, k, v, *leaves, bounds, spec, **options).divergence
        total = said.sum() if counts is None else (said * counts).sum()
        assert_close("divergence and definition", one[0], total.detach(), case.dtype)
        if total.requires_grad:
            defined = torch.autograd.grad(3 * total, leaves)
            for name, a, c in zip(("queries", "keys"), one[1:], defined, strict=True):
                assert_close(f"{name} and definition", a, c, case.dtype)


def check_far(spec: SparseAttentionSpec) -> None:
    """Masses of many blocks by the formula, for few queries: programs and steps after the first."""
    number, first, r, scale = 150, 3, spec.entries_per_block, 0.25
    q, lse, bias = normals(9, 4, 16), 6 + normals(9, 4, seed=1), normals(9, 4, seed=2)
    mean, var = (normals(2, (first + number) * r, 16, seed=n) for n in (3, 4))
    var = var.square()
    candidates = torch.tensor([0, 1, 63, 64, 65, 150], dtype=torch.int32)
    with poisoned_memory():
        found = triton_backend.block_masses(
            q,
            mean,
            lse,
            candidates * r,
            2,
            first * r,
            number + 1,
            r,
            variances=var if spec.order == 2 else None,
            max_variance=spec.max_variance,
            num_pooled=spec.coarse_block_size,
            bias=bias,
        )
    expected = torch.zeros(2, len(candidates), number + 1, dtype=torch.float64)
    for at, count in enumerate(candidates.tolist()):
        for head in range(4):
            row = q[2 + at, head].double()
            logits = scale * mean[head // 2].double() @ row + bias[2 + at, head]
            if spec.order == 2:
                spread = 0.5 * scale**2 * var[head // 2].double() @ row.square()
                logits = logits + spread.clamp_max(spec.max_variance)
            masses = spec.coarse_block_size * (logits - lse[2 + at, head]).exp()
            by_block = masses.view(-1, r).sum(1)[first:]
            expected[head // 2, at, :count] += by_block[:count]
    assert torch.equal(found != 0, expected != 0), "what has a mass differs"
    assert_close("masses", found, expected, torch.float32)


GROUPS: dict[str, tuple[Callable[[Any], None], dict[str, Any], ModuleType, dict[str, int]]] = {
    "largest": (check_largest, LARGEST, configs, {}),
    "chunks": (check_largest, LARGEST, configs, {"CHUNK": 32}),
    "scores": (check_scores, CASES | HALF | WHOLE, configs, {}),
    "choice": (check_choice, WHOLE, configs, {}),
    "grads": (check_grads, CASES | HALF, configs, {}),
    "within": (check_within, WITHIN, triton_backend, {"MOST_QUERIES": 16}),
    "taught": (check_taught, TAUGHT | TAUGHT_HALF, triton_backend, {"MOST_QUERIES": 16}),
    "taught in parts": (check_taught, TAUGHT, configs, {"ROW": 2, "MASSES_STEPS": 2}),
    "far": (
        check_far,
        {name: TAUGHT[name].spec for name in ("plain", "means, no first blocks")},
        configs,
        {},
    ),
    "tiles": (
        gather_cases.check_op,
        {name: gather_cases.OPS[name] for name in ("dsa", "msa", "csa", "csa, two steps")},
        triton_backend,
        {"MOST_QUERIES": 7},
    ),
    "dense": (
        gather_cases.check_op,
        {name: case for name, case in gather_cases.OPS.items() if case.dense},
        triton_backend,
        {"MOST_QUERIES": 7},
    ),
}
"""Check, cases, and what of a module is smaller than it is, so that small inputs are cut."""


def main(groups: list[str]) -> int:
    failed = False
    for asked in groups:
        group, _, one_in = asked.partition("/")  # scores/2: every second case
        check, cases, module, limits = GROUPS[group]
        before = {name: getattr(module, name) for name in limits}
        vars(module).update(limits)
        for name, case in list(cases.items())[:: int(one_in or 1)]:
            start = time.process_time()
            try:
                check(case)
            except Exception as error:
                failed = True
                print(f"FAILED {group} / {name}: {error}\n{traceback.format_exc()}", flush=True)
            print(f"{group} / {name}: {time.process_time() - start:.1f} s", flush=True)
        vars(module).update(before)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
