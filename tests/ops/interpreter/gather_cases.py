"""Worker of tests/ops/test_gather_attention_triton.py, run by path with TRITON_INTERPRET=1: the
kernels that gather, in Triton's interpreter, against the definition. Arguments: names of groups of
cases; prints one line per failure.
"""

from __future__ import annotations

import itertools
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import shim  # noqa: F401
import torch
from torch import Tensor

from ops.compressed_attention import (
    CompressedSpec,
    attend_held,
    choose_held,
    compressed_attention,
)
from ops.gather_attention import (
    Gather,
    Lookup,
    Source,
    reference_gather,
    reference_lookup,
    triton_backend,
)
from ops.index_attention import (
    Index,
    IndexSpec,
    attend_cached,
    group_means,
    group_starts,
    indexed_attention,
)
from ops.testing import assert_close, poisoned_memory

torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (13, 0, 1, 30)
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    span: int = 1
    most: int = 5
    """Spans that a query chooses; -1: it sees all, -2: none, and nothing chooses. ratio: tokens of
    an entry, of which spans are; 0: of tokens.
    """
    ratio: int = 0
    window: int = 0
    by_head: bool = False
    sink: bool = False
    shared: bool = False
    dtype: torch.dtype = torch.float32
    # of triton_backend, to cut small inputs into parts and runs
    limits: dict[str, int] = field(default_factory=dict)


KERNELS = {
    "tokens": Case(),
    "tokens, parts and runs": Case(
        (61,), 3, 1, most=7, limits={"PART_QUERIES": 16, "SCRATCH": 2**14}
    ),
    "blocks of four, and a window": Case(span=4, most=2, window=4, sink=True),
    "blocks of 32 by head, the own one cut": Case((70, 9), span=32, most=2, by_head=True),
    "many heads": Case((9,), 70, 1, most=3),
    "entries, a window and sinks": Case(
        (17, 0, 3, 29), 6, 1, ratio=4, most=3, window=5, sink=True, shared=True
    ),
    "entries, parts and runs": Case(
        (50, 2),
        *(3, 1),
        ratio=2,
        most=4,
        window=3,
        sink=True,
        shared=True,
        limits={"PART_QUERIES": 8, "SCRATCH": 1},
    ),
    "a window alone": Case((17, 5), 2, 1, most=0, window=6, sink=True, shared=True),
    "all entries, a window and sinks": Case(
        (50, 2, 0, 19),
        *(3, 1),
        ratio=2,
        most=-1,
        window=3,
        sink=True,
        shared=True,
        limits={"PART_QUERIES": 8, "SCRATCH": 2**14},
    ),
    "all spans of four": Case((30,), span=4, most=-1, window=4),
    "a window, and nothing chooses": Case((17, 5), 2, 1, most=-2, window=6, shared=True),
    "nothing seen": Case((9,), most=0),
    "no tokens": Case((0,), sink=True),
}
HALF = {
    f"{name} {dtype}": replace(KERNELS[name], dtype=dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for name in ("tokens", "entries, a window and sinks")
}


def problem_of(case: Case) -> Gather:
    """Random choices: some queries choose fewer than they may, some nothing."""
    generator = torch.Generator().manual_seed(sum(case.lengths) + case.heads)
    num_tokens = sum(case.lengths)
    ratio = case.ratio or 1
    entries = [length // ratio if case.ratio else 0 for length in case.lengths]
    own_row = sum(entries)
    choices = case.kv_heads if case.by_head else 1
    chosen = torch.full((choices, num_tokens, max(0, case.most)), -1, dtype=torch.int32)
    base, window_start, all_spans = [], [], []
    begin = first = 0
    for length, closed in zip(case.lengths, entries, strict=True):
        for at in range(length):
            token = begin + at
            base.append(first if case.ratio else begin)
            # spans that lie before the window, whole where there is one
            free = max(0, at - case.window + 1) if case.window else at + 1
            window_start.append(own_row + (begin + free if case.window else token + 1))
            candidates = (at + 1) // ratio if case.ratio else free // case.span
            if not case.ratio and not case.window:
                candidates = -(-free // case.span)
            all_spans.append(candidates)
            for choice in range(choices if case.most > 0 else 0):
                drawn = torch.randperm(candidates, generator=generator)[: case.most]
                drawn = drawn[: len(drawn) if token % 7 else token % 3]
                chosen[choice, token, : len(drawn)] = drawn.int()
        begin, first = begin + length, first + closed

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    keys = (own_row + num_tokens, case.kv_heads, case.dim)
    q, k = 1.5 * normal(num_tokens, case.heads, case.dim), normal(*keys)
    return Gather(
        q.to(case.dtype),
        k.to(case.dtype),
        None if case.shared else normal(*keys).to(case.dtype),
        chosen if case.most >= 0 else None,
        torch.tensor(base, dtype=torch.int32),
        case.span,
        own_row,
        torch.tensor(window_start, dtype=torch.int32) if case.window else None,
        normal(case.heads) if case.sink else None,
        torch.tensor(all_spans, dtype=torch.int32) if case.most == -1 else None,
    )


def check_kernels(case: Case) -> None:
    problem = problem_of(case)
    num_tokens = len(problem.q)
    generator = torch.Generator().manual_seed(7)
    dout = torch.randn(problem.q.shape, generator=generator).to(case.dtype)
    with poisoned_memory():
        out, lse = torch.empty_like(problem.q), torch.empty(problem.q.shape[:2])
        # a call for some of the queries writes theirs alone
        cuts = [0, num_tokens // 3, num_tokens]
        parts = []
        for start, stop in itertools.pairwise(cuts):
            triton_backend.attend(problem, out, lse, start, stop)
            if problem.chosen is not None:
                parts.append(triton_backend.masses(problem, lse, start, stop))
        grads = triton_backend.attend_backward(problem, out, lse, dout)
        again = triton_backend.attend_backward(problem, out, lse, dout)
    for name, one, two in zip(grads._fields, grads, again, strict=True):
        assert (one is None) == (two is None) and (one is None or torch.equal(one, two)), name

    exact = [problem.q, problem.k, problem.v, problem.sink]
    exact = [None if x is None else x.double().requires_grad_() for x in exact]
    theirs = problem._replace(q=exact[0], k=exact[1], v=exact[2], sink=exact[3])
    want_out, want_lse, want_masses = reference_gather(theirs)
    nothing = want_lse.isinf()
    assert torch.equal(nothing, lse.isinf()), "rows that see nothing differ"
    assert_close("out", out, want_out, case.dtype)
    finite = [x.masked_fill(nothing, 0.0) for x in (lse, want_lse)]
    assert_close("lse", *finite, case.dtype)
    if problem.chosen is not None:
        assert_close("masses", torch.cat(parts, 1), want_masses, case.dtype)

    inputs = [x for x in exact if x is not None]
    expected = iter(
        torch.autograd.grad(
            (want_out * dout).sum(), inputs, allow_unused=True, materialize_grads=True
        )
    )
    for name, grad, given in zip(grads._fields, grads, exact, strict=True):
        assert (grad is None) == (given is None), f"{name} is missing"
        if grad is not None:
            assert_close(name, grad, next(expected), case.dtype)


@dataclass(frozen=True)
class Op:
    """A call of an op whose index chooses and learns; attention is by 4 heads of 16. dense: it
    learns from all, and nothing is chosen.
    """

    spec: IndexSpec | CompressedSpec
    bounds: tuple[int, ...] = (0, 13, 13, 14, 37)
    dtype: torch.dtype = torch.float32
    limits: dict[str, int] = field(default_factory=dict)
    dense: bool = False


OPS = {
    "dsa": Op(IndexSpec("dsa", 1, 4)),
    "qsa": Op(IndexSpec("qsa", 4, 2), dtype=torch.bfloat16),
    "csa": Op(CompressedSpec(5, 4, 2)),
    "msa": Op(IndexSpec("msa", 8, 2)),
    "dsa bf16": Op(IndexSpec("dsa", 1, 4), dtype=torch.bfloat16),
    "csa bf16": Op(CompressedSpec(5, 4, 2), dtype=torch.bfloat16),
    "csa, two steps": Op(CompressedSpec(5, 2, 3, top_k_blocks=2, index_block_size=4)),
    "csa, no window is closed": Op(CompressedSpec(5, 4, 2), (0, 3, 5)),
    "hca": Op(CompressedSpec(5, 4)),
    "hca bf16": Op(CompressedSpec(5, 4), dtype=torch.bfloat16),
    "window": Op(CompressedSpec(5)),
    "msa, dense": Op(IndexSpec("msa", 8, 2), dense=True),
    "dsa, dense": Op(IndexSpec("dsa", 1, 4), dense=True),
    "qsa, dense": Op(IndexSpec("qsa", 4, 2), dense=True),
    "dsa, dense bf16": Op(IndexSpec("dsa", 1, 4), dtype=torch.bfloat16, dense=True),
    "msa, dense fp16": Op(IndexSpec("msa", 8, 2), dtype=torch.float16, dense=True),
}


def run_op(case: Op, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients by name, of inputs in the case's dtype, computed in `dtype`."""
    generator = torch.Generator().manual_seed(3)
    length, spec = case.bounds[-1], case.spec
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator).to(case.dtype).to(dtype)
        leaves[name] = x.requires_grad_()
        return leaves[name]

    counts = torch.arange(length) % 5 != 2
    options = {"teach": True, "token_mask": counts, "backend": backend}
    q, width = leaf("q", length, 4, 16), 8
    if isinstance(spec, IndexSpec):
        keys = leaf("index keys", length, width)
        if spec.pools_keys:
            starts = group_starts(case.bounds, spec.block_size)
            keys = group_means(keys.detach(), starts, spec.block_size)
            leaves["index keys"] = keys.requires_grad_()
        index = Index(
            leaf("index queries", length, 2 if spec.by_head else 9, width),
            keys,
            leaf("index weights", length, 9) if spec.rule == "dsa" else None,
        )
        kv = leaf("k", length, 2, 16), leaf("v", length, 2, 16)
        found = indexed_attention(q, *kv, index, case.bounds, spec, dense=case.dense, **options)
    else:
        number = sum((e - b) // (spec.ratio or 1) for b, e in itertools.pairwise(case.bounds))
        kv, entries, index = leaf("kv", length, 16), None, None
        if spec.ratio:
            entries = leaf("entries", number, 16)
        if spec.top_k is not None:
            index = Index(
                leaf("index queries", length, 9, width),
                leaf("index keys", number, width),
                leaf("index weights", length, 9),
            )
        else:
            options |= {"teach": False}
        sinks = leaf("sinks", 4)
        found = compressed_attention(q, kv, entries, index, sinks, case.bounds, spec, **options)
    into = torch.randn(found.out.shape, generator=generator).to(case.dtype).to(dtype)
    loss = (found.out * into).sum() + 0.7 * found.divergence
    # The host's table of documents is read in the forward pass alone.
    with (
        mock.patch("ops.index_attention.gathered.document_starts", side_effect=RuntimeError),
        mock.patch("ops.compressed_attention.interface.document_starts", side_effect=RuntimeError),
    ):
        grads = torch.autograd.grad(
            loss, leaves.values(), allow_unused=True, materialize_grads=True
        )
    return {
        **{name: x.detach() for name, x in found._asdict().items()},
        **{f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)},
    }


def check_op(case: Op) -> None:
    """The kernels against plain torch in fp64, which other tests hold to the definition."""
    with poisoned_memory():
        ours = run_op(case, "triton", case.dtype)
    theirs = run_op(case, "torch", torch.float64)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name == "num_chosen":
            assert int(value) == int(theirs[name]) and bool(value) != case.dense
        elif name == "chosen":  # a set: kernels have it rising
            assert torch.equal(value.sort(-1).values, theirs[name].sort(-1).values)
        else:
            assert_close(name, value, theirs[name], case.dtype)


@dataclass(frozen=True)
class Listed:
    """Lists of decoding; sizes: rows that are listed of each source."""

    sizes: tuple[int, ...] = (37,)
    queries: int = 3
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    by_head: bool = False
    sink: bool = False
    shared: bool = False
    dtype: torch.dtype = torch.float32
    limits: dict[str, int] = field(default_factory=dict)


LOOKUP = {
    "one part": Listed(),
    "two pools, parts, sinks": Listed(
        (70, 9), 5, 6, 1, sink=True, shared=True, limits={"PART_ROWS": 32}
    ),
    "by head, in runs": Listed((40,), by_head=True, limits={"PART_ROWS": 16, "SCRATCH": 1}),
    "many heads": Listed((33,), 2, 70, 1, sink=True),
    "one row": Listed((1,), 1, 1, 1),
    "no rows": Listed((0,), 2, sink=True),
    "no queries": Listed(queries=0),
    "two pools bf16": Listed(
        (70, 9), 2, 6, 1, 32, shared=True, dtype=torch.bfloat16, limits={"PART_ROWS": 64}
    ),
    "by head fp16": Listed((40,), by_head=True, dtype=torch.float16),
}


def check_lookup(case: Listed) -> None:
    """Lists with gaps; the first query's are empty where there are several."""
    generator = torch.Generator().manual_seed(case.heads + case.queries)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    sources = []
    for size in case.sizes:
        shape = (case.kv_heads if case.by_head else 1, case.queries, size)
        rows = torch.randint(-9, 50, shape, generator=generator).clamp_min(-1).int()
        if case.queries > 1:
            rows[:, 0] = -1
        keys = (50, case.kv_heads, case.dim)
        sources.append(Source(normal(*keys), None if case.shared else normal(*keys), rows))
    q = 1.5 * normal(case.queries, case.heads, case.dim)
    problem = Lookup(q, tuple(sources), normal(case.heads).float() if case.sink else None)
    with poisoned_memory():
        found, again = (triton_backend.look_up(problem) for _ in range(2))
    assert torch.equal(found, again), "a second run has other bits"
    exact = [Source(k.double(), None if v is None else v.double(), r) for k, v, r in sources]
    sink = None if problem.sink is None else problem.sink.double()
    assert_close("out", found, reference_lookup(Lookup(q.double(), tuple(exact), sink)), case.dtype)


HELD = {
    "dsa": Op(IndexSpec("dsa", 1, 4)),
    "msa": Op(IndexSpec("msa", 8, 2)),
    "msa, blocks of 64": Op(IndexSpec("msa", 64, 1), (0, 70, 150)),
    "qsa": Op(IndexSpec("qsa", 4, 2)),
    "csa": Op(CompressedSpec(5, 4, 2)),
    "csa, two steps": Op(CompressedSpec(5, 2, 3, top_k_blocks=2, index_block_size=4)),
    "hca": Op(CompressedSpec(5, 4)),
    "a window alone": Op(CompressedSpec(5)),
    "dsa bf16": Op(IndexSpec("dsa", 1, 4), dtype=torch.bfloat16),
    "csa bf16": Op(CompressedSpec(5, 4, 2), dtype=torch.bfloat16),
}


def check_held(case: Op) -> None:
    """New tokens of two rows against what a pool has of them; the index is of small whole numbers,
    so that its choice is plain torch's, ties and all.
    """
    generator = torch.Generator().manual_seed(5)
    spec, lengths = case.spec, [e - b for b, e in itertools.pairwise(case.bounds) if e > b + 3]
    batch, room, new, width = len(lengths), max(lengths) + 6, 3, 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    def held_entries(spec: CompressedSpec, backend: str, dtype: torch.dtype) -> Tensor:
        window, entries, places, chosen = kv[0].flatten(1).to(dtype), None, None, None
        since = position[:, :1] + torch.arange(1 - spec.window, new)
        if spec.ratio:
            entries = kv[1].flatten(1).to(dtype)
            places = rows[:, : room // spec.ratio]
        if spec.top_k is not None:
            parts = (x.to(dtype) for x in (queries, keys, of_entries))
            chosen = choose_held(*parts, position, spec, places, backend)
        return attend_held(
            *(q.to(dtype), window[: since.numel()].view(*since.shape, -1), since, entries),
            *(chosen, sinks.to(dtype), position, spec, places, backend),
        )

    dim = 32 if isinstance(spec, CompressedSpec) else 16
    q, sinks = normal(batch, new, 4, dim), normal(4)
    of_entries = normal(batch, new, 20).round()
    kv = normal(2 * batch * room, 2, 16), normal(2 * batch * room, 2, 16)
    ranking = spec if isinstance(spec, IndexSpec) else IndexSpec()
    queries = normal(batch, new, 2 if ranking.by_head else 20, width).mul(2).round()
    weights = normal(batch, new, 20).round() if ranking.rule == "dsa" else None
    rows = torch.randperm(2 * batch * room, generator=generator)[: batch * room].view(batch, -1)
    keys = normal(2 * batch * room, width).mul(2).round()
    if ranking.pools_keys:
        keys = normal(batch, room // spec.block_size, width).mul(2).round()
    position = torch.tensor(lengths)[:, None] - new + torch.arange(new)

    def run(backend: str, dtype: torch.dtype) -> Tensor:
        if isinstance(spec, CompressedSpec):
            return held_entries(spec, backend, dtype)
        parts = [None if x is None else x.to(dtype) for x in (q, *kv, queries, keys, weights)]
        return attend_cached(*parts, position, spec, rows, backend)

    with poisoned_memory():
        found, again = run("triton", case.dtype), run("triton", case.dtype)
    assert torch.equal(found, again), "a second run has other bits"
    assert_close("out", found, run("torch", torch.float64), case.dtype)


GROUPS: dict[str, tuple[Callable[[Any], None], dict[str, Any]]] = {
    "kernels": (check_kernels, KERNELS),
    "half": (check_kernels, HALF),
    "ops": (check_op, OPS),
    "lookup": (check_lookup, LOOKUP),
    "held": (check_held, HELD),
}


def main(groups: list[str]) -> int:
    failed = False
    for asked in groups:
        group, _, one_in = asked.partition("/")  # kernels/2: every second case
        check, cases = GROUPS[group]
        for name, case in list(cases.items())[:: int(one_in or 1)]:
            before = {limit: getattr(triton_backend, limit) for limit in case.limits}
            start = time.process_time()
            try:
                vars(triton_backend).update(case.limits)
                check(case)
            except Exception as error:
                failed = True
                print(f"FAILED {group} / {name}: {error}\n{traceback.format_exc()}", flush=True)
            finally:
                vars(triton_backend).update(before)
            print(f"{group} / {name}: {time.process_time() - start:.1f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
