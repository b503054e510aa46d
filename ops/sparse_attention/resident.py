"""A bounded cache: which blocks' tokens stay, by a rule that is the same in training and decoding.

Entries of all complete blocks are kept; tokens of the first blocks, of the window, of the blocks
that began since the last boundary, and of a pool of `resident_blocks`. At every boundary of
`resident_interval` tokens of a document the pool is filled anew, from what is there: the blocks
that earlier queries gave most of their estimated mass. What is not resident is no candidate, and
stays in the softmax through its entries. Plain torch, on any device.

Shape letters: T tokens, H heads, Hk key/value heads, G = H / Hk, d head dimension, N rows, M blocks
of a document, r entries of a block, K selected blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ops.sparse_attention.chunked import real_dtype
from ops.sparse_attention.entries import CoarseEntries
from ops.sparse_attention.ranking import block_of_key, rank_keys, rank_values
from ops.sparse_attention.spec import SMALLEST, SparseAttentionSpec


class Residence(NamedTuple):
    """Of a document after its last token, for the queries that follow."""

    resident: Tensor
    """[..., Hk, M] bool: blocks of the pool, as the last boundary left it."""
    mass: Tensor
    """[..., Hk, M] fp32: what queries gave the blocks, those of older intervals counting less."""


def new_residence(shape: Sequence[int], device: torch.device) -> Residence:
    """Of an empty document; shape: [..., Hk, M]."""
    return Residence(
        torch.zeros(tuple(shape), dtype=torch.bool, device=device),
        torch.zeros(tuple(shape), dtype=torch.float32, device=device),
    )


def cross_boundary(past: Residence, boundary: int, spec: SparseAttentionSpec) -> Residence:
    """The pool for queries from block `boundary` on, a multiple of an interval's blocks: of the
    blocks that it held and of those that began since the boundary before, the resident_blocks with
    the largest mass, equal ones from the lower number on.
    """
    assert spec.resident_blocks is not None
    block = torch.arange(past.mass.shape[-1], device=past.mass.device)
    began = (block >= boundary - spec.interval_blocks) & (block < boundary)
    held = (past.resident | began) & (block >= spec.num_sink_blocks)
    # the logarithm orders as the mass does, and its smallest values have no ties with nothing
    keys = rank_keys(past.mass.clamp_min(SMALLEST).log(), block.expand_as(past.mass))
    keys = keys.masked_fill(~held, -1)
    best = block_of_key(keys.topk(min(spec.resident_blocks, keys.shape[-1]), -1).values)
    taken = held.new_zeros((*held.shape[:-1], held.shape[-1] + 1))
    taken.scatter_(-1, torch.where(best < 0, held.shape[-1], best), True)
    return Residence(taken[..., :-1], past.mass * spec.resident_decay)


def candidates_of(resident: Tensor, own: Tensor, spec: SparseAttentionSpec) -> Tensor:
    """[..., Hk, M] bool: what queries of block `own` may choose. resident: the pool there; own:
    int64, [] or [..., 1, 1].
    """
    block = torch.arange(resident.shape[-1], device=resident.device)
    local = (own - spec.num_local_blocks + 1).clamp_min(0)
    since = own // spec.interval_blocks * spec.interval_blocks
    among = (block >= local.clamp_max(spec.num_sink_blocks)) & (block < local)
    return (resident | (block >= since)) & among


def kept_blocks(resident: Tensor, own: Tensor, spec: SparseAttentionSpec) -> Tensor:
    """[..., Hk, M] bool: blocks whose tokens queries from block `own` on may see. resident, own: as
    candidates_of takes them.
    """
    block = torch.arange(resident.shape[-1], device=resident.device)
    since = own // spec.interval_blocks * spec.interval_blocks
    near = own - spec.num_local_blocks + 1
    forced = (block < spec.num_sink_blocks) | (block >= torch.minimum(near, since))
    return (resident | forced) & (block <= own)


def rank_past(
    q: Tensor, entries: CoarseEntries, spec: SparseAttentionSpec, there: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rank value and estimated mass [..., M] of the past blocks of queries of one block.

    q: [..., G, d]; entries: [..., M * r, d] each. there: [..., M * r] bool, those of the past,
        where rows differ in it; None: all. A block that is not there has no mass.
    """
    scale = q.shape[-1] ** -0.5
    mean, _, var = entries
    z = torch.matmul(q, mean.transpose(-1, -2)) * scale + math.log(spec.coarse_block_size)
    kappa = None
    if spec.order == 2:
        kappa = torch.matmul(q.square() * (0.5 * scale**2), var.transpose(-1, -2))
        kappa = kappa.clamp_(max=spec.max_variance)
        z = z + kappa
    if there is not None:
        z = z.masked_fill(~there, float("-inf"))
    probs = z.softmax(-1)
    return rank_values(z, kappa, probs if there is None else probs.nan_to_num(0.0), spec)


def best_blocks(values: Tensor, candidates: Tensor, spec: SparseAttentionSpec) -> Tensor:
    """[..., top_k] int64, rising, then -1."""
    block = torch.arange(values.shape[-1], device=values.device)
    keys = rank_keys(values, block.expand_as(values)).masked_fill(~candidates, -1)
    chosen = block_of_key(keys.topk(min(spec.top_k, keys.shape[-1]), -1).values)
    far = torch.iinfo(torch.int64).max
    rising = torch.where(chosen < 0, far, chosen).sort(-1).values
    missing = rising.new_full((*rising.shape[:-1], spec.top_k - rising.shape[-1]), far)
    rising = torch.cat((rising, missing), -1)
    return torch.where(rising == far, -1, rising)


class Kept(NamedTuple):
    """What select_resident finds."""

    selected: Tensor
    """[Hk, T, top_k] int32 as sparse_attention takes it."""
    candidates: Tensor | None
    """[Hk, T, n] int32 block ids, -1 for none: all that a query could have selected."""
    left: list[Residence]
    """Of every document, as it is behind its last token."""


@torch.no_grad()
def select_resident(
    q: Tensor,
    entries: CoarseEntries,
    bounds: Sequence[int],
    spec: SparseAttentionSpec,
    lists: bool = False,
) -> Kept:
    """The blocks that queries select among the resident ones of packed documents.

    Args:
        q: [T, H, d]; entries: [Hk, M * r, d] each, of all documents' blocks (interface.
            pool_entries). bounds: where documents begin, and T. lists: find the candidates, too.
    """
    real, kv_heads, r = real_dtype(q.dtype), entries.key_mean.shape[0], spec.entries_per_block
    longest = max((e - b for b, e in itertools.pairwise(bounds)), default=0)
    most = min(spec.resident_slots, -(-longest // spec.block_size)) if lists else 0
    selected = q.new_full((kv_heads, len(q), spec.top_k), -1, dtype=torch.int32)
    could = q.new_full((kv_heads, len(q), most), -1, dtype=torch.int32)
    left, first_block = [], 0
    for begin, end in itertools.pairwise(bounds):
        number = -(-(end - begin) // spec.block_size)
        state = new_residence((kv_heads, number), q.device)
        # A block at a time: its queries have the same past, and one pool.
        for own in range(number):
            if own and own % spec.interval_blocks == 0:
                state = cross_boundary(state, own, spec)
            if own == 0:
                continue
            start = begin + own * spec.block_size
            rows = slice(start, min(start + spec.block_size, end))
            queries = q[rows].to(real).unflatten(1, (kv_heads, -1)).transpose(0, 1)
            at = slice(first_block * r, (first_block + own) * r)
            past = CoarseEntries(*(x[:, None, at].to(real) for x in entries))
            values, mass = rank_past(queries, past, spec)
            here = torch.full((), own, device=q.device)
            among = candidates_of(state.resident, here, spec)[:, :own]
            chosen = best_blocks(values, among.unsqueeze(1).expand_as(values), spec)
            selected[:, rows] = torch.where(chosen < 0, -1, chosen + first_block).int()
            if lists:
                ids = torch.where(among, torch.arange(own, device=q.device), number)
                ids = ids.sort(-1).values[:, :most]
                ids = torch.where(ids == number, -1, ids + first_block)
                could[:, rows, : ids.shape[-1]] = ids.unsqueeze(1).int()
            state.mass[:, :own] += mass.sum(1)
        left.append(state)
        first_block += number
    return Kept(selected, could if lists else None, left)
