"""Worker of tests/ops/test_sparse_attention_triton.py, run by path with TRITON_INTERPRET=1: the
kernels of sparse attention in Triton's interpreter against the definition. Arguments: names of
groups of cases; prints one line per failure.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import shim  # noqa: F401
import torch
from torch import Tensor

from ops.sparse_attention import chunked, reference, sparse_attention, triton_backend
from ops.sparse_attention.blocks import BlockTable, block_table
from ops.sparse_attention.cache import pooled
from ops.sparse_attention.chunked import complete_blocks, pool_spans_backward, token_spans
from ops.sparse_attention.entries import CoarseEntries
from ops.sparse_attention.kernels.configs import loading_by_tma
from ops.sparse_attention.noise import NO_NOISE, gumbel, selection_counter, token_hash
from ops.sparse_attention.problem import DecodeProblem, Problem
from ops.sparse_attention.ranking import block_of_key, value_of_key
from ops.sparse_attention.spec import SelectionNoise, SparseAttentionSpec
from ops.testing import assert_close, poisoned_memory

torch.set_num_threads(1)
SMALL = SparseAttentionSpec(
    block_size=16, top_k=2, window_size=17, num_sink_blocks=1, coarse_block_size=8
)


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (131,)
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    spec: SparseAttentionSpec = SMALL
    dtype: torch.dtype = torch.float32
    bias: bool = False
    sink: bool = False
    dlse: bool = True
    exact: bool = True
    coarse: bool = True
    # or "shared": every query chooses the first candidate; "reversed": unordered, -1 in front
    selection: str = "ranked"
    # False: the second run hands out the gradients of entries as of inputs of their own
    pooled: bool = True
    # of learned entries: weights of which one token takes nearly everything
    sharp: bool = False
    # of triton_backend, to cut small inputs into parts and runs
    limits: dict[str, int] = field(default_factory=dict)

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(sum(self.lengths) + self.heads)
        num_tokens = sum(self.lengths)
        shapes = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (
            torch.randn(num_tokens, h, self.dim, generator=generator).to(self.dtype) for h in shapes
        )
        return 1.5 * q, k, v


def spec(**settings: Any) -> SparseAttentionSpec:
    return replace(SMALL, **settings)


ATTEND = {
    "prime": Case(heads=4, kv_heads=2),
    "documents": Case((0, 53, 1, 97, 0), 3, 1, spec=spec(order=0, top_k=3), bias=True, sink=True),
    "order 0, apart": Case((60,), spec=spec(order=0, top_k=1), pooled=False),
    "tiny documents": Case((3,) * 9 + (1,) * 4 + (16, 17), 2, 2),
    "no tokens": Case((0, 0), bias=True, sink=True),
    "one token": Case((1,), 4, 2, sink=True),
    "nothing selected": Case(spec=spec(top_k=0), bias=True),
    "no window, no first blocks": Case(spec=spec(window_size=0, num_sink_blocks=0, top_k=5)),
    "first blocks": Case(spec=spec(num_sink_blocks=3), sink=True),
    "all short": Case((90, 40), spec=spec(min_sparse_length=1000)),
    "short at first": Case((131, 20), spec=spec(min_sparse_length=70), bias=True),
    "drop": Case(coarse=False, spec=spec(tail="drop"), bias=True, sink=True, dlse=False),
    "coarse alone": Case((100, 33), 2, 2, exact=False, bias=True),
    "coarse alone with sink": Case(exact=False, sink=True, dlse=False),
    "clamped": Case(spec=spec(max_variance=0.6), dlse=False, pooled=False),
    "one entry a block": Case(spec=spec(coarse_block_size=16)),
    "sixteen entries a block": Case(spec=spec(coarse_block_size=1, order=0)),
    "shared block": Case((150,), 4, 1, selection="shared", limits={"PART_QUERIES": 24}),
    "parts and runs": Case(
        (131, 70),
        4,
        2,
        limits={"PART_QUERIES": 16, "SCRATCH": 2**9, "ENTRY_PROGRAMS": 1},
        bias=True,
    ),
    "more parts": Case(
        (200,), 2, 2, spec=spec(num_sink_blocks=2), limits={"PART_QUERIES": 16, "SCRATCH": 1}
    ),
    "unordered selection": Case(selection="reversed", heads=8),
    "group of 16": Case((90,), 16, 1),
    "shipping shape": Case(
        (270, 37), 4, 1, 64, spec(block_size=64, coarse_block_size=32, window_size=64, top_k=1)
    ),
}
HALF = {
    f"{name} {dtype}": replace(ATTEND[name], dtype=dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for name in ("prime", "documents", "coarse alone", "clamped")
}
TMA = {
    name: replace(case, lengths=(*case.lengths, 21))
    for name, case in {**ATTEND, **HALF}.items()
    if name
    in (
        *("prime", "documents", "tiny documents", "first blocks", "drop"),
        *("parts and runs", "more parts", "documents torch.bfloat16", "clamped torch.float16"),
    )
}
RANK = {
    "prob": Case((131, 90), 4, 2),
    "prob, order 0": Case(spec=spec(order=0, top_k=5), heads=3),
    "max": Case((131, 5, 60), 4, 2, spec=spec(score="max", top_k=3)),
    "error_gain": Case(spec=spec(score="error_gain", max_variance=0.5), heads=4),
    "one pass": Case((131, 90), 4, 2, spec=spec(rank_lse="super", fanout=2, top_k=3)),
    "one pass, error_gain": Case(
        (190,), heads=4, spec=spec(rank_lse="super", fanout=3, score="error_gain")
    ),
    "one pass, order 0": Case((5, 290), 3, 1, spec=spec(rank_lse="super", order=0, top_k=5)),
    "all of them": Case(spec=spec(top_k=64, window_size=0, num_sink_blocks=0)),
    "many blocks": Case((700,), 1, 1, spec=spec(top_k=7, coarse_block_size=16)),
    "one entry a token": Case(spec=spec(coarse_block_size=1, order=0)),
    "tiny documents": Case((3,) * 30),
    "no tokens": Case((0,)),
    "shipping shape": Case(
        (270, 37), 4, 1, 64, spec(block_size=64, coarse_block_size=32, window_size=64, top_k=1)
    ),
    "prob bf16": Case((131, 90), 4, 2, dtype=torch.bfloat16),
    "one pass bf16": Case(
        (131, 90), 4, 2, dtype=torch.bfloat16, spec=spec(rank_lse="super", fanout=2)
    ),
}
WEIGH = {
    "block 32, entries of 16": Case(
        (0, 1, 31, 32, 100), dim=64, spec=spec(block_size=32, coarse_block_size=16)
    ),
    "one entry a block": Case(
        (64, 1, 0, 130), 1, 1, 64, spec(block_size=64, coarse_block_size=64), torch.float16
    ),
    "no tokens": Case((0, 0)),
    "two heads, block 64": Case(
        (0, 1, 63, 64, 70), 2, 2, 128, spec(block_size=64, coarse_block_size=32), torch.bfloat16
    ),
    "entries of one token": Case((40,), spec=spec(coarse_block_size=1)),
    "channels in parts": Case((70, 33), 2, 2, 256, spec(block_size=32, coarse_block_size=32)),
    "sharp": Case((0, 70), 2, 2, 64, spec(block_size=32, coarse_block_size=32), sharp=True),
    **{
        f"block 128, {str(dtype).removeprefix('torch.')}": Case(
            (0, 1, 127, 128, 257), 2, 2, 64, spec(block_size=128, coarse_block_size=64), dtype
        )
        for dtype in (torch.float32, torch.bfloat16)
    },
    "no block is complete": Case((63, 3), 1, 1, 64, spec(block_size=64, coarse_block_size=32)),
}
LEARNED = {
    "two documents": Case((83, 40, 1), 4, 2),
    "clamped": Case((70,), 2, 1, spec=spec(max_variance=0.6, top_k=1), dtype=torch.bfloat16),
}
DECODE = {
    "prime": Case((131, 131), 4, 2),
    "group of 3": Case((97,), 3, 1, bias=True, sink=True, spec=spec(order=0)),
    "error_gain": Case((150, 150), 2, 2, spec=spec(score="error_gain", top_k=3), bias=True),
    "max, top 5": Case((200,), 2, 1, spec=spec(score="max", top_k=5)),
    "top_p": Case((250,), 2, 1, spec=spec(top_p=0.6, top_k=6)),
    "one pass": Case((250,), 4, 2, spec=spec(rank_lse="super", fanout=3, top_k=4)),
    "drop": Case((131,), 2, 1, spec=spec(tail="drop"), bias=True),
    "short": Case((90,), 2, 1, spec=spec(min_sparse_length=1000), sink=True),
    "first token": Case((1, 1), 2, 1),
    "full block": Case((96,), 2, 1, spec=spec(top_k=0)),
    "coarse alone": Case((90,), 2, 1, exact=False, bias=True),
    "coarse alone, nothing there": Case((9,), 2, 1, exact=False),
    "exact alone": Case((131,), 2, 1, coarse=False),
    "bf16": Case((131,), 4, 2, dtype=torch.bfloat16, bias=True),
}


def selected_blocks(case: Case) -> Tensor:
    """[Hk, T, K] int32."""
    q, k, v = case.inputs
    table = block_table(case.cu_seqlens, len(q), case.spec)
    selected = torch.full((case.kv_heads, len(q), case.spec.top_k), -1, dtype=torch.int32)
    if not case.spec.top_k or not len(q):
        return selected
    if case.selection == "shared":
        own = table.block_of.long()
        low, high = table.sink_end[own], table.local_start[own]
        selected[..., 1] = torch.where(low < high, low, -1)
        return selected
    entries = triton_backend.pool(k, v, table, case.spec)
    keys, _ = triton_backend.rank(q, entries, table, case.spec, None, NO_NOISE)
    return (
        block_of_key(keys).int().flip(-1)
        if case.selection == "reversed"
        else block_of_key(keys).int().sort(-1).values
    )


def problem_of(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sink: Tensor | None,
    table: BlockTable,
) -> Problem:
    """What the kernels of attention are asked for, with entries of these keys and values."""
    return Problem(
        q=q,
        k=k,
        v=v,
        bias=bias,
        sink=sink,
        selected=selected_blocks(case),
        entries=triton_backend.pool(k, v, table, case.spec) if case.coarse else None,
        table=table,
        spec=case.spec,
        exact=case.exact,
        coarse=case.coarse,
    )


def check_attend(case: Case) -> None:
    q, k, v = case.inputs
    cu_seqlens, num_tokens = case.cu_seqlens, len(q)
    table = block_table(cu_seqlens, num_tokens, case.spec)
    generator = torch.Generator().manual_seed(7)
    bias = torch.randn(num_tokens, case.heads, generator=generator) if case.bias else None
    sink = torch.randn(case.heads, generator=generator) if case.sink else None
    dout = torch.randn(q.shape, generator=generator).to(case.dtype)
    with poisoned_memory():
        problem = problem_of(case, q, k, v, bias, sink, table)
        out, lse, tail_mass, selected_mass = triton_backend.attend(problem)
        dlse = (
            torch.randn(lse.shape, generator=generator).masked_fill(lse.isinf(), 0.0)
            if case.dlse
            else None
        )
        grads = triton_backend.attend_backward(problem, out, lse, dout, dlse)
        # The interpreter runs programs in one order, so that a second run shows only what was
        # read before it was written: once for each way through the lists and parts.
        again = grads
        if case.limits or not case.pooled:
            again = triton_backend.attend_backward(problem, out, lse, dout, dlse, case.pooled)
        if not case.pooled:
            again = spread(problem, again, case)
    for i, (a, b) in enumerate(zip(grads, again, strict=True)):
        if i in (1, 2) and not case.pooled:  # dk and dv were added up in another order
            close(f"gradient {i} by way of the entries", b, a, case)
        else:
            assert a is None or torch.equal(a, b), "two runs differ"

    exact_inputs = [
        None if x is None else x.double().requires_grad_() for x in (q, k, v, bias, sink)
    ]
    chosen = torch.zeros(case.kv_heads, num_tokens, len(table.start) + 1, dtype=torch.bool)
    selected = problem.selected
    chosen.scatter_(2, torch.where(selected < 0, len(table.start), selected).long(), True)
    num_blocks = len(reference.reference_blocks(cu_seqlens, case.spec.block_size).start)
    theirs = reference.reference_attention(
        *exact_inputs[:3],
        cu_seqlens,
        case.spec,
        bias=exact_inputs[3],
        sink=exact_inputs[4],
        selected=chosen[..., :num_blocks],
        exact=case.exact,
        coarse=case.coarse,
    )
    nothing = theirs.lse.isinf()
    assert torch.equal(nothing, lse.isinf()), "rows without entries differ"
    close("out", out, theirs.out, case)
    close("lse", lse.masked_fill(nothing, 0.0), theirs.lse.masked_fill(nothing, 0.0), case)
    close("tail_mass", tail_mass, theirs.tail_mass, case)
    close("selected_mass", selected_mass, theirs.selected_mass, case)
    loss = (theirs.out * dout).sum()
    if dlse is not None:
        loss = loss + (theirs.lse.masked_fill(nothing, 0.0) * dlse).sum()
    wanted = [x for x in exact_inputs if x is not None]
    expected = iter(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    for name, grad, given_input in zip(
        ("dq", "dk", "dv", "dbias", "dsink"), grads, exact_inputs, strict=True
    ):
        assert (grad is None) == (given_input is None), f"{name} is missing"
        if grad is not None:
            close(name, grad, next(expected), case)


def check_tma(case: Case) -> None:
    """Tiles that come by descriptors give the bits that pointers give, whatever lies behind what
    may be read: rows of the next document that are not numbers reach nobody before them.
    """
    q, k, v = case.inputs
    table = block_table(case.cu_seqlens, len(q), case.spec)
    generator = torch.Generator().manual_seed(7)
    bias = torch.randn(len(q), case.heads, generator=generator)
    sink = torch.randn(case.heads, generator=generator) if case.sink else None
    dout = torch.randn(q.shape, generator=generator).to(case.dtype)
    dlse = torch.randn(len(q), case.heads, generator=generator)
    poisoned = sum(case.lengths[:-1])
    k[poisoned:], v[poisoned:] = torch.nan, torch.nan
    problem = problem_of(case, q, k, v, bias, sink, table)
    boxes: list[bool] = []
    launch = triton_backend.launch

    def watched(kernel: Any, *arguments: Any, **options: Any) -> None:
        if "TMA" in options:
            boxes.append(options["TMA"])
        launch(kernel, *arguments, **options)

    triton_backend.launch = watched
    found = []
    for tma in (False, True):
        with loading_by_tma(tma), poisoned_memory():
            outputs = triton_backend.attend(problem)
            grads = triton_backend.attend_backward(problem, *outputs[:2], dout, dlse)
        found.append((*outputs, *grads))
    triton_backend.launch = launch
    assert boxes.count(True) == boxes.count(False) >= 2, f"by descriptors: {boxes}"
    for i, (pointers, descriptors) in enumerate(zip(*found, strict=True)):
        if pointers is None:
            assert descriptors is None
            continue
        assert torch.equal(pointers.nan_to_num(7.0), descriptors.nan_to_num(7.0)), f"result {i}"
        if i < 4:
            rows = descriptors[:poisoned]
            assert not rows.isnan().any(), f"result {i} has rows of the document behind in it"


def spread(problem: Problem, grads: tuple[Tensor | None, ...], case: Case) -> list[Tensor | None]:
    """The five gradients, with what reached the entries added to those of keys and values."""
    assert problem.entries is not None
    dq, dk, dv, dbias, dsink, *entries = grads
    dk, dv = (x.float().transpose(0, 1).clone() for x in (dk, dv))
    complete, r = complete_blocks(problem.table, case.spec), case.spec.entries_per_block
    mean, *of_entries = (
        x.unflatten(1, (-1, r))[:, complete].flatten(1, 2).float()
        for x in (problem.entries.key_mean, *entries)
    )
    pool_spans_backward(
        problem.k,
        token_spans(problem.table.start[complete], case.spec.block_size),
        case.spec.coarse_block_size,
        mean,
        CoarseEntries(*of_entries),
        dk,
        dv,
    )
    dk, dv = (x.transpose(0, 1).to(case.dtype) for x in (dk, dv))
    return [dq, dk, dv, dbias, dsink]


def close(name: str, ours: Tensor, theirs: Tensor, case: Case) -> None:
    assert_close(name, ours, theirs, case.dtype)


def check_rank(case: Case) -> None:
    """Ties and near ties may fall either way: values are compared, and that no better block was
    left out.
    """
    q, k, v = case.inputs
    cu_seqlens, num_tokens = case.cu_seqlens, len(q)
    table = block_table(cu_seqlens, num_tokens, case.spec)
    hashed = token_hash(11, torch.arange(num_tokens) * 7)
    # The call's heads are some of a layer's, as under context parallelism.
    noise = SelectionNoise(11, 0.7, first_kv_head=2, num_kv_heads=case.kv_heads + 3)
    with poisoned_memory():
        entries = triton_backend.pool(k, v, table, case.spec)
        cold = triton_backend.rank(q, entries, table, case.spec, None, NO_NOISE)
        warm = triton_backend.rank(q, entries, table, case.spec, hashed, noise)
    if not num_tokens:
        return
    blocks = reference.reference_blocks(cu_seqlens, case.spec.block_size)
    grouped = q.double().view(num_tokens, case.kv_heads, -1, case.dim).transpose(0, 1)
    mean, var = reference.pooled(k.double(), blocks, case.spec, case.spec.coarse_block_size)
    logits, kappa = reference.coarse_logits(
        grouped, mean, var, case.spec.coarse_block_size, case.spec
    )
    own, block = table.block_of.long().unsqueeze(1), torch.arange(len(blocks.start))
    past = (block >= table.first[own]) & (block < own)
    seen = past.repeat_interleave(case.spec.entries_per_block, -1)
    denominator = None
    if case.spec.rank_lse == "super":
        denominator = reference.estimated_lse(grouped, logits, mean, var, past, blocks, case.spec)
    values, _ = reference.rank_values(logits, kappa, seen, case.spec, denominator)
    by_mass = replace(case.spec, score="prob")
    _, mass = reference.rank_values(logits, kappa, seen, by_mass, denominator)
    candidate = ((block >= table.sink_end[own]) & (block < table.local_start[own])).expand_as(
        values
    )
    counter = selection_counter(
        block - table.first[own], 2 + torch.arange(case.kv_heads)[:, None, None], case.kv_heads + 3
    )
    drawn = 0.7 * gumbel(hashed[:, None], counter)
    slack = 3e-5 if case.dtype == torch.float32 else 2e-2
    for (keys, candidate_mass), expected in ((cold, values), (warm, values + drawn)):
        found, ours = block_of_key(keys), value_of_key(keys)
        real = found >= 0
        assert torch.equal(real.sum(-1), candidate.sum(-1).clamp_max(case.spec.top_k)), (
            "number of blocks"
        )
        assert (keys.diff(dim=-1)[real[..., 1:]] < 0).all(), "keys do not fall"
        at = found.clamp_min(0)
        assert candidate.gather(-1, at)[real].all(), "not a candidate"
        error = (expected.gather(-1, at) - ours)[real].abs().max() if real.any() else 0.0
        assert error <= slack, f"values are off by {error}"
        taken = torch.zeros(*found.shape[:2], len(block) + 1, dtype=torch.bool)
        taken.scatter_(-1, torch.where(real, found, len(block)), True)
        best_left = expected.masked_fill(~candidate | taken[..., :-1], float("-inf")).amax(-1)
        assert (ours.masked_fill(~real, float("inf")).amin(-1) >= best_left - slack).all(), (
            "a better block was left out"
        )
        close("mass", candidate_mass, torch.where(candidate, mass, 0.0).sum(-1), case)


def check_ties(case: Case) -> None:
    """Equal keys: every block has the same score, and the first candidates are taken."""
    q, k, v = case.inputs
    k = k[:1].expand_as(k).contiguous()
    table = block_table(case.cu_seqlens, len(q), case.spec)
    entries = triton_backend.pool(k, v, table, case.spec)
    keys, _ = triton_backend.rank(q, entries, table, case.spec, None, NO_NOISE)
    assert block_of_key(keys)[0, -1].tolist() == [1, 2, 3, 4]


def check_queries(case: Case) -> None:
    """Sets of queries give the whole call's rows, and gradients that add up to its own."""
    q, k, v = case.inputs
    num_tokens = len(q)
    table = block_table(case.cu_seqlens, num_tokens, case.spec)
    generator = torch.Generator().manual_seed(7)
    bias = torch.randn(num_tokens, case.heads, generator=generator)
    sink = torch.randn(case.heads, generator=generator)
    dout = torch.randn(q.shape, generator=generator)
    dlse = torch.randn(num_tokens, case.heads, generator=generator)
    hashed = token_hash(11, torch.arange(num_tokens) * 7)
    noise = SelectionNoise(11, 0.7)

    def attend(queries: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
        own = slice(None) if queries is None else queries
        with poisoned_memory():
            entries = triton_backend.pool(k, v, table, case.spec)
            keys, mass = triton_backend.rank(
                q[own], entries, table, case.spec, hashed[own], noise, queries
            )
            selected = block_of_key(keys).int().sort(-1).values
            problem = Problem(
                q=q[own],
                k=k,
                v=v,
                bias=bias[own],
                sink=sink,
                selected=selected,
                entries=entries,
                table=table,
                spec=case.spec,
                exact=True,
                coarse=True,
                queries=queries,
            )
            found = triton_backend.attend(problem)
            grads = triton_backend.attend_backward(problem, *found[:2], dout[own], dlse[own])
        return selected, (mass.T, *found), grads

    selected, whole, expected = attend(None)
    mine = torch.arange(num_tokens) // 5 % 3 == 0
    sums: list[Any] = [0, 0, 0]
    for queries in (mine.nonzero()[:, 0], (~mine).nonzero()[:, 0]):
        chosen, found, grads = attend(queries)
        assert torch.equal(chosen, selected[:, queries]), "other blocks were selected"
        for i, (ours, theirs) in enumerate(zip(found, whole, strict=True)):
            close(f"output {i}", ours, theirs[queries], case)
        close("dq", grads[0], expected[0][queries], case)
        close("dbias", grads[3], expected[3][queries], case)
        sums = [a + b for a, b in zip(sums, (grads[1], grads[2], grads[4]), strict=True)]
    for name, ours, theirs in zip(
        ("dk", "dv", "dsink"), sums, (expected[1], expected[2], expected[4]), strict=True
    ):
        close(name, ours, theirs, case)


def check_pool(case: Case) -> None:
    _, k, v = case.inputs
    table = block_table(case.cu_seqlens, len(k), case.spec)
    with poisoned_memory():
        entries = triton_backend.pool(k, v, table, case.spec)
    assert all(x.isfinite().all() for x in entries), "entries of incomplete blocks must be finite"
    blocks = reference.reference_blocks(case.cu_seqlens, case.spec.block_size)
    size, r = case.spec.coarse_block_size, case.spec.entries_per_block
    complete = (blocks.end - blocks.start == case.spec.block_size).repeat_interleave(r)
    mean, var = reference.pooled(k.double(), blocks, case.spec, size)
    value, _ = reference.pooled(v.double(), blocks, case.spec, size)
    for name, ours, theirs in zip(entries._fields, entries, (mean, value, var), strict=True):
        close(name, ours[:, : len(complete)][:, complete], theirs[:, complete], case)


def drawn_logits(case: Case, num_tokens: int) -> Tensor:
    """pool_logits [T, Hk, 2, d]; of tokens of incomplete blocks, which nobody reads, NaN."""
    generator = torch.Generator().manual_seed(23)
    logits = torch.randn(num_tokens, case.kv_heads, 2, case.dim, generator=generator)
    blocks = reference.reference_blocks(case.cu_seqlens, case.spec.block_size)
    alone = (blocks.end - blocks.start < case.spec.block_size)[blocks.of_token]
    return (
        ((40.0 if case.sharp else 1.5) * logits)
        .to(case.dtype)
        .masked_fill(alone.view(-1, 1, 1, 1), torch.nan)
    )


def check_weigh(case: Case) -> None:
    """Learned entries and the gradients of them against the formula in fp64, twice; where weights
    are equal, the bits of the pool.
    """
    _, k, v = case.inputs
    logits = drawn_logits(case, len(k))
    table = block_table(case.cu_seqlens, len(k), case.spec)
    size, r = case.spec.coarse_block_size, case.spec.entries_per_block
    shape = (case.kv_heads, len(table.start) * r, case.dim)
    generator = torch.Generator().manual_seed(29)
    into = CoarseEntries(
        *(torch.randn(shape, generator=generator).to(case.dtype) for _ in CoarseEntries._fields)
    )
    found = []
    for _ in range(2):
        with poisoned_memory():
            entries = triton_backend.weigh(k, v, logits, table, case.spec)
            grads = triton_backend.weigh_backward(k, v, logits, table, case.spec, into)
        found.append((*entries, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "two runs differ"
    with poisoned_memory():
        equal = triton_backend.weigh(k, v, 0.7 + 0 * logits, table, case.spec)
        plain = triton_backend.pool(k, v, table, case.spec)
    for name, ours, theirs in zip(plain._fields, equal, plain, strict=True):
        assert torch.equal(ours, theirs), f"{name} under equal weights is not that of the pool"
    assert all(x.isfinite().all() for x in found[0]), "what incomplete blocks have must be finite"
    if not len(k):
        return

    blocks = reference.reference_blocks(case.cu_seqlens, case.spec.block_size)
    complete = (blocks.end - blocks.start == case.spec.block_size).repeat_interleave(r)
    leaves = [x.double().requires_grad_() for x in (k, v, logits.nan_to_num(0.0))]
    of_key, of_value = leaves[2].unbind(2)
    mean, var = reference.pooled(leaves[0], blocks, case.spec, size, of_key)
    value, _ = reference.pooled(leaves[1], blocks, case.spec, size, of_value)
    expected = [x[:, complete] for x in (mean, value, var)]
    used = [x[:, : len(complete)][:, complete] for x in into]
    for name, ours, theirs in zip(plain._fields, found[0][:3], expected, strict=True):
        close(name, ours[:, : len(complete)][:, complete], theirs, case)
    theirs = torch.autograd.grad(
        expected, leaves, [x.double() for x in used], allow_unused=True, materialize_grads=True
    )
    for name, ours, exact in zip(("dk", "dv", "dlogits"), found[0][3:], theirs, strict=True):
        close(name, ours, exact, case)

    # What a cache makes of the same tokens.
    whole = (blocks.end - blocks.start == case.spec.block_size).nonzero()[:, 0]
    spans = chunked.token_spans(blocks.start[whole], case.spec.block_size)
    keys, values, weights = (x[spans].unflatten(0, (1, -1, size)) for x in (k, v, logits))
    for given, held in ((weights, found[0][:3]), (None, plain)):
        weigh = None if given is None else lambda _, given=given: given
        made = pooled(keys, values, weigh, "triton")
        for ours, theirs in zip(made, held, strict=True):
            theirs = theirs[:, : len(complete)][:, complete].transpose(0, 1)
            assert torch.equal(ours[0], theirs), "a cache has other entries"


def check_learned(case: Case) -> None:
    """The op with learned entries, forward and backward, against plain torch in fp64."""
    logits = drawn_logits(case, sum(case.lengths)).nan_to_num(0.0)
    given = [*case.inputs, logits]
    dout = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(7)).to(case.dtype)

    def run(backend: str, dtype: torch.dtype, selected: Tensor | None) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        with poisoned_memory():
            found = sparse_attention(
                *leaves[:3],
                case.cu_seqlens,
                case.spec,
                pool_logits=leaves[3],
                selected=selected,
                backend=backend,
            )
            grads = torch.autograd.grad(found.out, leaves, dout.to(dtype))
        return found.selected, found.out.detach(), found.lse.detach(), found.tail_mass, *grads

    selected, *ours = run("triton", case.dtype, None)
    assert float(ours[2].max()) > 0.01, "nothing is left to the entries"
    _, *theirs = run("chunked", torch.float64, selected)
    names = ("out", "lse", "tail mass", "dq", "dk", "dv", "dlogits")
    for name, one, other in zip(names, ours, theirs, strict=True):
        close(name, one, other, case)


def check_decode(case: Case) -> None:
    """The last token of each document by decode and by the definition; documents have one
    length.
    """
    (length, *_), rows = case.lengths, len(case.lengths)
    q, k, v = case.inputs
    table = block_table(case.cu_seqlens, len(q), case.spec)
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(len(q), case.heads, generator=generator) if case.bias else None
    sink = torch.randn(case.heads, generator=generator) if case.sink else None
    room = length + 5
    keys, values = (
        torch.full((rows, room, case.kv_heads, case.dim), float("nan"), dtype=case.dtype)
        for _ in range(2)
    )
    keys[:, :length], values[:, :length] = (
        x.view(rows, length, case.kv_heads, case.dim) for x in (k, v)
    )
    last = torch.arange(1, rows + 1) * length - 1
    with poisoned_memory():
        pooled = triton_backend.pool(k, v, table, case.spec)
        per_row = -(-length // case.spec.block_size) * case.spec.entries_per_block
        unused = torch.full((rows, case.kv_heads, 7, case.dim), 1e4, dtype=case.dtype)
        stored = type(pooled)(
            *(
                torch.cat(
                    [x[:, : rows * per_row].unflatten(1, (rows, per_row)).transpose(0, 1), unused],
                    2,
                )
                for x in pooled
            )
        )
        out, lse = triton_backend.decode(
            DecodeProblem(
                q=q[last],
                keys=keys,
                values=values,
                entries=stored,
                length=length,
                spec=case.spec,
                bias=None if bias is None else bias[last],
                sink=sink,
                exact=case.exact,
                coarse=case.coarse,
            )
        )
    theirs = reference.reference_attention(
        q.double(),
        k.double(),
        v.double(),
        case.cu_seqlens,
        case.spec,
        bias=bias,
        sink=sink,
        exact=case.exact,
        coarse=case.coarse,
    )
    nothing = theirs.lse[last].isinf()
    assert torch.equal(nothing, lse.isinf()), "rows without entries differ"
    close("out", out, theirs.out[last], case)
    close("lse", lse.masked_fill(nothing, 0.0), theirs.lse[last].masked_fill(nothing, 0.0), case)


GROUPS: dict[str, tuple[Callable[[Case], None], dict[str, Case]]] = {
    "attend": (check_attend, ATTEND),
    "half": (check_attend, HALF),
    "tma": (check_tma, TMA),
    "ties": (check_ties, {"equal keys": Case((300,), spec=spec(top_k=4))}),
    "rank": (check_rank, RANK),
    "queries": (check_queries, {"two sets": Case((83, 40, 1), 4, 2)}),
    "pool": (
        check_pool,
        {name: case for name, case in RANK.items() if case.spec.rank_lse == "exact"},
    ),
    "weigh": (check_weigh, WEIGH),
    "learned": (check_learned, LEARNED),
    "decode": (check_decode, DECODE),
}


def main(groups: list[str]) -> int:
    failed = False
    for asked in groups:
        group, _, one_in = asked.partition("/")  # attend/2: every second case
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
