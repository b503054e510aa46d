"""Sampled tails: unbiased estimates of both sums of the softmax, with their variance (README,
Sampling).

For analysis: what inverse-probability weighting costs and what the coarse entries save. Plain
torch, gathered per query; differentiable by autograd for given inclusion probabilities, which then
keeps every gathered block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ops.sparse_attention import chunked
from ops.sparse_attention.blocks import block_table
from ops.sparse_attention.chunked import Chunk, Rows
from ops.sparse_attention.noise import NO_NOISE, gumbel, selection_counter, token_hash
from ops.sparse_attention.problem import Problem
from ops.sparse_attention.ranking import block_of_key, rank_keys, rank_values
from ops.sparse_attention.spec import SparseAttentionSpec

_NEVER = float("-inf")


class Estimate(NamedTuple):
    """Attention with a sampled tail; exp(lse) and exp(lse) * out are unbiased."""

    out: Tensor
    """[T, H, d]."""
    lse: Tensor
    """[T, H], natural logarithm of the estimated denominator."""
    variance: Tensor
    """[T, H], estimated expected squared distance of out from dense attention (first order in the
    sampling error).
    """


def estimate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    spec: SparseAttentionSpec,
    seed: int = 0,
    token_ids: Tensor | None = None,
) -> Estimate:
    """Attention whose tail is estimated from spec.num_samples blocks per query and group; spec.tail
    is "ht" or "ht_cv".

    Selection is that of sparse_attention. Of the other candidates, blocks are drawn without
    replacement with probabilities that grow with their estimated mass (Gumbel top-m; Kool et al.,
    arXiv 1903.06059, section 4). Arguments as sparse_attention. spec.order ranks and draws; the
    control variate of "ht_cv" is without the variance term.

    Raises:
        ValueError: spec.tail is another one.
    """
    if spec.tail not in ("ht", "ht_cv"):
        raise ValueError(f"tail is {spec.tail!r}; an estimate needs tail=ht or tail=ht_cv")
    table = block_table(cu_seqlens, len(q), spec)
    kv_heads = k.shape[1]
    with torch.no_grad():
        entries = chunked.pool(k, v, table, spec)
        selected = torch.full((kv_heads, len(q), 0), -1)
        if spec.top_k:
            keys, _ = chunked.rank(q, entries, table, spec, None, NO_NOISE)
            selected = block_of_key(keys)
    hashed = token_hash(seed, torch.arange(len(q)) if token_ids is None else token_ids)
    rows = Rows(
        Problem(
            q=q,
            k=k,
            v=v,
            bias=None,
            sink=None,
            selected=selected,
            entries=entries,
            table=table,
            spec=spec,
            exact=True,
            coarse=True,
        )
    )
    parts = [_chunk(rows, chunk, hashed) for chunk in rows.chunks(64)]
    joined = [torch.cat(x, 1) for x in zip(*parts, strict=True)]
    return Estimate(*(rows.by_token(x) for x in joined))


def _chunk(p: Rows, chunk: Chunk, hashed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    spec = p.spec
    rows = chunk.rows
    q = p.q[:, rows]
    head = torch.arange(p.kv_heads).view(-1, 1, 1)

    # Selected blocks are gathered below, also those that `parts` has a masked product for.
    parts = [part for part in p.parts(chunk) if not part.is_selected]
    tail = parts.pop(0) if parts[0].var is not None else None
    exact = [(p.logits(part, rows)[0], part.values.unsqueeze(1)) for part in parts]
    if p.selected.shape[2]:
        exact.append(_blocks(p, q, p.selected[:, rows], head))

    logits = [z for z, _ in exact]
    if tail is None:
        lse = torch.logsumexp(torch.cat(logits, -1), -1)
        out = sum(torch.matmul((z - lse.unsqueeze(-1)).exp(), v) for z, v in exact)
        assert isinstance(out, Tensor)
        return out, lse, torch.zeros_like(lse)

    c, kappa = p.logits(tail, rows)  # masked: unselected candidates only
    with torch.no_grad():
        # Gumbel top-m: blocks are drawn by their scores with noise, one more than is needed.
        block = torch.arange(chunk.low, chunk.high)
        open_blocks = tail.mask[:, :, 0].unflatten(-1, (-1, spec.entries_per_block)).any(-1)
        probs = torch.where(tail.mask, (c - torch.logsumexp(c, -1, keepdim=True)).exp(), 0.0)
        values, _ = rank_values(c, kappa, probs, spec)
        first = p.table.first[p.table.block_of[rows].long()].long().unsqueeze(1)
        counter = selection_counter(block - first, head, p.kv_heads)
        perturbed = (values + gumbel(hashed[rows].unsqueeze(1), counter)).masked_fill(
            ~open_blocks, _NEVER
        )
        keys = torch.where(open_blocks, rank_keys(perturbed, block), -1)
        order = block_of_key(keys.topk(min(spec.num_samples + 1, len(block)), -1).values)
        sampled = order[..., : spec.num_samples]

        # the threshold is the best that was not drawn; where everything was drawn, inclusion is
        # certain
        threshold = torch.full(sampled.shape[:2], _NEVER)
        if order.shape[2] > spec.num_samples:
            beyond = order[..., spec.num_samples :]
            threshold = perturbed.gather(2, (beyond - chunk.low).clamp_min(0)).squeeze(-1)
            threshold = threshold.masked_fill(beyond.squeeze(-1) < 0, _NEVER)

        # Given the threshold t, a block of score s is in the draw with probability 1 - exp(-exp(s -
        # t)).
        rank = values.gather(2, (sampled - chunk.low).clamp_min(0))
        inclusion = -torch.expm1(-torch.exp(rank - threshold.unsqueeze(-1)))
        inclusion = torch.where(sampled >= 0, inclusion, 1.0).to(q.dtype)
        inclusion = inclusion.unsqueeze(2)  # [Hk, n, 1, m]

    # The exact part whole, and of every sampled block its mass and numerator.
    z, v = _blocks(p, q, sampled, head)
    top = torch.cat([*logits, c, z], -1).amax(-1, keepdim=True).detach()
    mass = sum((x - top).exp().sum(-1) for x, _ in exact)
    numerator = sum(torch.matmul((x - top).exp(), values) for x, values in exact)
    assert isinstance(mass, Tensor) and isinstance(numerator, Tensor)
    m = sampled.shape[2]
    w = (z - top).exp().unflatten(-1, (m, -1))  # [Hk, n, G, m, B]
    d_mass = w.sum(-1)
    d_numerator = torch.matmul(w.transpose(2, 3), v.unflatten(2, (m, -1))).transpose(2, 3)

    # the coarse entries as control variate: only the difference is sampled
    if spec.tail == "ht_cv":
        # Without the variance term an entry never has more than its tokens' mass (Jensen), so the
        # sum stays positive whatever is drawn. With it the sum can fall below zero, and a bound
        # against that would make it biased.
        coarse = (c - top if kappa is None else c - kappa - top).exp()
        mass = mass + coarse.sum(-1)
        numerator = numerator + torch.matmul(coarse, tail.values.unsqueeze(1))
        r = spec.entries_per_block
        entry = ((sampled - chunk.low).clamp_min(0).unsqueeze(-1) * r + torch.arange(r)).flatten(2)
        there = (sampled >= 0).repeat_interleave(r, -1).unsqueeze(2)
        own = torch.where(
            there, coarse.gather(3, entry.unsqueeze(2).expand(-1, -1, p.group, -1)), 0.0
        )
        own = own.unflatten(-1, (m, r))
        pooled = tail.values[head, entry].unflatten(2, (m, r))
        d_mass = d_mass - own.sum(-1)
        d_numerator = d_numerator - torch.matmul(own.transpose(2, 3), pooled).transpose(2, 3)

    # Horvitz-Thompson: what was drawn counts 1 / inclusion times, so that sums over all blocks are
    # met in the mean.
    mass = mass + (d_mass / inclusion).sum(-1)
    numerator = numerator + (d_numerator / inclusion.unsqueeze(-1)).sum(3)
    out = numerator / mass.unsqueeze(-1)

    # The ratio's variance to first order in the sampling error (delta method).
    residual = (d_numerator - out.unsqueeze(3) * d_mass.unsqueeze(-1)) / mass[..., None, None]
    variance = ((1 - inclusion) / inclusion.square() * residual.square().sum(-1)).sum(-1)
    return out, mass.log() + top.squeeze(-1), variance.detach()


def _blocks(p: Rows, q: Tensor, blocks: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [Hk, n, G, K * B] and values [Hk, n, K * B, d] of the tokens of blocks [Hk, n, K], -1
    for none.
    """
    size = p.spec.block_size
    start = p.table.start[blocks.clamp_min(0)].long().unsqueeze(-1)
    at = (start + torch.arange(size)).flatten(2).clamp_max(p.k.shape[1] - 1)
    z = p.scale * torch.matmul(q, p.k[head, at].transpose(2, 3))
    nothing = (blocks < 0).repeat_interleave(size, -1).unsqueeze(2)
    return z.masked_fill(nothing, _NEVER), p.v[head, at]
