"""The Triton backend: tables and lists by torch, the rest by the kernels. Nothing here waits for
the device.

Shape letters: T tokens, H heads, Hk key/value heads, G heads of a group, d head dimension, M
blocks, r entries of a block, K selected blocks, P parts of a sum.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ops.compile.launch import architecture, launch, without_tma
from ops.sparse_attention.blocks import BlockTable, query_tiles
from ops.sparse_attention.chunked import decode_denominator, decode_limits, super_blocks
from ops.sparse_attention.entries import CoarseEntries
from ops.sparse_attention.kernels import configs
from ops.sparse_attention.kernels.backward import (
    delta_kernel,
    entry_grad_kernel,
    entry_grad_sum_kernel,
    key_grad_kernel,
    key_grad_sum_kernel,
    query_grad_kernel,
)
from ops.sparse_attention.kernels.configs import next_power_of_two
from ops.sparse_attention.kernels.decode import (
    decode_attend_kernel,
    decode_combine_kernel,
    decode_score_kernel,
)
from ops.sparse_attention.kernels.forward import attend_kernel
from ops.sparse_attention.kernels.lists import list_kernel, mark_kernel
from ops.sparse_attention.kernels.pool import pool_kernel, weigh_grad_kernel, weigh_kernel
from ops.sparse_attention.kernels.rank import rank_kernel
from ops.sparse_attention.noise import drawing_heads
from ops.sparse_attention.problem import DecodeProblem, Problem
from ops.sparse_attention.ranking import choose_blocks
from ops.sparse_attention.spec import TRUST, SelectionNoise, SparseAttentionSpec

__all__ = [
    "CoarseEntries",
    "attend",
    "attend_backward",
    "decode",
    "pool",
    "pool_groups",
    "rank",
    "weigh",
    "weigh_backward",
]

PART_QUERIES = 2048
"""Queries of one program of the key gradient: a document's first blocks are attended by all of
them.
"""
ENTRY_PROGRAMS = 1024
"""Aim for the number of programs of the entry gradient, several waves of any GPU."""
TAIL_RUNS = 64
"""Programs a row and key/value head of a decoding step that share the coarse entries."""
SCRATCH = 2**28
"""Bytes of partial sums, and elements of selection words, at a time; larger calls go in runs."""
log = logging.getLogger("loadstone")


def pool(k: Tensor, v: Tensor, table: BlockTable, spec: SparseAttentionSpec) -> CoarseEntries:
    """k, v: [T, Hk, d] -> entries [Hk, M * r, d] of every block; of incomplete ones finite and
    unused.
    """
    options = _pool_options(k, spec.entries_per_block, spec.coarse_block_size)
    return _entries(k, v, None, table.start, table.end, options)


def weigh(
    k: Tensor, v: Tensor, pool_logits: Tensor, table: BlockTable, spec: SparseAttentionSpec
) -> CoarseEntries:
    """See interface.Backend.weigh."""
    options = _pool_options(k, spec.entries_per_block, spec.coarse_block_size)
    return _entries(k, v, pool_logits, table.start, table.end, options)


def pool_groups(keys: Tensor, values: Tensor, logits: Tensor | None) -> CoarseEntries:
    """Entries [A, B, Hk, d] of tokens that are at hand, in the dtype of the keys.

    keys, values: [A, B, C, Hk, d], pooled over C, a power of two; logits: [A, B, C, Hk, 2, d];
        None: equal weights.
    """
    rows, groups, size = keys.shape[:3]
    k, v = (x.flatten(0, 2).contiguous() for x in (keys, values))
    bounds = torch.arange(0, len(k) + 1, size, dtype=torch.int32, device=k.device)
    logits = None if logits is None else logits.flatten(0, 2)
    found = _entries(k, v, logits, bounds[:-1], bounds[1:], _pool_options(k, 1, size))
    return CoarseEntries(*(x.unflatten(1, (rows, groups)).permute(1, 2, 0, 3) for x in found))


def _entries(
    k: Tensor,
    v: Tensor,
    logits: Tensor | None,
    start: Tensor,
    end: Tensor,
    options: dict[str, int],
) -> CoarseEntries:
    """[Hk, M * r, d] of blocks [start, end), each [M] int32."""
    _, kv_heads, dim = k.shape
    parts, r = dim // options["CHANNELS"], options["ENTRIES"]
    found = CoarseEntries(*(k.new_empty(kv_heads, len(start) * r, dim) for _ in range(3)))
    rest = start, end, *found, len(start), kv_heads
    if logits is None:
        launch(pool_kernel, (len(start), kv_heads, parts), k, v, *rest, **options)
    else:
        grid = len(start) * r, kv_heads, parts
        launch(weigh_kernel, grid, k, v, logits.contiguous(), *rest, **options)
    return found


def weigh_backward(
    k: Tensor,
    v: Tensor,
    pool_logits: Tensor,
    table: BlockTable,
    spec: SparseAttentionSpec,
    grads: CoarseEntries,
) -> tuple[Tensor, Tensor, Tensor]:
    """See interface.Backend.weigh_backward. The program of an entry writes the rows of its tokens,
    so that equal inputs give equal bits.
    """
    _, kv_heads, dim = k.shape
    num_blocks, r = len(table.start), spec.entries_per_block
    options = _pool_options(k, r, spec.coarse_block_size)
    logits = pool_logits.contiguous()
    dk, dv, dlogits = (torch.empty_like(x) for x in (k, v, logits))
    launch(
        weigh_grad_kernel,
        (num_blocks * r, kv_heads, dim // options["CHANNELS"]),
        k,
        v,
        logits,
        table.start,
        table.end,
        *(x.contiguous() for x in grads),
        dk,
        dv,
        dlogits,
        num_blocks,
        kv_heads,
        **options,
    )
    return dk, dv, dlogits


def _pool_options(k: Tensor, entries_per_block: int, size: int) -> dict[str, int]:
    """Of the kernels of entries, whose tiles are the same, so that sums have one order."""
    dim = k.shape[-1]
    return {
        "ENTRIES": entries_per_block,
        "TOKENS": size,
        "DIM": dim,
        "CHANNELS": configs.pool_channels(dim, size),
        "num_warps": 4,
    }


def rank(
    q: Tensor,
    entries: CoarseEntries,
    table: BlockTable,
    spec: SparseAttentionSpec,
    hashed: Tensor | None,
    noise: SelectionNoise,
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys [Hk, n, top_k] int64 of the best candidates, falling, -1 where there are no more
    (README, Select), and the candidates' estimated mass [Hk, n] fp32, summed over the group.
    hashed: [n] token_hash, None at temperature 0.
    """
    num_tokens = len(table.block_of)
    q = _spread(q, queries, num_tokens)
    hashed = None if hashed is None else _spread(hashed, queries, num_tokens)
    _, num_heads, dim = q.shape
    kv_heads, r = entries.key_mean.shape[0], spec.entries_per_block
    group = num_heads // kv_heads
    config = configs.rank_config(dim, group, spec.block_size, r, q.dtype)

    tiles = _tiles_of(table, num_tokens, config.queries, queries)
    above = super_blocks(entries, table, spec)
    of_tile = None
    if above is not None:
        # a tile lies in one block, and so in one super-block
        of_tile = above.table.block_of[tiles.start.long().clamp_max(num_tokens - 1)]
    keys = torch.empty(kv_heads, num_tokens, spec.top_k, dtype=torch.int64, device=q.device)
    mass = torch.empty(kv_heads, num_tokens, dtype=torch.float32, device=q.device)

    launch(
        rank_kernel,
        (len(tiles[0]), kv_heads),
        q,
        entries.key_mean,
        entries.key_var,
        None if above is None else above.entries.key_mean,
        None if above is None else above.entries.key_var,
        hashed if noise.temperature > 0 else None,
        *tiles,
        of_tile,
        None if above is None else above.table.first,
        table.first,
        table.sink_end,
        table.local_start,
        keys,
        mass,
        num_tokens,
        len(table.start),
        0 if above is None else len(above.table.start),
        kv_heads,
        dim**-0.5,
        spec.max_variance,
        math.log2(spec.coarse_block_size),
        math.log2(spec.super_block_size),
        float(noise.temperature),
        *drawing_heads(noise, kv_heads),
        TRUST,
        GROUP=group,
        QUERIES=config.queries,
        HEADS=config.heads,
        DIM=dim,
        ENTRIES=r,
        BLOCKS=config.columns // r,
        FANOUT=0 if above is None else spec.fanout,
        ORDER=spec.order,
        SCORE=spec.score,
        TOP_K=spec.top_k,
        SLOTS=next_power_of_two(spec.top_k),
        **config.options,
    )
    return (keys, mass) if queries is None else (keys[:, queries], mass[:, queries])


class _Tiles(NamedTuple):
    """Query tiles (blocks.query_tiles)."""

    start: Tensor
    """[tiles] int32, the first token of each."""
    end: Tensor
    """[tiles] int32, the token behind the last of each."""
    block: Tensor
    """[tiles] int32, the block that each lies in."""


def _tiles_of(table: BlockTable, num_tokens: int, tile_size: int, queries: Tensor | None) -> _Tiles:
    """Those of all tokens; of which tiles without any of `queries` [n] are empty."""
    start, end, block = query_tiles(table, num_tokens, tile_size)
    if queries is None:
        return _Tiles(start, end, block)
    count = torch.searchsorted(queries, torch.stack([start, end]).to(queries.dtype))
    return _Tiles(start, torch.where(count[1] > count[0], end, start), block)


def _spread(x: Tensor, queries: Tensor | None, num_tokens: int, fill: float = 0.0) -> Tensor:
    """[n, ...] of `queries` -> [T, ...] of all tokens, `fill` elsewhere, as the kernels find a
    token's rows at its place; the tensor itself where all tokens are queries.
    """
    if queries is None:
        return x
    return x.new_full((num_tokens, *x.shape[1:]), fill).index_copy_(0, queries, x)


def _of_all_tokens(problem: Problem) -> Problem:
    """With a row of q, bias and selected for every token, of which those that are no queries are
    zeros and select nothing.
    """
    queries, num_tokens = problem.queries, len(problem.k)
    if queries is None:
        return problem
    selected = _spread(problem.selected.transpose(0, 1), queries, num_tokens, -1)
    bias = problem.bias
    return problem._replace(
        q=_spread(problem.q, queries, num_tokens),
        bias=None if bias is None else _spread(bias, queries, num_tokens),
        selected=selected.transpose(0, 1).contiguous(),
    )


class _Selection(NamedTuple):
    """What tiles [first_tile, first_tile + num_tiles) selected (kernels/lists.py); None: nothing is
    selected.
    """

    first_tile: int
    num_tiles: int
    list_size: int
    """Room for the blocks of one tile."""
    bits: Tensor | None
    """[Hk, num_tiles, M] int32: bit i of a word is set where query i of the tile selected the
    block.
    """
    blocks: Tensor | None
    """[Hk, num_tiles, list_size] int32, the blocks that any query of the tile selected, rising."""
    words: Tensor | None
    """[Hk, num_tiles, list_size] int32, their words of `bits`."""
    counts: Tensor | None
    """[Hk, num_tiles] int32, how many there are."""


def _tile_runs(
    selected: Tensor, tiles: _Tiles, table: BlockTable, queries: int, uses: bool
) -> Iterator[_Selection]:
    """Yield the selections of runs of tiles, of at most SCRATCH / 2 words of 32 bits each.

    selected: [Hk, T, K].
    """
    kv_heads, num_tokens, top_k = selected.shape
    num_blocks = len(table.start)
    num_tiles = len(tiles.start)
    if not uses:
        yield _Selection(0, num_tiles, 0, None, None, None, None)
        return

    # A tile cannot select more than all of its queries together, nor more blocks than there are.
    list_size = min(queries * top_k, num_blocks)
    step = max(1, SCRATCH // 2 // max(1, kv_heads * num_blocks))
    for first in range(0, num_tiles, step):
        count = min(step, num_tiles - first)

        # The words must start at zero: mark_kernel only sets bits. Lists are written up to their
        # counts and may start as they are.
        bits = torch.zeros(kv_heads, count, num_blocks, dtype=torch.int32, device=selected.device)
        blocks, words = (
            torch.empty(kv_heads, count, list_size, dtype=torch.int32, device=selected.device)
            for _ in range(2)
        )
        counts = torch.empty(kv_heads, count, dtype=torch.int32, device=selected.device)

        launch(
            mark_kernel,
            (count, kv_heads),
            selected,
            tiles.start,
            tiles.end,
            bits,
            num_tokens,
            num_blocks,
            count,
            first,
            QUERIES=queries,
            TOP_K=top_k,
            SLOTS=next_power_of_two(top_k),
            num_warps=4,
        )

        launch(
            list_kernel,
            (count, kv_heads),
            bits,
            tiles.block,
            table.sink_end,
            table.local_start,
            blocks,
            words,
            counts,
            num_blocks,
            count,
            first,
            list_size,
            CHUNK=128,
            num_warps=1,
        )
        yield _Selection(first, count, list_size, bits, blocks, words, counts)


def attend(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [n, H, d], lse [n, H] fp32, tail_mass [n, H] fp32, selected_mass [n, H] fp32)."""
    problem = _of_all_tokens(problem)
    q, k, v, bias, sink, selected, entries, table, spec, exact, coarse, queries = problem
    num_tokens, num_heads, dim = q.shape
    kv_heads, num_blocks = k.shape[1], len(table.start)
    group = num_heads // kv_heads

    config = configs.attend_config(dim, group, spec.block_size, q.dtype, architecture(q.device))
    tiles = _tiles_of(table, num_tokens, config.queries, queries)
    boxes = _boxes(problem, config)

    out = torch.empty_like(q)
    lse, tail_mass, selected_mass = (
        torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device) for _ in range(3)
    )

    # Runs of tiles write different rows of the outputs, so that their order does not matter.
    uses_selected = exact and selected.shape[2] > 0
    for run in _tile_runs(selected, tiles, table, config.queries, uses_selected):
        launch(
            attend_kernel,
            (run.num_tiles, kv_heads),
            q,
            k,
            v,
            *_entry_tensors(entries, coarse),
            *boxes,
            _fp32(bias),
            _fp32(sink),
            run.bits,
            run.blocks,
            run.words,
            run.counts,
            *tiles,
            table.start,
            table.first,
            table.sink_end,
            table.local_start,
            out,
            lse,
            tail_mass,
            selected_mass,
            num_blocks,
            run.num_tiles,
            run.first_tile,
            run.list_size,
            kv_heads,
            dim**-0.5,
            spec.max_variance,
            math.log2(spec.coarse_block_size),
            GROUP=group,
            QUERIES=config.queries,
            HEADS=config.heads,
            COLUMNS=config.columns,
            DIM=dim,
            BLOCK=spec.block_size,
            ENTRIES=spec.entries_per_block,
            ORDER=spec.order,
            EXACT=exact,
            COARSE=coarse,
            SELECTED=uses_selected,
            TMA=boxes[0] is not None,
            **config.options,
        )
    if queries is None:
        return out, lse, tail_mass, selected_mass
    return out[queries], lse[queries], tail_mass[queries], selected_mass[queries]


def attend_backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    pooled: bool = True,
) -> tuple[Tensor | None, ...]:
    """See interface.Backend.attend_backward. Of tokens that are no queries, whose denominator is
    infinite, nothing reaches keys and entries.
    """
    problem = _of_all_tokens(problem)
    q, k, v, bias, sink, selected, entries, table, spec, exact, coarse, queries = problem
    num_tokens, num_heads, dim = q.shape
    own_lse = lse
    out, dout = (_spread(x, queries, num_tokens) for x in (out, dout))
    lse = _spread(lse, queries, num_tokens, math.inf)
    dlse = None if dlse is None else _spread(dlse, queries, num_tokens)
    kv_heads, num_blocks = k.shape[1], len(table.start)
    group = num_heads // kv_heads

    # delta = out . dout - dlse is in every dz, so it is there before anything else.
    delta = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    launch(
        delta_kernel,
        (-(-num_tokens * num_heads // 32),),
        out,
        dout,
        _fp32(dlse),
        delta,
        num_tokens * num_heads,
        ROWS=32,
        DIM=dim,
        num_warps=4,
    )

    config = configs.query_grad_config(dim, group, spec.block_size, q.dtype, architecture(q.device))
    tiles = _tiles_of(table, num_tokens, config.queries, queries)
    boxes = _boxes(problem, config)

    # Every query has a tile and writes its dq; without coarse entries nobody writes dbias.
    dq = torch.empty_like(q)
    dbias = None
    if bias is not None:
        dbias = torch.empty_like(lse) if coarse else torch.zeros_like(lse)
    entry_grads = None

    uses_selected = exact and selected.shape[2] > 0
    for run in _tile_runs(selected, tiles, table, config.queries, uses_selected):
        launch(
            query_grad_kernel,
            (run.num_tiles, kv_heads),
            q,
            k,
            v,
            *_entry_tensors(entries, coarse),
            *boxes,
            _fp32(bias),
            run.bits,
            run.blocks,
            run.words,
            run.counts,
            dout,
            lse,
            delta,
            *tiles,
            table.start,
            table.first,
            table.sink_end,
            table.local_start,
            dq,
            dbias if coarse else None,
            num_blocks,
            run.num_tiles,
            run.first_tile,
            run.list_size,
            kv_heads,
            dim**-0.5,
            spec.max_variance,
            math.log2(spec.coarse_block_size),
            GROUP=group,
            QUERIES=config.queries,
            HEADS=config.heads,
            COLUMNS=config.columns,
            DIM=dim,
            BLOCK=spec.block_size,
            ENTRIES=spec.entries_per_block,
            ORDER=spec.order,
            EXACT=exact,
            COARSE=coarse,
            SELECTED=uses_selected,
            TMA=boxes[0] is not None,
            **config.options,
        )

        # The entries' gradients read the same words of bits, while this run's are at hand.
        if coarse:
            entry_grads = _entry_grads(problem, tiles, run, dout, lse, delta, entry_grads)

    # The tokens' last, as what reached the entries goes on to them where these are their means.
    dk, dv = _key_grads(problem, dout, lse, delta, entry_grads if pooled else None)
    dsink = None
    if sink is not None:
        of_queries = delta if queries is None else delta[queries]
        dsink = -(torch.exp(sink.float() - own_lse) * of_queries).sum(0).to(sink.dtype)
    if bias is not None and dbias is not None:
        dbias = dbias.to(bias.dtype)
    if queries is not None:
        dq, dbias = dq[queries], None if dbias is None else dbias[queries]
    if pooled or entry_grads is None:
        return dq, dk, dv, dbias, dsink
    # order 0 has no variance term, and nothing was written for it
    key, value, var = entry_grads.unbind(0)
    return dq, dk, dv, dbias, dsink, key, value, torch.zeros_like(key) if spec.order == 0 else var


def _boxes(
    problem: Problem, config: configs.Config
) -> tuple[TensorDescriptor, TensorDescriptor] | tuple[None, None]:
    """What the tensor memory accelerator loads tiles of keys and of values by; None where it is not
    to, or cannot, which is said once.
    """
    if not (config.tma and problem.exact):
        return None, None
    k, v = problem.k.flatten(1), problem.v.flatten(1)
    reason = without_tma(architecture(k.device), k, v)
    if reason is not None:
        _announce_pointers(reason)
        return None, None
    tile = [config.columns, problem.k.shape[2]]
    return TensorDescriptor.from_tensor(k, tile), TensorDescriptor.from_tensor(v, tile)


@functools.cache
def _announce_pointers(reason: str) -> None:
    log.info("sparse attention loads its tiles by pointers, not by TMA: %s", reason)


def _entry_tensors(
    entries: CoarseEntries | None, coarse: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if not coarse:
        return None, None, None
    assert entries is not None
    return entries.key_mean, entries.value_mean, entries.key_var


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _parts(counts: Tensor, size: int, num_parts: int) -> tuple[Tensor, Tensor]:
    """Cut items of `counts` elements into parts of at most `size`.

    counts: [..., n] int64 -> item of each part [..., num_parts] int32 (n: unused), first part of
        each item [..., n + 1] int32. num_parts must bound the number of parts; it is known without
        asking the device.
    """
    last = ((counts + size - 1) // size).cumsum(-1)
    part = torch.arange(num_parts, device=counts.device).expand(*counts.shape[:-1], -1).contiguous()
    item = torch.searchsorted(last, part, right=True)
    first = torch.nn.functional.pad(last, (1, 0))
    return item.int(), first.int()


def _entry_grads(
    problem: Problem,
    tiles: _Tiles,
    run: _Selection,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    grads: Tensor | None,
) -> Tensor:
    """[3, Hk, M * r, d] fp32, gradients of key mean, value mean and variance by the tiles of a run;
    added to `grads`.
    """
    q, entries, table, spec = problem.q, problem.entries, problem.table, problem.spec
    assert entries is not None
    num_heads, dim = q.shape[1:]
    kv_heads, num_entries, _ = entries.key_mean.shape
    num_blocks, r = len(table.start), spec.entries_per_block
    group = num_heads // kv_heads

    config = configs.entry_grad_config(dim, group, spec.block_size, q.dtype)
    tile_size = configs.query_grad_config(
        dim, group, spec.block_size, q.dtype, architecture(q.device)
    ).queries

    # A part is a chunk of entries by at most `size` tiles. No chunk has more than all tiles of the
    # run, which bounds the parts without asking the device.
    num_chunks = -(-num_entries // config.columns)
    size = max(32, num_chunks * run.num_tiles * kv_heads // ENTRY_PROGRAMS)
    num_parts = num_chunks + num_chunks * run.num_tiles // size

    # Tiles that have entries of a chunk in their tail lie behind the windows of its first block, in
    # its last document.
    chunk = torch.arange(num_chunks, device=q.device)
    begin = chunk * config.columns // r + (spec.num_local_blocks if problem.exact else 1)
    last = (((chunk + 1) * config.columns - 1) // r).clamp_max(num_blocks - 1)
    starts = torch.nn.functional.pad(table.start, (0, 1), value=len(q))
    limits = torch.stack([starts[begin.clamp_max(num_blocks)], table.doc_end[last]])
    low, high = (
        torch.searchsorted(tiles.start, limits)
        .clamp(run.first_tile, run.first_tile + run.num_tiles)
        .unbind()
    )
    part_chunk, first_part = _parts((high - low).clamp_min(0), size, num_parts)

    partial = torch.empty(
        kv_heads, num_parts, 3, config.columns, dim, dtype=torch.float32, device=q.device
    )
    launch(
        entry_grad_kernel,
        (num_parts, kv_heads),
        q,
        *entries,
        _fp32(problem.bias),
        run.bits,
        dout,
        lse,
        delta,
        *tiles,
        table.first,
        table.sink_end,
        table.local_start,
        part_chunk,
        first_part,
        low.int(),
        high.int(),
        partial,
        num_blocks,
        num_chunks,
        num_parts,
        run.num_tiles,
        run.first_tile,
        size,
        kv_heads,
        dim**-0.5,
        spec.max_variance,
        math.log2(spec.coarse_block_size),
        GROUP=group,
        TILE=tile_size,
        QUERIES=config.queries,
        HEADS=config.heads,
        COLUMNS=config.columns,
        DIM=dim,
        ENTRIES=r,
        ORDER=spec.order,
        EXACT=problem.exact,
        SELECTED=run.bits is not None,
        **config.options,
    )

    # Sums in the order of the parts: no atomics, equal inputs give equal bits.
    add = grads is not None
    if grads is None:
        grads = torch.empty(3, kv_heads, num_entries, dim, dtype=torch.float32, device=q.device)
    launch(
        entry_grad_sum_kernel,
        (num_chunks, kv_heads, 3 if spec.order == 2 else 2),
        partial,
        first_part,
        grads,
        num_entries,
        num_parts,
        kv_heads,
        dim**-0.5,
        COLUMNS=config.columns,
        DIM=dim,
        ORDER=spec.order,
        ADD=add,
        num_warps=4,
    )
    return grads


def _key_grads(
    problem: Problem, dout: Tensor, lse: Tensor, delta: Tensor, entry_grads: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dk, dv: [T, Hk, d]: of the tokens' own logits, and of the entries they are pooled in."""
    q, k, v, _, _, selected, entries, table, spec, exact, *_ = problem
    num_tokens, num_heads, dim = q.shape
    kv_heads = k.shape[1]
    num_blocks = len(table.start)
    group = num_heads // kv_heads
    top_k = selected.shape[2]
    config = configs.key_grad_config(dim, group, spec.block_size, q.dtype)
    columns, block_size = config.columns, spec.block_size
    boxes = _boxes(problem, config)

    dk, dv = torch.empty_like(k), torch.empty_like(v)

    num_parts, first_part = 1, None
    if exact:
        # Every query attends to its window and the first blocks, or to its whole short document,
        # and to what it selected.
        dense = min(num_blocks, -(-spec.min_sparse_length // block_size))
        most = max(dense, spec.num_local_blocks + spec.num_sink_blocks) + top_k
        num_parts = num_blocks + num_tokens * most // PART_QUERIES

        # A block's queries are of two kinds: a run of tokens that attend to it without being asked,
        # and those that selected it, which a stable sort puts in rising order.
        block = torch.arange(num_blocks, device=q.device, dtype=torch.int32)
        starts = torch.nn.functional.pad(table.start, (0, 1), value=num_tokens)
        # first token whose window is later
        beyond = starts[torch.searchsorted(table.local_start, block, right=True)]
        in_window = torch.minimum(beyond, table.doc_end)
        is_sink = block < table.first + spec.num_sink_blocks
        forced = torch.where(is_sink, table.doc_end, in_window) - table.start
        chosen = torch.where(selected < 0, num_blocks, selected).reshape(kv_heads, -1)
        chosen, order = torch.sort(chosen, dim=1, stable=True)
        chosen_by = (order // max(1, top_k)).int()
        bounds = torch.arange(num_blocks + 1, device=q.device, dtype=chosen.dtype)
        bounds = bounds.expand(kv_heads, -1).contiguous()
        chosen_from = torch.searchsorted(chosen, bounds)

        part_block, first_part = _parts(forced + chosen_from.diff(dim=1), PART_QUERIES, num_parts)
        chosen_from = chosen_from.int()

    # Key/value heads go in steps, as the partial sums of all at once may be too large.
    step = min(kv_heads, max(1, SCRATCH // max(1, num_parts * 2 * block_size * dim * 4)))
    for first_head in range(0, kv_heads, step):
        heads = min(step, kv_heads - first_head)
        partial = None
        if exact:
            partial = torch.empty(
                heads, num_parts, 2, block_size, dim, dtype=torch.float32, device=q.device
            )

            launch(
                key_grad_kernel,
                (num_parts * (block_size // columns), heads),
                q,
                k,
                v,
                dout,
                lse,
                delta,
                chosen_by,
                chosen_from,
                forced,
                table.start,
                table.end,
                part_block,
                first_part,
                *boxes,
                partial,
                num_tokens,
                num_blocks,
                num_parts,
                first_head,
                kv_heads,
                chosen_by.shape[1],
                PART_QUERIES,
                dim**-0.5,
                GROUP=group,
                QUERIES=config.queries,
                HEADS=config.heads,
                COLUMNS=columns,
                DIM=dim,
                BLOCK=block_size,
                TMA=boxes[0] is not None,
                **config.options,
            )

        launch(
            key_grad_sum_kernel,
            (num_blocks * (block_size // columns), heads),
            partial,
            first_part,
            k,
            None if entries is None else entries.key_mean,
            entry_grads,
            table.start,
            table.end,
            dk,
            dv,
            num_blocks,
            num_parts,
            first_head,
            kv_heads,
            0 if entry_grads is None else entry_grads.stride(0),
            dim**-0.5,
            TOKENS=spec.coarse_block_size,
            DIM=dim,
            BLOCK=block_size,
            COLUMNS=columns,
            ENTRIES=spec.entries_per_block,
            ORDER=spec.order,
            EXACT=exact,
            COARSE=entry_grads is not None,
            num_warps=8,
        )
    return dk, dv


def decode(problem: DecodeProblem) -> tuple[Tensor, Tensor]:
    """See interface.decode. Parts of the softmax are separate programs: each exact block, and runs
    of entries.
    """
    q, keys, values, entries, length, spec, bias, sink, exact, coarse, selected = problem
    num_rows, num_heads, dim = q.shape
    kv_heads = keys.shape[2]
    r = spec.entries_per_block
    block_size = spec.block_size
    group = num_heads // kv_heads
    own, sink_end, local = decode_limits(length, spec)
    low, high = (sink_end, local) if exact else (0, own)
    config = configs.decode_config(dim, group, block_size, q.dtype)

    # The length is one for all rows and known on the host, so that the forced blocks are too.
    num_entries = own * r
    num_runs, run_size = 0, 1
    blocks = [torch.arange(0, device=q.device)]
    if exact:
        blocks = [
            torch.arange(sink_end, device=q.device),
            torch.arange(local, own + 1, device=q.device),
        ]
    exact_blocks = torch.cat(blocks).int().expand(num_rows, kv_heads, -1)

    # Column `own` takes what selected no block; no entry reads it.
    excluded = torch.zeros(num_rows, kv_heads, own + 1, dtype=torch.int8, device=q.device)
    logits = None

    # Logits of all entries are written once: the choice reads them, and then the tail.
    if low < high:
        logits = torch.empty(num_rows, num_heads, num_entries, dtype=torch.float32, device=q.device)
        kappa = torch.empty_like(logits) if spec.order == 2 else None
        launch(
            decode_score_kernel,
            (-(-num_entries // 64), kv_heads, num_rows),
            q,
            entries.key_mean,
            entries.key_var,
            logits,
            kappa,
            num_entries,
            kv_heads,
            *entries.key_mean.stride()[:2],
            dim**-0.5,
            spec.max_variance,
            math.log(spec.coarse_block_size),
            GROUP=group,
            HEADS=config.heads,
            COLUMNS=64,
            DIM=dim,
            ORDER=spec.order,
            num_warps=config.num_warps,
        )

        if exact and spec.top_k:
            heads = (kv_heads, group)
            if selected is None:
                by_group = logits.unflatten(1, heads)
                denominator = None
                if spec.rank_lse == "super":
                    rows = q.float().unflatten(1, heads)
                    denominator = decode_denominator(rows, entries, by_group, own, spec)
                chosen = choose_blocks(
                    by_group,
                    None if kappa is None else kappa.unflatten(1, heads),
                    torch.arange(own, device=q.device),
                    low,
                    high,
                    spec,
                    denominator,
                )
            else:
                chosen = selected.long()
            exact_blocks = torch.cat([exact_blocks, chosen.int()], -1)
            excluded.scatter_(2, torch.where(chosen < 0, own, chosen), 1)

        if spec.has_tail(exact, coarse):
            run_size = -(-(high - low) * r // TAIL_RUNS // 64) * 64
            num_runs = -(-(high - low) * r // run_size)

    exact_blocks = exact_blocks.contiguous()
    num_exact = exact_blocks.shape[-1]
    num_parts = num_exact + num_runs
    peak, mass = (
        torch.empty(num_rows, num_heads, num_parts, dtype=torch.float32, device=q.device)
        for _ in range(2)
    )
    acc = torch.empty(num_rows, num_heads, num_parts, dim, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    lse = torch.empty(num_rows, num_heads, dtype=torch.float32, device=q.device)

    launch(
        decode_attend_kernel,
        (num_parts, kv_heads, num_rows),
        q,
        keys,
        values,
        entries.value_mean,
        logits,
        _fp32(bias),
        exact_blocks,
        excluded,
        peak,
        mass,
        acc,
        length,
        num_exact,
        num_parts,
        own + 1,
        num_entries,
        low * r,
        high * r,
        run_size,
        kv_heads,
        *keys.stride()[:3],
        *entries.value_mean.stride()[:2],
        dim**-0.5,
        GROUP=group,
        HEADS=config.heads,
        COLUMNS=config.columns,
        RUN=64,
        DIM=dim,
        BLOCK=block_size,
        ENTRIES=r,
        **config.options,
    )

    # The parts' softmaxes have peaks of their own; they are brought to one in the order of the
    # parts.
    launch(
        decode_combine_kernel,
        (num_rows * num_heads,),
        peak,
        mass,
        acc,
        _fp32(sink),
        out,
        lse,
        num_parts,
        num_heads,
        DIM=dim,
        num_warps=2,
    )
    return out, lse
