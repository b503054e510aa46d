"""How far the op is from dense attention, on sampled rows: exact error, bounds on it, and losses
that lower it.

Plain torch on any device, [sampled rows x T] at a time. Theorem numbers refer to README.md,
Certificates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ops.sparse_attention.blocks import BlockTable, block_table
from ops.sparse_attention.chunked import real_dtype
from ops.sparse_attention.entries import CoarseEntries, pool_groups, weigh_groups
from ops.sparse_attention.interface import AttentionOutput
from ops.sparse_attention.noise import mix
from ops.sparse_attention.spec import SparseAttentionSpec

_NEVER = float("-inf")
_ELEMENTS = 2**24
"""Logits of one chunk of audited rows."""
_AUDIT_STREAM = 0x5EED
_LARGEST = 60.0
"""Largest logarithm of how many times its least mass an entry may count; bounds beyond that say
nothing.
"""


class RowAudit(NamedTuple):
    """One value per audited row and head, [m, H] each. Gradients flow through mass_kl, coherence
    and alignment.
    """

    error: Tensor
    """Distance of the op's output from dense attention over the norm of dense attention's (over the
    rounding unit of the largest value, where dense attention is shorter than that).
    """
    bound: Tensor
    """The smaller one of Theorem 1 and of the farthest that any attention can be, in the unit of
    the error: finite, not negative, and never below the error, rounding aside.
    """
    certificate: Tensor
    """The same with the sub-Gaussian form of Theorem 1, which holds where logits within a block are
    as spread as their variance says. With two levels both are the farthest, as closed super-blocks
    are outside of Theorem 1's sums.
    """
    mass_kl: Tensor
    """KL divergence of the estimated from the true shares of the past blocks."""
    coherence: Tensor
    """Mean variance term of the tail, weighted by mass (with two levels as if every super-block
    were open).
    """
    alignment: Tensor
    """Squared distance from dense attention over its squared norm."""
    rounding: Tensor
    """What rounding of inputs, logits and outputs can add to the error, in its unit: error <= bound
    + rounding.
    """
    candidate_mass: Tensor
    """Share of dense attention's softmax on the candidates."""
    chosen_mass: Tensor
    """The part of it on those that were selected, or on `choice` where one was given."""


def sample_rows(hashed: Tensor, fraction: float) -> Tensor:
    """[m] int64: tokens whose hash (noise.token_hash, [T]) falls below the fraction; the same
    tokens however they are batched. Waits for the device, since the number of rows depends on the
    draw.
    """
    return (mix(hashed ^ _AUDIT_STREAM) < fraction * 2**32).nonzero()[:, 0]


def mean_error_bound(mean: float, mean_square: float, count: int, failure: float = 1e-3) -> float:
    """Upper bound on the mean of values in [0, 1], of which `count` were drawn, that fails with at
    most this probability.

    Empirical Bernstein bound: Maurer and Pontil, Empirical Bernstein Bounds and Sample-Variance
    Penalization, Theorem 4.
    """
    if count < 2:
        return 1.0
    variance = max(0.0, mean_square - mean**2) * count / (count - 1)
    log_term = math.log(2 / failure)
    return min(
        1.0, mean + math.sqrt(2 * variance * log_term / count) + 7 * log_term / (3 * (count - 1))
    )


def audit_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    spec: SparseAttentionSpec,
    result: AttentionOutput,
    rows: Tensor,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    pool_logits: Tensor | None = None,
    choice: Tensor | None = None,
) -> RowAudit:
    """Compare `result` with dense attention on `rows` [m] int64. Other arguments as
    sparse_attention was given, which had both branches.

    choice: [Hk, T, K] block ids, -1 for none, that another rank would have selected; None: those
        that were.
    """
    table = block_table(cu_seqlens, len(q), spec)
    pooled = _pool(k, v, table, spec, pool_logits)
    step = max(1, _ELEMENTS // max(1, q.shape[1] * len(k)))
    parts = [
        _audit(q, k, v, table, spec, result, chunk, bias, sink, pooled, choice)
        for chunk in rows.split(step)
    ]
    return RowAudit(*(torch.cat(x) for x in zip(*parts, strict=True)))


class _Pooled(NamedTuple):
    """The coarse entries of every block, and how far their tokens lie from the means."""

    complete: Tensor
    """[M] bool."""
    entries: CoarseEntries
    """[Hk, E, d] each, under the weights that the op has; they carry gradient."""
    means: CoarseEntries
    """The same under equal weights, which the theorem is about."""
    key_radius: Tensor
    """[Hk, E], largest distance of a key from the mean; no gradient."""
    value_radius: Tensor
    """[Hk, E], largest distance of a value from the mean; no gradient."""
    value_spread: Tensor
    """[Hk, E], root mean square distance of the values from the mean; no gradient."""


def _pool(
    k: Tensor, v: Tensor, table: BlockTable, spec: SparseAttentionSpec, pool_logits: Tensor | None
) -> _Pooled:
    """Of every block; tokens beyond an incomplete one are its last one again."""
    at = table.start.long().unsqueeze(1) + torch.arange(spec.block_size, device=k.device)
    at = torch.minimum(at, (table.end.long() - 1).clamp_min(0).unsqueeze(1)).view(-1)
    real = real_dtype(k.dtype)
    keys, values = (
        x[at].to(real).transpose(0, 1).unflatten(1, (-1, spec.coarse_block_size)) for x in (k, v)
    )
    means = pool_groups(keys, values)
    entries = means
    if pool_logits is not None:
        logits = pool_logits[at].transpose(0, 1).unflatten(1, (-1, spec.coarse_block_size))
        entries = weigh_groups(keys, values, logits, means)
    with torch.no_grad():
        key_distance = (keys - means.key_mean.unsqueeze(2)).norm(dim=-1)
        value_distance = (values - means.value_mean.unsqueeze(2)).norm(dim=-1)
        return _Pooled(
            table.end - table.start == spec.block_size,
            entries,
            means,
            key_distance.amax(2),
            value_distance.amax(2),
            value_distance.square().mean(2).sqrt(),
        )


def _audit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    spec: SparseAttentionSpec,
    result: AttentionOutput,
    rows: Tensor,
    bias: Tensor | None,
    sink: Tensor | None,
    pooled: _Pooled,
    choice: Tensor | None,
) -> RowAudit:
    num_rows = len(rows)
    _, heads, dim = q.shape
    kv_heads = k.shape[1]
    r = spec.entries_per_block
    real = real_dtype(q.dtype)
    scale = dim**-0.5
    shape = (num_rows, kv_heads, heads // kv_heads)
    queries = q[rows].to(real).view(*shape, dim).transpose(0, 1)  # [Hk, m, G, d]
    k, v = k.to(real), v.to(real)
    own, block_of = table.block_of[rows].long(), table.block_of.long()
    block = torch.arange(len(table.start), device=q.device)
    first, sink_end, local = (
        x[own].long().unsqueeze(1) for x in (table.first, table.sink_end, table.local_start)
    )
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
        true_mass.index_add_(3, block_of, token_probs)
        true_mass = torch.where(past[None, :, None], true_mass, 0.0)

    # The error is relative to the dense output, which is no shorter than rounding leaves it.
    ours = result.out[rows].to(real).view(*shape, dim).transpose(0, 1)
    lengths = v.detach().norm(dim=-1).T.unsqueeze(1).masked_fill(~visible, 0.0)
    largest = lengths.amax(-1).unsqueeze(-1)  # [Hk, m, 1]
    least_norm = (torch.finfo(real).eps * largest).clamp_min(torch.finfo(real).tiny)
    difference = ours - dense
    norm = torch.maximum(dense.norm(dim=-1), least_norm)

    # the coarse entries as the op sees them
    mean, value_entry, var = pooled.entries
    kappa = torch.zeros(*z.shape[:3], mean.shape[1], dtype=real, device=q.device)
    if spec.order == 2:
        kappa = 0.5 * scale**2 * torch.einsum("hmgd,hed->hmge", queries.square(), var)
        kappa = kappa.clamp_max(spec.max_variance)
    size = math.log(spec.coarse_block_size)
    c = scale * torch.einsum("hmgd,hed->hmge", queries, mean) + size + kappa
    # the least that the entry's tokens can weigh: their mean's mass
    with torch.no_grad():
        centre = scale * torch.einsum("hmgd,hed->hmge", queries, pooled.means.key_mean) + size
    block_logits = c.unflatten(-1, (-1, r)).logsumexp(-1).masked_fill(~past[None, :, None], _NEVER)
    some = past.any(1)[None, :, None]
    estimated = block_logits.masked_fill(~past[None, :, None], -1e30).log_softmax(-1)
    share = true_mass / true_mass.sum(-1, keepdim=True).clamp_min(torch.finfo(real).tiny)
    log_ratio = share.clamp_min(torch.finfo(real).tiny).log() - estimated
    kl = torch.where(share > 0, share * log_ratio, 0.0).sum(-1)
    kl = torch.where(some, kl, 0.0)

    # what the row saw by tokens, and what by coarse entries
    taken = _mask(result.selected[:, rows], len(block))
    candidates = (block >= sink_end) & (block < local)
    tail = candidates & pooled.complete & ~taken
    with torch.no_grad():
        found = taken if choice is None else _mask(choice[:, rows], len(block))
        candidate_mass, chosen_mass = (
            torch.where(x.unsqueeze(-2), true_mass, 0.0).sum(-1)
            for x in (candidates, candidates & found)
        )
    tail = tail.repeat_interleave(r, -1).unsqueeze(2)
    shift = torch.zeros(*z.shape[:3], 1, dtype=real, device=q.device)
    if bias is not None:
        shift = bias[rows].to(real).view(*shape, 1).transpose(0, 1)
    if spec.tail == "drop":
        tail = torch.zeros_like(tail)
    with torch.no_grad():
        sees = (
            taken | (past & ((block < sink_end) | (block >= local))) | (block == own.unsqueeze(1))
        )
        z_seen = z.masked_fill(~sees[..., block_of].unsqueeze(2), _NEVER)
        log_exact = z_seen.logsumexp(-1, keepdim=True)
        if sink is not None:
            log_exact = torch.logaddexp(log_exact, sink.to(real).view(kv_heads, 1, -1, 1))
        log_least, log_mass = (torch.where(tail, x, _NEVER) for x in (centre, c + shift))
        # with two levels, as if every super-block were open
        log_total = torch.logaddexp(log_exact, log_mass.logsumexp(-1, keepdim=True))
    coherence = ((log_mass - log_total).exp() * kappa).sum(-1)

    with torch.no_grad():
        # A logit is off by so many units in its last place, and a probability by as much in
        # proportion.
        longest = k.norm(dim=-1).T.unsqueeze(1).masked_fill(~visible, 0.0).amax(-1).unsqueeze(-1)
        reach = (
            scale * queries.norm(dim=-1) * longest
            + kappa.amax(-1)
            + shift.squeeze(-1).abs().clamp_max(100.0)
        )
        units = 8 + 4 * reach
        rounding = largest * torch.finfo(q.dtype).eps * units
        noise = largest * (torch.finfo(real).eps * units + torch.finfo(result.out.dtype).eps)
        # Both outputs are means of visible values (and of zero, the sink's), so neither is longer
        # than the largest.
        bounds = [largest + ours.norm(dim=-1)] * 2
        # the error of dropping is the dropped mass times a distance: exact, so a bound
        if spec.tail == "drop":
            bounds = [difference.norm(dim=-1)] * 2
        elif spec.num_levels == 1:
            spreads = _worst_case(queries, pooled, scale), _sub_gaussian(queries, pooled, scale)
            masses = log_exact, log_least, log_mass, c + shift - centre
            # An entry's value may be any: the tokens' mean is as far from it as from their mean
            # value, and that one's distance more.
            moved = (value_entry - pooled.means.value_mean).norm(dim=-1)[:, None, None]
            bounds = [
                torch.minimum(
                    farthest, _bound(ours, noise, *masses, value_entry, log_spread, away + moved)
                )
                for farthest, (log_spread, away) in zip(bounds, spreads, strict=True)
            ]

    def by_row(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(num_rows, heads)

    error = difference.detach().norm(dim=-1) / norm
    return RowAudit(
        by_row(error),
        by_row(bounds[0] / norm),
        by_row(bounds[1] / norm),
        by_row(kl),
        by_row(coherence),
        by_row((difference / norm.unsqueeze(-1)).square().sum(-1)),
        by_row(rounding / norm),
        by_row(candidate_mass),
        by_row(chosen_mass),
    )


def _mask(blocks: Tensor, num_blocks: int) -> Tensor:
    """[Hk, m, K] ids, -1 for none -> [Hk, m, num_blocks] bool."""
    blocks = blocks.long()
    taken = blocks.new_zeros((*blocks.shape[:2], num_blocks + 1), dtype=torch.bool)
    taken.scatter_(2, torch.where(blocks < 0, num_blocks, blocks), True)
    return taken[..., :-1]


def _worst_case(queries: Tensor, pooled: _Pooled, scale: float) -> tuple[Tensor, Tensor]:
    """Lemmas 1 and 2: largest log mass of an entry over its mean's, and largest shift of its mean
    value; [Hk, m, G, E].
    """
    delta = scale * queries.norm(dim=-1, keepdim=True) * pooled.key_radius[:, None, None]
    log_cosh = delta + torch.log1p(torch.exp(-2 * delta)) - math.log(2.0)
    shift = torch.minimum(
        2 * pooled.value_radius[:, None, None] * torch.tanh(delta / 2),
        2 * pooled.value_spread[:, None, None] * torch.sinh(delta.clamp_max(30) / 2),
    )
    return log_cosh, shift


def _sub_gaussian(queries: Tensor, pooled: _Pooled, scale: float) -> tuple[Tensor, Tensor]:
    """The same where logits within an entry are sub-Gaussian with the variance that the diagonal
    gives.
    """
    sigma2 = scale**2 * torch.einsum("hmgd,hed->hmge", queries.square(), pooled.means.key_var)
    return 0.5 * sigma2, pooled.value_spread[:, None, None] * torch.expm1(
        (2 * sigma2).clamp_max(60)
    ).sqrt()


def _bound(
    ours: Tensor,
    noise: Tensor,
    log_exact: Tensor,
    log_least: Tensor,
    log_mass: Tensor,
    added: Tensor,
    value_mean: Tensor,
    log_spread: Tensor,
    shift: Tensor,
) -> Tensor:
    """Theorem 1, [Hk, m, G]; infinite where it says nothing.

    noise [Hk, m, G]: how far rounding may have moved `ours`, which the theorem multiplies by the
    ratio of the masses. Logarithms of masses, in any common unit: of the exact part log_exact [Hk,
    m, G, 1]; of an entry the least it can be (its mean's), log_least, and the estimated one,
    log_mass = log_least + added, which may lie
    outside; the most it can be is log_least + log_spread. [Hk, m, G, E] each,
    -inf outside of the tail. Sums are of positive terms alone: 1 - (mass of the tail), as the
    theorem is written, loses everything where the tail has nearly all of it.
    """
    log_most = log_least + log_spread
    # the least mass of all is 1 or more in it
    unit = torch.maximum(log_exact, log_least.amax(-1, keepdim=True))
    least_of_all = (log_exact - unit).exp().squeeze(-1) + (log_least - unit).exp().sum(-1)
    exponents = [x - unit for x in (log_least, log_mass, log_most)]
    least, mass, most = (x.clamp_max(_LARGEST).exp() for x in exponents)
    # |most - mass| and |mass - least| from the difference of the logarithms, which need not be
    # small to matter
    above = torch.maximum(most, mass) * -torch.expm1(-(log_spread - added).abs())
    below = torch.maximum(mass, least) * -torch.expm1(-added.abs())
    distance = torch.cdist(
        ours, value_mean.unsqueeze(1), compute_mode="donot_use_mm_for_euclid_dist"
    )
    distance = distance + noise.unsqueeze(-1)
    found = (torch.maximum(above, below) * distance + most * shift).sum(-1) / least_of_all
    vacuous = torch.stack(exponents).amax((0, -1)) > _LARGEST
    return found.masked_fill(vacuous, float("inf"))
