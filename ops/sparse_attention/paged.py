"""Decoding from pages: rows of different lengths, whose blocks lie anywhere in one pool.

Shape letters: N rows, H heads, Hk key/value heads, G = H / Hk, d head dimension, P pages of a row,
r entries of a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ops.sparse_attention.chunked import real_dtype, super_logits
from ops.sparse_attention.entries import CoarseEntries
from ops.sparse_attention.hierarchy import decode_in_two_levels
from ops.sparse_attention.problem import DecodeProblem
from ops.sparse_attention.ranking import (
    block_of_key,
    rank_keys,
    rank_values,
    shares,
    until_covered,
)
from ops.sparse_attention.spec import SparseAttentionSpec

_NEVER = float("-inf")


@torch.no_grad()
def decode_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    entries: CoarseEntries,
    pages: Tensor,
    lengths: Tensor,
    spec: SparseAttentionSpec,
    *,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    selected: Tensor | None = None,
    places: Tensor | None = None,
    exact: bool = True,
    coarse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of one token a row to its document's pages; for every row what decode gives for its
    length. Only entries and the blocks that are looked at are read, and no length visits the host
    (except with num_levels=2).

    Args:
        q: [N, H, d], token number lengths[n] (from 1) of row n. keys, values: [pages, block_size,
            Hk, d], the pool. entries: [pages, Hk, r, d], valid for full pages: EntryPages.entries.
            pages: [N, P] int64, block b of row n is page pages[n, b]; what lies behind the row's
            last block is not looked at. lengths: [N] int64, at least 1. bias: [N, H]; sink: [H].
            selected: [N, Hk, K] as decode takes it. places: [N, Hk, P] int64, pages of keys and
            values where these are others than those of the entries; None: `pages`. exact, coarse:
            branches that take part.

    Returns:
        (out [N, H, d], lse [N, H]) in plain torch, on any device. No gradient.

    Raises:
        ValueError: a page is not a block, or two levels are given a selection.
    """
    size, dim, kv_heads = spec.block_size, q.shape[2], keys.shape[2]
    if keys.shape[1] != size:
        raise ValueError(f"pages of {keys.shape[1]} tokens must be block_size {size}")
    if spec.num_levels == 2:
        if selected is not None:
            raise ValueError("num_levels=2 selects by itself: leave selected out")
        return _by_row(q, keys, values, pages, lengths, spec, bias, sink)

    num_rows, num_pages = pages.shape
    real, r = real_dtype(q.dtype), spec.entries_per_block
    rows = q.to(real).view(num_rows, kv_heads, -1, dim)
    scale = dim**-0.5
    block = torch.arange(num_pages, device=q.device)

    # Limits of every row as columns [N, 1]: see decode_limits.
    own = ((lengths - 1) // size).unsqueeze(1)
    local = torch.where(
        own * size < spec.min_sparse_length, 0, (own - spec.num_local_blocks + 1).clamp_min(0)
    )
    sink_end = local.clamp_max(spec.num_sink_blocks)
    logits: list[Tensor] = []  # [N, Hk, G, L]
    found: list[Tensor] = []  # [N, Hk, L, d]

    # Coarse logits serve the choice of blocks as well, so they are due even without a tail.
    wants_tail = spec.has_tail(exact, coarse)
    chosen = None
    if wants_tail or (exact and spec.top_k):
        mean, value, var = (x[pages].to(real).transpose(1, 2).flatten(2, 3) for x in entries)
        c = torch.matmul(rows, mean.transpose(2, 3)) * scale + math.log(spec.coarse_block_size)
        kappa = None
        if spec.order == 2:
            kappa = torch.matmul(rows.square() * (0.5 * scale**2), var.transpose(2, 3)).clamp_(
                max=spec.max_variance
            )
            c = c + kappa
        past = (block < own).repeat_interleave(r, 1)[:, None, None]  # entries of complete blocks
        candidate = (block >= sink_end) & (block < local)
        tail = candidate if exact else block < own
        in_tail = tail.unsqueeze(1).expand(-1, kv_heads, -1)

        # A chosen block takes part by its tokens and leaves the tail. Slots without a block go to a
        # column behind the last one, which is cut off.
        if exact and spec.top_k:
            if selected is None:
                z = c.masked_fill(~past, _NEVER)
                denominator = None
                if spec.rank_lse == "super":
                    dtype = entries.key_mean.dtype
                    denominator = _denominator(rows, mean, var, dtype, z, own, spec)
                chosen = _choose(z, kappa, block, candidate, spec, denominator)
            else:
                chosen = selected.long()
            at = torch.where(chosen >= 0, chosen, num_pages)
            taken = torch.zeros(
                num_rows, kv_heads, num_pages + 1, dtype=torch.bool, device=q.device
            )
            in_tail = in_tail & ~taken.scatter_(2, at, True)[..., :-1]

        # The bias comes after the choice: it is no part of the ranking.
        if wants_tail:
            if bias is not None:
                c = c + bias.to(real).view(num_rows, kv_heads, -1, 1)
            logits.append(c.masked_fill(~in_tail.repeat_interleave(r, -1).unsqueeze(2), _NEVER))
            found.append(value)

    # Exact blocks: first ones, local ones, chosen ones; -1 where a row has fewer.
    if exact:
        near = max(spec.num_local_blocks, -(-spec.min_sparse_length // size))
        near = min(near, num_pages)
        recent = own - torch.arange(near, device=q.device)
        first = torch.arange(spec.num_sink_blocks, device=q.device)
        forced = torch.cat(
            (
                torch.where(recent >= local, recent, -1),
                torch.where(first < sink_end, first, -1),
            ),
            1,
        )
        blocks = forced.unsqueeze(1).expand(-1, kv_heads, -1)
        if chosen is not None:
            blocks = torch.cat((blocks, chosen), 2)
        there = blocks.clamp(0, num_pages - 1)
        held = pages.unsqueeze(1).expand(-1, kv_heads, -1) if places is None else places
        page = held.gather(2, there)
        head = torch.arange(kv_heads, device=q.device).view(1, -1, 1)
        k, v = (x.transpose(1, 2)[page, head].flatten(2, 3).to(real) for x in (keys, values))
        place = blocks.unsqueeze(-1) * size + torch.arange(size, device=q.device)
        seen = (blocks >= 0).unsqueeze(-1) & (place < lengths.view(-1, 1, 1, 1))
        z = torch.matmul(rows, k.transpose(2, 3)) * scale
        logits.append(z.masked_fill_(~seen.flatten(2).unsqueeze(2), _NEVER))
        found.append(v)

    # The coarse branch alone sees nothing before the first complete block: zeros.
    z = torch.cat(logits, -1)
    if sink is not None:
        nothing = sink.to(real).view(1, kv_heads, -1, 1).expand(num_rows, -1, -1, -1)
        z = torch.cat((z, nothing), -1)
    lse = torch.logsumexp(z, -1, keepdim=True)
    share = (z - lse).exp().masked_fill(lse == _NEVER, 0.0)
    v = torch.cat(found, 2)
    out = torch.matmul(share[..., : v.shape[2]], v)
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:2])


def _denominator(
    rows: Tensor,
    mean: Tensor,
    var: Tensor,
    dtype: torch.dtype,
    z: Tensor,
    own: Tensor,
    spec: SparseAttentionSpec,
) -> Tensor:
    """[N, Hk, G, 1]: chunked.decode_denominator for rows that differ in their numbers `own` [N, 1]
    of past blocks. mean, var: [N, Hk, P * r, d], of entries that are held in `dtype`; z: [N, Hk, G,
    P * r], -inf beyond the past.
    """
    number = spec.fanout * spec.entries_per_block
    whole = own // spec.fanout
    reach = mean.shape[2] // number

    # Pages behind the past are anything, but they are in no whole super-block.
    mean, var = (x[:, :, : reach * number] for x in (mean, var))
    merged = super_logits(rows, mean, var, dtype, spec)
    there = torch.arange(reach, device=z.device) < whole
    merged = merged.masked_fill(~there[:, None, None], _NEVER)

    single = torch.arange(z.shape[-1], device=z.device) >= whole * number
    alone = z.masked_fill(~single[:, None, None], _NEVER)
    return torch.logsumexp(torch.cat([merged, alone], -1), -1, keepdim=True)


def _choose(
    z: Tensor,
    kappa: Tensor | None,
    block: Tensor,
    candidate: Tensor,
    spec: SparseAttentionSpec,
    denominator: Tensor | None,
) -> Tensor:
    """Selected blocks [N, Hk, K], -1 for none: ranking.choose_blocks for rows that differ in their
    candidates [N, P] bool. z: [N, Hk, G, P * r], -inf for entries that are not yet there.
    """
    probs = shares(z, denominator).nan_to_num(0.0)
    value, mass = rank_values(z, kappa, probs, spec)
    candidate = candidate.unsqueeze(1)
    packed = torch.where(candidate, rank_keys(value, block), -1)
    chosen = block_of_key(packed.topk(min(spec.top_k, len(block)), -1).values)
    if spec.top_p is not None:
        candidates = torch.where(candidate, mass, 0.0).sum(-1, keepdim=True)
        chosen = until_covered(
            chosen, mass.gather(-1, chosen.clamp_min(0)), candidates, z.shape[2], spec.top_p
        )
    return chosen


def _by_row(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    lengths: Tensor,
    spec: SparseAttentionSpec,
    bias: Tensor | None,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Two levels, which pool anew for every token and so read no entries."""
    outs, lses = [], []
    for row, length in enumerate(lengths.tolist()):
        k, v = (x[pages[row]].flatten(0, 1)[None, :length] for x in (keys, values))
        empty = k.new_zeros(1, k.shape[2], 0, k.shape[3])
        problem = DecodeProblem(
            q=q[row : row + 1].contiguous(),
            keys=k,
            values=v,
            entries=CoarseEntries(empty, empty, empty),
            length=length,
            spec=spec,
            bias=None if bias is None else bias[row : row + 1],
            sink=sink,
            exact=True,
            coarse=True,
        )
        out, lse = decode_in_two_levels(problem)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)
