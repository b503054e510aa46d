"""Starts the kernels. Nothing here waits for the device.

Shape letters: as in problem.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ops.compile.launch import launch
from ops.gather_attention.kernels import configs
from ops.gather_attention.kernels.backward import (
    gather_key_grad_kernel,
    gather_query_grad_kernel,
    mark_rows_kernel,
)
from ops.gather_attention.kernels.forward import gather_attend_kernel, gather_masses_kernel
from ops.gather_attention.kernels.listed import join_parts_kernel, listed_part_kernel
from ops.gather_attention.problem import Gather, Lookup
from ops.sparse_attention.kernels.backward import delta_kernel
from ops.sparse_attention.kernels.configs import next_power_of_two
from ops.sparse_attention.kernels.lists import list_kernel

PART_QUERIES = 4096
"""Queries of a row for each part that a tile of keys is cut into, up to MOST_PARTS: some rows are
seen by all later queries, and one program would take long for them.
"""
MOST_PARTS = 8
SCRATCH = 2**28
"""Bytes of words, and of partial sums, at a time; larger calls go in runs of tiles of keys, or of
queries of decoding.
"""
PART_ROWS = 256
"""Rows of a list that a program takes in decoding. It hangs on nothing, so that neither do the bits
of a query on the others.
"""


class Grads(NamedTuple):
    """Each in the dtype of what it is the gradient of."""

    dq: Tensor
    """[T, H, d]."""
    dk: Tensor
    """[N, Hk, d]; where keys are values, both shares."""
    dv: Tensor | None
    """[N, Hk, d]; None where keys are values."""
    dsink: Tensor | None
    """[H]; None without sinks."""


def _counts(problem: Gather, start: int, stop: int) -> Tensor:
    """How many spans each of the queries [start, stop) sees: [C, stop - start] int32."""
    if problem.chosen is not None:
        return (problem.chosen[:, start:stop] >= 0).sum(-1, dtype=torch.int32)
    if problem.first is None:
        return problem.base.new_zeros((1, stop - start))
    return problem.first[start:stop].unsqueeze(0)


class _Shape(NamedTuple):
    num_tokens: int
    kv_heads: int
    group: int
    dim: int
    choices: int
    list_size: int
    """Spans that a query may choose."""

    @property
    def by_head(self) -> bool:
        """Whether every key/value head has its own choice."""
        return self.choices > 1


def _shape(problem: Gather) -> _Shape:
    num_tokens, num_heads, dim = problem.q.shape
    kv_heads = problem.k.shape[1]
    choices, list_size = 1, 0
    if problem.chosen is not None:
        choices, _, list_size = problem.chosen.shape
    return _Shape(num_tokens, kv_heads, num_heads // kv_heads, dim, choices, list_size)


def attend(problem: Gather, out: Tensor, lse: Tensor, start: int, stop: int) -> None:
    """Write out [T, H, d] and lse [T, H] fp32 of the queries [start, stop)."""
    shape = _shape(problem)
    num_tokens, kv_heads, group, dim, _, list_size = shape
    config = configs.attend_config(dim, group, problem.q.dtype)
    launch(
        gather_attend_kernel,
        (stop - start, kv_heads, -(-group // config.rows)),
        problem.q,
        problem.k,
        problem.v,
        problem.chosen,
        _counts(problem, start, stop),
        problem.base,
        problem.window_start,
        None if problem.sink is None else problem.sink.float(),
        out,
        lse,
        start,
        num_tokens,
        list_size,
        problem.own_row,
        kv_heads,
        dim**-0.5,
        GROUP=group,
        HEADS=config.rows,
        COLUMNS=config.columns,
        DIM=dim,
        SPAN=problem.span,
        BY_HEAD=shape.by_head,
        **config.options,
    )


def masses(problem: Gather, lse: Tensor, start: int, stop: int) -> Tensor:
    """[C, stop - start, K] fp32: what the softmax of the queries [start, stop) gave to every span
    that they chose, summed over the heads that share the choice; 0 where there is none.
    """
    shape = _shape(problem)
    num_tokens, kv_heads, group, dim, choices, list_size = shape
    config = configs.masses_config(dim, group, problem.q.dtype)
    found = torch.zeros(
        choices, stop - start, list_size, dtype=torch.float32, device=problem.q.device
    )
    launch(
        gather_masses_kernel,
        (stop - start, choices),
        problem.q,
        problem.k,
        problem.chosen,
        _counts(problem, start, stop),
        problem.base,
        lse,
        found,
        start,
        num_tokens,
        list_size,
        problem.own_row,
        kv_heads,
        dim**-0.5,
        GROUP=group,
        HEADS=config.rows,
        COLUMNS=config.columns,
        DIM=dim,
        SPAN=problem.span,
        BY_HEAD=shape.by_head,
        **config.options,
    )
    return found


def attend_backward(problem: Gather, out: Tensor, lse: Tensor, dout: Tensor) -> Grads:
    """Gradients of all inputs; equal inputs give equal bits. out, dout: [T, H, d]; lse: [T, H]."""
    shape = _shape(problem)
    num_tokens, kv_heads, group, dim, _, list_size = shape
    delta = torch.empty_like(lse)
    launch(
        delta_kernel,
        (-(-lse.numel() // 32),),
        out,
        dout,
        None,
        delta,
        lse.numel(),
        ROWS=32,
        DIM=dim,
        num_warps=4,
    )

    config = configs.query_grad_config(dim, group, problem.q.dtype)
    counts = _counts(problem, 0, num_tokens)
    dq = torch.empty_like(problem.q)
    launch(
        gather_query_grad_kernel,
        (num_tokens, kv_heads, -(-group // config.rows)),
        problem.q,
        problem.k,
        problem.v,
        problem.chosen,
        counts,
        problem.base,
        problem.window_start,
        dout,
        lse,
        delta,
        dq,
        num_tokens,
        list_size,
        problem.own_row,
        kv_heads,
        dim**-0.5,
        GROUP=group,
        HEADS=config.rows,
        COLUMNS=config.columns,
        DIM=dim,
        SPAN=problem.span,
        BY_HEAD=shape.by_head,
        **config.options,
    )

    dk, dv = _key_grads(problem, counts, lse, dout, delta)
    dsink = None
    if problem.sink is not None:
        sunk = (problem.sink.float() - lse).exp()
        dsink = -(sunk * delta).sum(0).to(problem.sink.dtype)
    return Grads(dq, dk, dv, dsink)


class _Limits(NamedTuple):
    """Which queries may see any row of a tile of keys, [tiles] int32 each: from, and up to."""

    low: Tensor
    high: Tensor


def _limits(problem: Gather, tile_size: int) -> _Limits:
    """Bounds are not tight: they are what the order of documents says."""
    num_rows, num_tokens = len(problem.k), len(problem.q)
    first = torch.arange(0, num_rows, tile_size, device=problem.q.device, dtype=torch.int32)
    last = (first + tile_size - 1).clamp_max(num_rows - 1)

    def queries(starts: Tensor, rows: Tensor) -> Tensor:
        """How many queries there are whose `starts`, which rise, are not beyond each of `rows`."""
        return torch.searchsorted(starts, rows, right=True, out_int32=True)

    # Spans are of the query's document: those that begin in it or before, but not earlier than the
    # first query of the document that the tile's first row is in.
    high = queries(problem.base, last)
    document = problem.base[(queries(problem.base, first) - 1).clamp_min(0).long()]
    low = torch.searchsorted(problem.base, document, out_int32=True)
    if problem.own_row or (problem.chosen is None and problem.first is None):
        # Tokens come after everything that can be chosen, and are seen in windows alone.
        low = torch.where(first < problem.own_row, low, num_tokens)
        high = torch.where(first < problem.own_row, high, 0)
    if problem.window_start is not None:
        in_window = last >= problem.own_row
        own = (first - problem.own_row).clamp(0, num_tokens)
        beyond = queries(problem.window_start, last)
        low = torch.where(in_window, torch.minimum(low, own), low)
        high = torch.where(in_window, torch.maximum(high, beyond), high)
    return _Limits(low, high)


def _key_grads(
    problem: Gather, counts: Tensor, lse: Tensor, dout: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor | None]:
    shape = _shape(problem)
    num_tokens, kv_heads, group, dim, choices, list_size = shape
    num_rows, device = len(problem.k), problem.q.device
    config = configs.key_grad_config(dim, problem.q.dtype)
    limits = _limits(problem, config.columns)
    tiles = torch.arange(len(limits.low), device=device, dtype=torch.int32)
    shares = 1 if problem.v is None else 2
    grads = torch.empty(shares, num_rows, kv_heads, dim, dtype=problem.k.dtype, device=device)

    # Lists have room for all queries; so many tiles go at a time as have room themselves.
    num_parts = max(1, min(MOST_PARTS, -(-num_tokens // PART_QUERIES)))
    words = 3 * choices * num_tokens
    sums = shares * kv_heads * num_parts * config.columns * dim
    run = max(1, SCRATCH // (4 * max(words, sums, 1)))
    for first in range(0, len(tiles), run):
        number = min(run, len(tiles) - first)
        bits = torch.zeros(choices, number, num_tokens, dtype=torch.int32, device=device)
        launch(
            mark_rows_kernel,
            (num_tokens, choices),
            problem.chosen,
            counts,
            problem.base,
            problem.window_start,
            bits,
            num_tokens,
            list_size,
            problem.own_row,
            first,
            number,
            COLUMNS=128,
            SPAN=problem.span,
            ROWS=config.columns,
            num_warps=4,
        )

        # Its blocks are queries here, and its tiles of queries are tiles of keys.
        queries, seen = torch.empty_like(bits), torch.empty_like(bits)
        seeing = torch.empty(choices, number, dtype=torch.int32, device=device)
        launch(
            list_kernel,
            (number, choices),
            bits,
            tiles,
            limits.low,
            limits.high,
            queries,
            seen,
            seeing,
            num_tokens,
            number,
            first,
            num_tokens,
            CHUNK=128,
            num_warps=1,
        )

        partial = torch.empty(
            *(shares, kv_heads, number, num_parts, config.columns, dim),
            dtype=torch.float32,
            device=device,
        )
        launch(
            gather_key_grad_kernel,
            (number * num_parts, kv_heads),
            problem.q,
            problem.k,
            problem.v,
            dout,
            lse,
            delta,
            queries,
            seen,
            seeing,
            partial,
            num_rows,
            first,
            number,
            num_parts,
            num_tokens,
            kv_heads,
            dim**-0.5,
            GROUP=group,
            HEADS=next_power_of_two(group),
            ROWS=config.rows,
            COLUMNS=config.columns,
            DIM=dim,
            BY_HEAD=shape.by_head,
            **config.options,
        )
        rows = slice(first * config.columns, min((first + number) * config.columns, num_rows))
        summed = partial.sum(3).flatten(2, 3)[:, :, : rows.stop - rows.start]
        grads[:, rows] = summed.transpose(1, 2).to(grads.dtype)
    return grads[0], grads[1] if shares == 2 else None


def look_up(problem: Lookup) -> Tensor:
    """[T, H, d] in the dtype of q; equal inputs give equal bits, whatever other queries there
    are.
    """
    q, sources, sink = problem
    num_tokens, num_heads, dim = q.shape
    out = torch.empty_like(q)
    parts = [-(-source.rows.shape[2] // PART_ROWS) for source in sources]
    run = max(1, SCRATCH // (4 * num_heads * dim * max(1, sum(parts))))
    for start in range(0, num_tokens, run):
        number = min(run, num_tokens - start)
        acc = torch.empty(
            *(sum(parts), number, num_heads, dim), dtype=torch.float32, device=q.device
        )
        peak, mass = torch.empty_like(acc[..., 0]), torch.empty_like(acc[..., 0])
        first_part = 0
        for source, num_parts in zip(sources, parts, strict=True):
            kv_heads = source.k.shape[1]
            group = num_heads // kv_heads
            config = configs.attend_config(dim, group, q.dtype)
            launch(
                listed_part_kernel,
                (number, kv_heads * -(-group // config.rows), num_parts),
                q,
                source.k,
                source.v,
                source.rows,
                acc,
                peak,
                mass,
                start,
                num_tokens,
                source.rows.shape[2],
                first_part,
                kv_heads,
                dim**-0.5,
                GROUP=group,
                HEADS=config.rows,
                COLUMNS=config.columns,
                DIM=dim,
                PART=PART_ROWS,
                BY_HEAD=len(source.rows) > 1,
                **config.options,
            )
            first_part += num_parts
        rows = max(1, 2048 // dim)
        launch(
            join_parts_kernel,
            (-(-number * num_heads // rows),),
            acc,
            peak,
            mass,
            None if sink is None else sink.float(),
            out[start : start + number],
            number * num_heads,
            sum(parts),
            num_heads,
            ROWS=rows,
            DIM=dim,
            num_warps=4,
        )
    return out
