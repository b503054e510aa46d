"""How far the op is from dense attention, on sampled rows: exact error, bounds on it, and losses that lower it.

Plain torch on any device, [sampled rows x T] at a time. Theorem numbers refer to README.md, Certificates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ops.sparse_attention.blocks import BlockTable, block_table
from ops.sparse_attention.interface import AttentionOutput
from ops.sparse_attention.noise import mix
from ops.sparse_attention.spec import SparseAttentionSpec

_NEVER = float("-inf")
_ELEMENTS = 2**24
"""Logits of one chunk of audited rows."""
_AUDIT_STREAM = 0x5EED


class RowAudit(NamedTuple):
    """One value per audited row and head, [m, H] each. Gradients flow through mass_kl, coherence and alignment.

    error: distance of the op's output from dense attention over the norm of dense attention's. bound: Theorem 1 in the same
    unit, never below the error. certificate: its sub-Gaussian form, which holds where logits within a block are as
    spread as their variance says. Both are infinite with two levels.
    mass_kl: KL divergence of the estimated from the true shares of the past blocks. coherence: mean variance term of
    the tail, weighted by mass. alignment: squared distance from dense attention over its squared norm.
    """

    error: Tensor
    bound: Tensor
    certificate: Tensor
    mass_kl: Tensor
    coherence: Tensor
    alignment: Tensor


def sample_rows(hashed: Tensor, fraction: float) -> Tensor:
    """[m] int64: tokens whose hash (noise.token_hash, [T]) falls below the fraction; the same tokens however they are
    batched. Waits for the device, since the number of rows depends on the draw."""
    return (mix(hashed ^ _AUDIT_STREAM) < fraction * 2**32).nonzero()[:, 0]


def mean_error_bound(mean: float, mean_square: float, count: int, failure: float = 1e-3) -> float:
    """Upper bound on the mean of values in [0, 1], of which `count` were drawn, that fails with at most this probability.

    Empirical Bernstein bound: Maurer and Pontil, Empirical Bernstein Bounds and Sample-Variance Penalization, Theorem 4.
    """
    if count < 2:
        return 1.0
    variance = max(0.0, mean_square - mean**2) * count / (count - 1)
    log_term = math.log(2 / failure)
    return min(1.0, mean + math.sqrt(2 * variance * log_term / count) + 7 * log_term / (3 * (count - 1)))


def audit_rows(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, spec: SparseAttentionSpec, result: AttentionOutput,
               rows: Tensor, bias: Tensor | None = None, sink: Tensor | None = None) -> RowAudit:
    """Compare `result` with dense attention on `rows` [m] int64. Other arguments as sparse_attention was given, which had
    both branches."""
    table = block_table(cu_seqlens, len(q), spec)
    extents = _extents(k.detach().float(), v.detach().float(), table, spec)
    step = max(1, _ELEMENTS // max(1, q.shape[1] * len(k)))
    parts = [_audit(q, k, v, table, spec, result, chunk, bias, sink, extents) for chunk in rows.split(step)]
    return RowAudit(*(torch.cat(x) for x in zip(*parts, strict=True)))


class _Extents(NamedTuple):
    """Of every coarse entry, [Hk, E]: largest distance of a key and of a value from their mean, and root mean square
    distance of the values."""

    key_radius: Tensor
    value_radius: Tensor
    value_spread: Tensor


def _pooled(k: Tensor, v: Tensor, table: BlockTable, spec: SparseAttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of every block by coarse entry, [M * r, C, Hk, d] each, and which blocks are complete [M].
    Tokens beyond an incomplete block are its last one again."""
    at = table.start.long().unsqueeze(1) + torch.arange(spec.block_size, device=k.device)
    at = torch.minimum(at, (table.end.long() - 1).clamp_min(0).unsqueeze(1)).view(-1)
    shape = (-1, spec.coarse_block_size, *k.shape[1:])
    return k[at].view(shape), v[at].view(shape), table.end - table.start == spec.block_size


def _extents(k: Tensor, v: Tensor, table: BlockTable, spec: SparseAttentionSpec) -> _Extents:
    keys, values, _ = _pooled(k, v, table, spec)
    key_distance = (keys - keys.mean(1, keepdim=True)).norm(dim=-1)
    value_distance = (values - values.mean(1, keepdim=True)).norm(dim=-1)
    return _Extents(key_distance.amax(1).T, value_distance.amax(1).T, value_distance.square().mean(1).sqrt().T)


def _audit(q: Tensor, k: Tensor, v: Tensor, table: BlockTable, spec: SparseAttentionSpec, result: AttentionOutput,
           rows: Tensor, bias: Tensor | None, sink: Tensor | None, extents: _Extents) -> RowAudit:
    num_rows, heads, kv_heads, dim, r = len(rows), q.shape[1], k.shape[1], q.shape[2], spec.entries_per_block
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale, shape = dim**-0.5, (num_rows, kv_heads, heads // kv_heads)
    queries = q[rows].to(real).view(*shape, dim).transpose(0, 1)  # [Hk, m, G, d]
    k, v = k.to(real), v.to(real)
    own = table.block_of[rows].long()
    block = torch.arange(len(table.start), device=q.device)
    first, sink_end, local = (x[own].long().unsqueeze(1) for x in (table.first, table.sink_end, table.local_start))
    past = (block >= first) & (block < own.unsqueeze(1))

    # dense attention of these rows
    token = torch.arange(len(k), device=q.device)
    visible = (token >= table.start.long()[first]) & (token <= rows.unsqueeze(1))
    z = scale * torch.einsum("hmgd,jhd->hmgj", queries, k)
    z = z.masked_fill(~visible[None, :, None], _NEVER)
    with torch.no_grad():
        dense_lse = torch.logsumexp(z, -1, keepdim=True)
        if sink is not None:
            dense_lse = torch.logaddexp(dense_lse, sink.to(real).view(kv_heads, 1, -1, 1))
        token_probs = (z - dense_lse).exp()
        dense = torch.einsum("hmgj,jhd->hmgd", token_probs, v)
        true_mass = torch.zeros(*z.shape[:3], len(block), dtype=real, device=q.device)
        true_mass.index_add_(3, table.block_of.long(), token_probs)
        true_mass = torch.where(past[None, :, None], true_mass, 0.0)
    ours = result.out[rows].to(real).view(*shape, dim).transpose(0, 1)
    difference, norm = ours - dense, dense.norm(dim=-1).clamp_min(torch.finfo(real).tiny)

    # the coarse entries as the op sees them
    keys, values, complete = _pooled(k, v, table, spec)
    mean, value_mean = keys.mean(1), values.mean(1)
    var = (keys - mean.unsqueeze(1)).square().mean(1)
    kappa = torch.zeros(*z.shape[:3], len(mean), dtype=real, device=q.device)
    if spec.order == 2:
        kappa = (0.5 * scale**2 * torch.einsum("hmgd,ehd->hmge", queries.square(), var)).clamp_max(spec.max_variance)
    c = scale * torch.einsum("hmgd,ehd->hmge", queries, mean) + math.log(spec.coarse_block_size) + kappa
    block_logits = c.unflatten(-1, (-1, r)).logsumexp(-1).masked_fill(~past[None, :, None], _NEVER)
    some = past.any(1)[None, :, None]
    estimated = block_logits.masked_fill(~past[None, :, None], -1e30).log_softmax(-1)
    share = true_mass / true_mass.sum(-1, keepdim=True).clamp_min(torch.finfo(real).tiny)
    kl = torch.where(share > 0, share * (share.clamp_min(torch.finfo(real).tiny).log() - estimated), 0.0).sum(-1)
    kl = torch.where(some, kl, 0.0)

    chosen = result.selected[:, rows].long()
    taken = torch.zeros(kv_heads, num_rows, len(block) + 1, dtype=torch.bool, device=q.device)
    taken.scatter_(2, torch.where(chosen < 0, len(block), chosen), True)
    tail = ((block >= sink_end) & (block < local) & complete & ~taken[..., :-1]).repeat_interleave(r, -1).unsqueeze(2)
    shift = torch.zeros(*z.shape[:3], 1, dtype=real, device=q.device)
    if bias is not None:
        shift = bias[rows].to(real).view(*shape, 1).transpose(0, 1)
    lse = result.lse[rows].to(real).view(*shape, 1).transpose(0, 1)
    if spec.tail == "drop":
        tail = torch.zeros_like(tail)
    log_probs = torch.where(tail, c + shift - lse, _NEVER).detach()
    coherence = (log_probs.exp() * kappa).sum(-1)

    with torch.no_grad():
        kappa_all = kappa + shift
        bounds = [_bound(ours, log_probs, kappa_all, value_mean, *spread)
                  for spread in (_worst_case(queries, extents, scale), _sub_gaussian(queries, var, extents, scale))]
        if spec.num_levels == 2:  # closed super-blocks are outside of these statistics
            bounds = [torch.full_like(norm, float("inf"))] * 2
        if spec.tail == "drop":  # the error of dropping is the dropped mass times a distance: exact, so a bound
            bounds = [difference.norm(dim=-1)] * 2

    def by_row(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(num_rows, heads)

    error = difference.detach().norm(dim=-1) / norm
    return RowAudit(by_row(error), by_row(bounds[0] / norm), by_row(bounds[1] / norm), by_row(kl), by_row(coherence),
                    by_row(difference.square().sum(-1) / norm.square()))


def _worst_case(queries: Tensor, extents: _Extents, scale: float) -> tuple[Tensor, Tensor]:
    """Lemmas 1 and 2: largest log mass of an entry over its mean's, and largest shift of its mean value; [Hk, m, G, E]."""
    delta = scale * queries.norm(dim=-1, keepdim=True) * extents.key_radius[:, None, None]
    log_cosh = delta + torch.log1p(torch.exp(-2 * delta)) - math.log(2.0)
    shift = torch.minimum(2 * extents.value_radius[:, None, None] * torch.tanh(delta / 2),
                          2 * extents.value_spread[:, None, None] * torch.sinh(delta.clamp_max(30) / 2))
    return log_cosh, shift


def _sub_gaussian(queries: Tensor, var: Tensor, extents: _Extents, scale: float) -> tuple[Tensor, Tensor]:
    """The same where logits within an entry are sub-Gaussian with the variance that the diagonal gives."""
    sigma2 = scale**2 * torch.einsum("hmgd,ehd->hmge", queries.square(), var)
    return 0.5 * sigma2, extents.value_spread[:, None, None] * torch.expm1((2 * sigma2).clamp_max(60)).sqrt()


def _bound(ours: Tensor, log_probs: Tensor, kappa: Tensor, value_mean: Tensor, log_mass: Tensor, shift: Tensor) -> Tensor:
    """Theorem 1, [Hk, m, G]. kappa: what the op added to the logit of the mean; the true mass lies between e^-kappa and
    e^(log_mass - kappa) times the estimated one. Exponents beyond 60 are vacuous anyway."""
    probs = log_probs.exp()
    least = (log_probs - kappa).clamp_max(60).exp()
    most = (log_probs - kappa + log_mass).clamp_max(60).exp()
    mass_low = 1 - probs.sum(-1) + least.sum(-1)
    distance = torch.cdist(ours, value_mean.transpose(0, 1).unsqueeze(1))
    worst = torch.maximum((most - probs).abs(), (probs - least).abs()) * distance + most * shift
    return worst.sum(-1) / mass_low
