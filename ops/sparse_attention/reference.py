"""The definition in README.md, with every T x T and T x M matrix written out. Differentiable by
autograd; tiny sizes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ops.sparse_attention.noise import (
    draw_top_k,
    drawing_heads,
    gumbel,
    selection_counter,
    token_hash,
)
from ops.sparse_attention.spec import LARGEST, SMALLEST, TRUST, SelectionNoise, SparseAttentionSpec

_NEVER = float("-inf")


class Blocks(NamedTuple):
    """start, end, first, document: [M] int64, no empty rows. of_token: [T]."""

    start: Tensor
    end: Tensor
    first: Tensor
    document: Tensor
    of_token: Tensor


class Reference(NamedTuple):
    """out [T, H, d], lse [T, H], tail_mass and selected_mass [T, H]; selected [Hk, T, M] bool;
    probabilities of tokens [Hk, T, G, T], of entries [Hk, T, G, E] and, with two levels, of closed
    super-blocks [Hk, T, G, S].
    """

    out: Tensor
    lse: Tensor
    tail_mass: Tensor
    selected_mass: Tensor
    selected: Tensor
    token_probs: Tensor
    entry_probs: Tensor
    super_probs: Tensor


def reference_blocks(cu_seqlens: Tensor, block_size: int) -> Blocks:
    rows: list[tuple[int, int, int, int]] = []
    for document, (begin, stop) in enumerate(
        zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True)
    ):
        before = len(rows)
        rows += [
            (at, min(at + block_size, stop), before, document)
            for at in range(begin, stop, block_size)
        ]
    start, end, first, documents = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).unbind(1)
    return Blocks(
        start, end, first, documents, torch.repeat_interleave(torch.arange(len(rows)), end - start)
    )


def pooled(
    x: Tensor,
    blocks: Blocks,
    spec: SparseAttentionSpec,
    size: int,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and elementwise variance over `size` consecutive tokens of each block: [Hk, M *
    block_size / size, d] each; zero where the block is not complete. logits: like x, of the tokens'
    weights; None: equal ones.
    """
    if logits is None:
        logits = torch.zeros_like(x)
    means, variances = [], []
    for start, end in zip(blocks.start.tolist(), blocks.end.tolist(), strict=True):
        for at in range(start, start + spec.block_size, size):
            tokens = (
                x[at : at + size] if end - start == spec.block_size else torch.zeros_like(x[:1])
            )
            weights = torch.softmax(logits[at : at + len(tokens)], 0)
            means.append((weights * tokens).sum(0))
            variances.append((weights * (tokens - means[-1]).square()).sum(0))
    if not means:
        return x.new_zeros(x.shape[1], 0, x.shape[2]), x.new_zeros(x.shape[1], 0, x.shape[2])
    return torch.stack(means, 1), torch.stack(variances, 1)


def coarse_logits(
    q: Tensor, mean: Tensor, var: Tensor, size: int, spec: SparseAttentionSpec
) -> tuple[Tensor, Tensor]:
    """q [Hk, T, G, d], entries [Hk, E, d] -> logits without bias and their variance terms, [Hk, T,
    G, E] each.
    """
    scale = q.shape[-1] ** -0.5
    kappa = torch.zeros(*q.shape[:3], mean.shape[1], dtype=q.dtype)
    if spec.order == 2:
        kappa = (0.5 * scale**2 * torch.einsum("htgd,hed->htge", q.square(), var)).clamp_max(
            spec.max_variance
        )
    return scale * torch.einsum("htgd,hed->htge", q, mean) + math.log(size) + kappa, kappa


def rank_values(
    logits: Tensor,
    kappa: Tensor,
    seen: Tensor,
    spec: SparseAttentionSpec,
    normaliser: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rank value and mass of every block, [Hk, T, M] fp32 each. logits, kappa: [Hk, T, G, M * r];
    seen: [T, M * r] or [Hk, T, 1, M * r], the entries of the softmax; normaliser: its logarithm
    [Hk, T, G, 1] where it has more entries, or is estimated.
    """
    seen = seen if seen.dim() == 4 else seen[None, :, None]
    logits = logits.masked_fill(~seen, _NEVER)
    lse = torch.logsumexp(logits, -1, keepdim=True) if normaliser is None else normaliser
    probs = torch.where(seen, (logits - lse).clamp_max(LARGEST).exp(), 0.0)
    blocks = (-1, spec.entries_per_block)
    mass = probs.sum(2).unflatten(-1, blocks).sum(-1).float()
    if spec.score == "max":
        return logits.unflatten(-1, blocks).logsumexp(-1).amax(2).float(), mass
    if spec.score == "error_gain":
        mass = (
            (probs * (1 - torch.exp(-kappa) + TRUST)).sum(2).unflatten(-1, blocks).sum(-1).float()
        )
    return mass.clamp_min(SMALLEST).log(), mass


def super_blocks(blocks: Blocks, spec: SparseAttentionSpec) -> list[Tensor]:
    """The blocks [fanout] of every super-block: runs of `fanout` from a document's first one on."""
    members: list[Tensor] = []
    for first in blocks.first.unique().tolist():
        of_document = (blocks.first == first).nonzero()[:, 0]
        members += [chunk for chunk in of_document.split(spec.fanout) if len(chunk) == spec.fanout]
    return members


def estimated_lse(
    q: Tensor,
    logits: Tensor,
    mean: Tensor,
    var: Tensor,
    past: Tensor,
    blocks: Blocks,
    spec: SparseAttentionSpec,
) -> Tensor:
    """[Hk, T, G, 1]: log-sum-exp over the past, of which every whole super-block is one entry.

    q: [Hk, T, G, d]; entries mean, var: [Hk, M * r, d] and their logits [Hk, T, G, M * r]; past:
    [T, M] bool.
    """
    r = spec.entries_per_block
    single = past.clone()
    merged = []
    for chunk in super_blocks(blocks, spec):
        at = (chunk.unsqueeze(1) * r + torch.arange(r)).flatten()
        centre = mean[:, at].mean(1, keepdim=True)
        spread = (var[:, at] + (mean[:, at] - centre).square()).mean(1, keepdim=True)
        z, _ = coarse_logits(q, centre, spread, spec.super_block_size, spec)

        # Where all of its blocks are past it stands for them, and else they for themselves.
        whole = past[:, chunk].all(1)
        single[:, chunk] &= ~whole.unsqueeze(1)
        merged.append(z.masked_fill(~whole[None, :, None, None], _NEVER))

    alone = logits.masked_fill(~single.repeat_interleave(r, -1)[None, :, None], _NEVER)
    return torch.logsumexp(torch.cat([alone, *merged], -1), -1, keepdim=True)


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    spec: SparseAttentionSpec,
    *,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    pool_logits: Tensor | None = None,
    noise: SelectionNoise | None = None,
    token_ids: Tensor | None = None,
    selected: Tensor | None = None,
    exact: bool = True,
    coarse: bool = True,
) -> Reference:
    """q [T, H, d], k and v [T, Hk, d], cu_seqlens [documents + 1]; bias [T, H], sink [H],
    pool_logits [T, Hk, 2, d].

    selected: [Hk, T, M] bool to use instead of selecting. exact, coarse: which branches take part;
        without the exact one the coarse one holds every complete past block. tail "drop" or
        "coarse" only (estimator.py has the others).
    """
    length, heads, dim = q.shape
    kv_heads = k.shape[1]
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(real).view(length, kv_heads, heads // kv_heads, dim).transpose(0, 1)
    k, v = k.to(real), v.to(real)
    blocks = reference_blocks(cu_seqlens, spec.block_size)
    own = blocks.of_token
    block = torch.arange(len(blocks.start))

    # Which blocks a query has for certain, and which it may choose among.
    dense = ((own - blocks.first[own]) * spec.block_size < spec.min_sparse_length)[:, None]
    past = (block < own[:, None]) & (block >= blocks.first[own][:, None])  # [T, M]
    local = past & ((block > own[:, None] - spec.num_local_blocks) | dense)
    forced = local | (past & (block < blocks.first[own][:, None] + spec.num_sink_blocks))
    candidates = past & ~forced

    weights = (None, None) if pool_logits is None else pool_logits.to(real).unbind(2)
    mean, var = pooled(k, blocks, spec, spec.coarse_block_size, weights[0])
    value, _ = pooled(v, blocks, spec, spec.coarse_block_size, weights[1])
    c, kappa = coarse_logits(grouped, mean, var, spec.coarse_block_size, spec)
    per_entry = [x.repeat_interleave(spec.entries_per_block, -1) for x in (past, candidates)]
    with torch.no_grad():
        # A choice has no gradient; it is made as the op makes it, and closed super-blocks are in
        # its normaliser.
        closed, super_tokens, c_super, super_value = _close_super_blocks(
            grouped, k, v, candidates, blocks, spec
        )

        # [Hk, T, M]
        open_candidates = candidates[None] & ~(closed.unsqueeze(-1) & super_tokens).any(2)

        if selected is None:
            seen = past[None] & ~(closed.unsqueeze(-1) & super_tokens).any(2)
            seen = seen.repeat_interleave(spec.entries_per_block, -1)
            c_seen = c.masked_fill(~seen[:, :, None], _NEVER)
            c_closed = c_super.masked_fill(~closed[:, :, None], _NEVER)
            normaliser = torch.logsumexp(torch.cat([c_seen, c_closed], -1), -1, keepdim=True)
            if spec.rank_lse == "super":
                normaliser = estimated_lse(grouped, c, mean, var, past, blocks, spec)
            values, mass = rank_values(c, kappa, seen[:, :, None], spec, normaliser)
            forced_mass = torch.where(forced[None], mass, 0.0).sum(-1)
            selected = _choose(
                values, mass, forced_mass, open_candidates, blocks, spec, noise, token_ids, kv_heads
            )
    if spec.num_levels == 2:  # once more with gradients
        _, _, c_super, super_value = _close_super_blocks(grouped, k, v, candidates, blocks, spec)

    token = torch.arange(length)
    exact_blocks = selected | forced[None] | (block == own[:, None])[None]
    visible = exact_blocks[:, :, own] & (token <= token[:, None])[None] & exact

    # What stands for the rest: entries of the candidates that were not chosen, or without the exact
    # branch of every complete past block.
    if exact:
        tail = (open_candidates & ~selected).repeat_interleave(spec.entries_per_block, -1)
    else:
        tail = per_entry[0][None]
    tail = tail & coarse & (spec.tail != "drop" or not exact)
    if bias is not None:
        shift = bias.to(real).view(length, kv_heads, heads // kv_heads, 1).transpose(0, 1)
        c = c + shift
        c_super = c_super + shift

    z = dim**-0.5 * torch.einsum("htgd,jhd->htgj", grouped, k)
    z = z.masked_fill(~visible[:, :, None], _NEVER)
    parts = [
        z,
        c.masked_fill(~tail[:, :, None], _NEVER),
        c_super.masked_fill(~(closed & exact)[:, :, None], _NEVER),
    ]
    sizes = [p.shape[-1] for p in parts]
    if sink is not None:
        parts.append(sink.to(real).view(kv_heads, 1, -1, 1).expand(-1, length, -1, 1))

    # A row without any entry has the logarithm of 0 and zeros, not NaN.
    logits = torch.cat(parts, -1)
    nothing = (logits == _NEVER).all(-1, keepdim=True)
    lse = torch.logsumexp(logits.masked_fill(nothing, 0.0), -1, keepdim=True).masked_fill(
        nothing, _NEVER
    )
    probs = torch.where(logits == _NEVER, 0.0, (logits - lse.masked_fill(nothing, 0.0)).exp())

    token_probs, entry_probs, super_probs = probs[..., : sum(sizes)].split(sizes, -1)
    out = (
        torch.einsum("htgj,jhd->htgd", token_probs, v)
        + torch.einsum("htge,hed->htgd", entry_probs, value)
        + torch.einsum("htge,hed->htgd", super_probs, super_value)
    )

    def by_token(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(length, heads, *x.shape[3:])

    chosen = (selected[:, :, own] & (exact > 0))[:, :, None]
    return Reference(
        by_token(out).to(q.dtype),
        by_token(lse.squeeze(-1)),
        by_token(entry_probs.sum(-1) + super_probs.sum(-1)),
        by_token((token_probs * chosen).sum(-1)),
        selected,
        token_probs,
        entry_probs,
        super_probs,
    )


def _choose(
    values: Tensor,
    mass: Tensor,
    forced_mass: Tensor,
    candidates: Tensor,
    blocks: Blocks,
    spec: SparseAttentionSpec,
    noise: SelectionNoise | None,
    token_ids: Tensor | None,
    kv_heads: int,
) -> Tensor:
    """[Hk, T, M] bool: the best candidates, row by row."""
    length = values.shape[1]

    counts = torch.full((kv_heads, length), spec.top_k)
    if noise is not None:
        hashed = token_hash(noise.seed, torch.arange(length) if token_ids is None else token_ids)
        if noise.temperature > 0:
            in_document = torch.arange(values.shape[-1]) - blocks.first
            first_head, num_heads = drawing_heads(noise, kv_heads)
            heads = first_head + torch.arange(kv_heads)[:, None, None]
            counter = selection_counter(in_document, heads, num_heads)
            values = values + noise.temperature * gumbel(hashed[None, :, None], counter)
        drawn = draw_top_k(hashed, kv_heads, spec.top_k, noise)
        counts = counts if drawn is None else drawn

    # Row by row and block by block, as the definition says; speed is the other back-ends'.
    selected = torch.zeros_like(candidates)
    total = forced_mass + torch.where(candidates, mass, 0.0).sum(-1)
    for head in range(kv_heads):
        for i in range(length):
            ids = candidates[head, i].nonzero()[:, 0]
            order = ids[torch.argsort(values[head, i, ids], descending=True, stable=True)]
            covered = forced_mass[head, i]
            for m in order[: int(counts[head, i])].tolist():
                if spec.top_p is not None and covered >= spec.top_p * total[head, i]:
                    break
                selected[head, i, m] = True
                covered = covered + mass[head, i, m]
    return selected


def _close_super_blocks(
    q: Tensor, k: Tensor, v: Tensor, candidates: Tensor, blocks: Blocks, spec: SparseAttentionSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """closed [Hk, T, S] bool, the super-blocks that stay one entry; which blocks they hold [S, M];
    their logits [Hk, T, G, S] and mean values [Hk, S, d]. Without a second level S = 0.
    """
    kv_heads, length, group, dim = q.shape
    members = super_blocks(blocks, spec) if spec.num_levels == 2 else []
    holds = torch.zeros(len(members), len(blocks.start), dtype=torch.bool)
    means, variances, values = [], [], []
    for i, chunk in enumerate(members):
        holds[i, chunk] = True
        tokens = slice(int(blocks.start[chunk[0]]), int(blocks.end[chunk[-1]]))
        means.append(k[tokens].mean(0))
        variances.append((k[tokens] - means[-1]).square().mean(0))
        values.append(v[tokens].mean(0))

    if not members:
        return (
            torch.zeros(kv_heads, length, 0, dtype=torch.bool),
            holds,
            q.new_zeros(kv_heads, length, group, 0),
            q.new_zeros(kv_heads, 0, dim),
        )

    # Only those of which every block is a candidate stand as one entry, unless they are opened.
    whole = (candidates[:, None] | ~holds[None]).all(-1)  # [T, S]
    logits, _ = coarse_logits(
        q, torch.stack(means, 1), torch.stack(variances, 1), spec.fanout * spec.block_size, spec
    )

    masked = logits.detach().masked_fill(~whole[None, :, None], _NEVER)
    lse = torch.logsumexp(masked, -1, keepdim=True)
    share = torch.where(whole[None, :, None], (masked - lse).exp(), 0.0)
    mass = share.sum(2).float().clamp_min(SMALLEST).log()
    order = torch.argsort(
        mass.masked_fill(~whole[None], _NEVER), dim=-1, descending=True, stable=True
    )
    opened = torch.zeros(kv_heads, length, len(members), dtype=torch.bool).scatter_(
        -1, order[..., : spec.num_expanded], True
    )
    return whole[None] & ~opened, holds, logits, torch.stack(values, 1)
