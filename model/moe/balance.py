"""Load balance: per-layer sums, the losses built from them, the selection bias, and the metrics.
See docs/numerics.md.

Everything leaves a layer as a sum over its local tokens, so adding up ranks and micro-batches gives
the global value. Recomputed layers return the same sums a second time; only the first forward's are
used, so nothing counts twice. Shape letters: T tokens, E experts, N sequences, K slots, B histogram
bins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from model.config import BalanceConfig
from model.parallel.groups import ParallelGroups
from model.placement.planner import copy_shares
from model.placement.record import LayerPlacement, Placement
from model.routers.base import Router
from model.routers.state import RouterInputs
from ops.router import NUM_REASONS, Reason, RouterOutput

ENTROPY_UNIT = 2.0**-20
"""Nats per unit of the entropy in the packed integers: sums of integers are the same in any
order.
"""

MIN_RANGE = 1e-5
"""Narrowest range of a score histogram."""


class RouterSums(NamedTuple):
    """One MoE layer, summed over the local tokens of a micro-batch."""

    stats: torch.Tensor
    """[size] int64, everything that is counted (pack_stats)."""
    counts: torch.Tensor
    """[N, E] int64, assignments per expert (N: sequences, or 1)."""
    score_sums: torch.Tensor
    """[N, E] fp32 with gradient, sums of each token's normalised scores."""
    z_sum: torch.Tensor
    """[] fp32 with gradient, sum of the squared log-sum-exp of the router's logits."""
    entropy_sum: torch.Tensor
    """[] fp32 with gradient, sum of the entropy of the router's softmax, in nats."""
    orthogonality_sum: torch.Tensor
    """[] fp32 with gradient, the layer's orthogonality loss times its tokens; 0 where it is off."""
    processed: torch.Tensor
    """[] int64, rows this rank's experts computed, of any rank's tokens. Over all ranks, counts
    minus these were dropped on the way.
    """


class BalanceSums(NamedTuple):
    """All MoE layers, summed over the local tokens of a micro-batch."""

    aux_sum: torch.Tensor
    """[] fp32 with gradient, the balance loss per token; 0 where it is off."""
    z_sum: torch.Tensor
    """[] fp32 with gradient, the z-loss per token, unweighted."""
    penalties: tuple[torch.Tensor, ...]
    """[] fp32 with gradient each, the further losses that are on, weighted: the entropy of the
    routers and their orthogonality.
    """
    counts: torch.Tensor
    """[L, E] int64, local assignments."""
    scope_counts: torch.Tensor
    """[L, E] int64, the counts over the scope of the balance loss so far."""
    stats: torch.Tensor
    """[L, size] int64, everything that is counted (pack_stats)."""
    processed: torch.Tensor
    """[] int64, rows this rank's experts computed."""


class LayerStats(NamedTuple):
    """What was counted, per layer; int64 unless said otherwise."""

    counts: torch.Tensor
    """[L, E] assignments per expert."""
    k_histogram: torch.Tensor
    """[L, K + 1] tokens by number of experts."""
    reasons: torch.Tensor
    """[L, NUM_REASONS] tokens by bit of ops.router.Reason."""
    null_count: torch.Tensor
    """[L] null experts chosen."""
    checksum: torch.Tensor
    """[L] sum modulo 2^64 of a mix of (token id, expert)."""
    entropy: torch.Tensor
    """[L] float64, entropy of the router's softmax summed over tokens, in nats."""
    overflow: torch.Tensor
    """[L, 2] assignments that moved to another expert, and that were dropped."""
    histogram: torch.Tensor
    """[L, E, B] tokens by score."""

    @property
    def tokens(self) -> torch.Tensor:
        """[L] int64, unmasked tokens."""
        return self.k_histogram.sum(1)

    @property
    def experts_per_token(self) -> torch.Tensor:
        """[L] fp32, mean number of experts."""
        return self.counts.sum(1).float() / self.tokens.clamp_min(1).float()


def pack_stats(routing: RouterOutput, lowered_limit: torch.Tensor) -> torch.Tensor:
    """All integers of one layer in one [size] int64 vector, so that one all-reduce serves balance,
    budget and logging.

    lowered_limit: [] bool, True while rank overload has lowered the limit of experts per token:
        tokens that it cuts off count as OVERLOADED instead of CAPPED.
    """
    reasons = routing.reason_counts.clone()
    moved = torch.where(lowered_limit, reasons[Reason.CAPPED.bit], 0)
    reasons[Reason.CAPPED.bit] -= moved
    reasons[Reason.OVERLOADED.bit] += moved
    entropy = (routing.entropy_sum.detach().double() / ENTROPY_UNIT).round().long()
    return torch.cat(
        (
            routing.counts.sum(0),
            routing.k_histogram,
            reasons,
            routing.null_count.view(1),
            routing.checksum.view(1),
            entropy.view(1),
            routing.overflow,
            routing.histogram.flatten().long(),
        )
    )


def stats_size(num_experts: int, num_slots: int, num_bins: int) -> int:
    """Integers of one layer in pack_stats."""
    return num_experts * (1 + num_bins) + num_slots + 1 + NUM_REASONS + 5


def unpack_stats(stats: torch.Tensor, num_experts: int, num_slots: int) -> LayerStats:
    """[L, size] of pack_stats -> the parts; what is left over at the end is the histogram."""
    sizes = (num_experts, num_slots + 1, NUM_REASONS, 1, 1, 1, 2)
    rest = stats.shape[-1] - sum(sizes)
    if stats.dim() != 2 or rest < 0 or rest % num_experts:
        raise ValueError(
            f"stats {tuple(stats.shape)} are not those of {num_experts} experts and {num_slots} "
            f"slots ([layers, {sum(sizes)} + {num_experts} * bins]); give the routers' max_top_k "
            "as num_slots"
        )
    counts, k_histogram, reasons, null_count, checksum, entropy, overflow, histogram = stats.split(
        (*sizes, rest), dim=1
    )
    return LayerStats(
        counts,
        k_histogram,
        reasons,
        null_count[:, 0],
        checksum[:, 0],
        entropy[:, 0].double() * ENTROPY_UNIT,
        overflow,
        histogram.reshape(len(stats), num_experts, -1),
    )


def histogram_bins(balance: BalanceConfig, router: Router) -> int:
    """Bins the layers count: as configured where a quantile is asked for, else none."""
    return (
        balance.histogram_bins
        if balance.bias_update == "quantile" or router.has_quantile_bias
        else 0
    )


def router_sums(
    routing: RouterOutput, router: Router, balance: BalanceConfig, processed: torch.Tensor
) -> RouterSums:
    """The sums of one layer from its routing. Of a router whose choice nothing may move, what
    presses on the choice is left out, and the z-loss, which holds its logits, is not.
    """
    limit = RouterInputs.of(router.inputs_in_force()).limit
    stats = pack_stats(routing, limit < router.max_top_k)
    orthogonality = routing.z_sum.new_zeros(())
    score_sums, entropy_sum = routing.score_sums, routing.entropy_sum
    if not router.is_balanced:
        score_sums, entropy_sum = torch.zeros_like(score_sums), torch.zeros_like(entropy_sum)
    elif balance.orthogonality_coeff > 0:
        orthogonality = (
            orthogonality_loss(router.weight[: router.spec.num_experts]) * routing.k_histogram.sum()
        )
    return RouterSums(
        stats,
        routing.counts,
        score_sums,
        routing.z_sum,
        entropy_sum,
        orthogonality,
        processed,
    )


def balance_sums(
    layers: list[RouterSums],
    balance: BalanceConfig,
    groups: ParallelGroups,
    previous_counts: torch.Tensor | None,
) -> BalanceSums:
    """The sums of all MoE layers, at least one, from those of each. Collective over the ranks that
    the scope of the balance loss spans.

    previous_counts: see auxiliary_loss_sums.
    """
    counts = torch.stack([layer.counts for layer in layers])
    z_sum = torch.stack([layer.z_sum for layer in layers]).sum()

    # Losses that are off are left out, not multiplied by zero: a NaN in them must not count.
    penalties = []
    if balance.entropy_coeff > 0:
        entropy = torch.stack([layer.entropy_sum for layer in layers]).sum()
        penalties.append(balance.entropy_coeff * entropy)
    if balance.orthogonality_coeff > 0:
        orthogonality = torch.stack([layer.orthogonality_sum for layer in layers]).sum()
        penalties.append(balance.orthogonality_coeff * orthogonality)

    aux_sum, scope_counts = z_sum.new_zeros(()), counts.sum(1)
    if balance.aux_loss_coeff > 0:
        score_sums = torch.stack([layer.score_sums for layer in layers])
        aux_sums, scope_counts = auxiliary_loss_sums(
            counts, score_sums, balance.aux_loss_scope, groups, previous_counts
        )
        aux_sum = aux_sums.sum()
    return BalanceSums(
        aux_sum=aux_sum,
        z_sum=z_sum,
        penalties=tuple(penalties),
        counts=counts.sum(1),
        scope_counts=scope_counts,
        stats=torch.stack([layer.stats for layer in layers]),
        processed=torch.stack([layer.processed for layer in layers]).sum(),
    )


def no_balance_sums(like: torch.Tensor, num_experts: int = 0, size: int = 0) -> BalanceSums:
    """What a model without MoE layers has, or a stage of one, on the device and in the dtype of
    `like`: tables without rows. size: of pack_stats where other stages have experts.
    """
    empty = torch.zeros((0, num_experts), dtype=torch.int64, device=like.device)
    zero = like.new_zeros(())
    return BalanceSums(
        aux_sum=zero,
        z_sum=zero,
        penalties=(),
        counts=empty,
        scope_counts=empty,
        stats=empty.new_zeros((0, size)),
        processed=empty.sum(),
    )


def orthogonality_loss(weight: torch.Tensor) -> torch.Tensor:
    """[E, D] -> [] fp32: |R R^T - I|_1 / E over the normalised rows R (SimBal, arXiv
    2506.14038).
    """
    rows = torch.nn.functional.normalize(weight.float(), dim=1)
    return (rows @ rows.T - torch.eye(len(rows), device=rows.device)).abs().sum() / len(rows)


def rank_shares(
    num_experts: int, num_layers: int, num_ranks: int, placement: Placement | None
) -> torch.Tensor | None:
    """[L, E, R] float64: the share of an expert's assignments that each rank of its expert group
    computes; None for one rank.
    """
    if num_ranks == 1:
        return None
    layers = (
        placement.layers
        if placement
        else (LayerPlacement.identity(num_experts, num_ranks),) * num_layers
    )
    return torch.stack([torch.from_numpy(copy_shares(layer)) for layer in layers])


def rank_loads(counts: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """[L, E] assignments by expert -> [L, R] float64 by rank."""
    return torch.einsum("le,ler->lr", counts.double(), shares.to(counts.device))


def busiest_experts(
    counts: torch.Tensor, experts_per_token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[L, E] counts, [L] mean experts per token -> k [L] int64, the rounded mean; assignments [L]
    of the busiest k experts and of all, in the dtype of the counts.
    """
    k = experts_per_token.round().long().clamp(1, counts.shape[1])
    ranked = counts.sort(dim=1, descending=True).values.cumsum(1)
    return k, ranked.gather(1, k.unsqueeze(1) - 1)[:, 0], ranked[:, -1]


def load_fractions(counts: torch.Tensor) -> torch.Tensor:
    """[..., E] counts -> fp32 shares of all assignments, which sum to 1 (0 where there are
    none).
    """
    return counts.float() / counts.sum(-1, keepdim=True).clamp_min(1).float()


def auxiliary_loss_sums(
    counts: torch.Tensor,
    score_sums: torch.Tensor,
    scope: str,
    groups: ParallelGroups,
    previous_counts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Local share of E * sum_e f_e * P_e (Switch eq. 4) of each layer, multiplied by the number of
    tokens.

    counts, score_sums: [layers, N, E] of this rank's micro-batch. The load fractions f are taken
        over the scope: the sequence (N of them), all ranks of this micro-batch (batch), plus
        `previous_counts` (the earlier micro-batches of the step, already summed over ranks) for
        global_batch. They carry no gradient, so each rank's share is linear in its own scores and
        the shares of all ranks add up to the loss of the union of their tokens.

    Returns:
        the sums ([layers] fp32) and the counts over the scope [layers, E], to be passed on as
        `previous_counts`.
    """
    num_experts = counts.shape[2]
    scope_counts = counts.sum(1)
    if scope == "sequence":
        # Of whole sequences, which the ranks that share rows have parts of.
        if groups.parts_size > 1:
            counts = counts.clone()
            dist.all_reduce(counts, group=groups.parts)
        return (load_fractions(counts) * score_sums).sum((1, 2)) * num_experts, scope_counts
    if groups.stage_size > 1:
        dist.all_reduce(scope_counts, group=groups.stage)
    if scope == "global_batch" and previous_counts is not None:
        scope_counts = scope_counts + previous_counts
    return (load_fractions(scope_counts) * score_sums.sum(1)).sum(1) * num_experts, scope_counts


@torch.no_grad()
def update_balance_bias(
    routers: list[Router], global_counts: torch.Tensor, update_rate: float
) -> None:
    """Raise the bias of under-loaded experts and lower that of over-loaded ones by `update_rate`
    (arXiv 2408.15664).

    global_counts: [layers, E] int64 over the whole step and all ranks, so that every rank makes the
        same update. The mean is subtracted, which leaves the selection unchanged and keeps the bias
        from drifting.
    """
    for router, counts in zip(routers, global_counts, strict=True):
        error = counts.float().mean() - counts.float()
        step = update_rate * error.sign()
        router.balance_bias[: len(counts)] += (step - step.mean()).to(router.balance_bias.device)


def histogram_quantile(
    histogram: torch.Tensor, ranges: torch.Tensor, level: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Quantiles by linear interpolation inside a bin.

    histogram: [..., B] counts; ranges: [..., 2] lowest value and bins per unit; level: [...] in [0,
        1]. Returns the values [...] fp32, and whether they fell below or above what the bins
        resolve ([...] bool each).
    """
    num_bins = histogram.shape[-1]
    total = histogram.sum(-1)
    below_or_in = histogram.cumsum(-1)
    rank = level * total
    place = torch.searchsorted(below_or_in.float(), rank.unsqueeze(-1).float().contiguous())
    place = place[..., 0].clamp(max=num_bins - 1)
    inside = histogram.gather(-1, place.unsqueeze(-1))[..., 0]
    before = below_or_in.gather(-1, place.unsqueeze(-1))[..., 0] - inside
    fraction = ((rank - before) / inside.clamp_min(1)).clamp(0, 1)
    return ranges[..., 0] + (place + fraction) / ranges[..., 1], place == 0, place == num_bins - 1


@torch.no_grad()
def quantile_cuts(
    stats: LayerStats, ranges: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cut above which each expert meets its mean number of assignments per token, and the
    ranges for the next step.

    ranges: [L, E, 2]; share: [L, E], assignments per token. The next range reaches from twice the
        distance of the quantile at four times the share below to that at a quarter of it above. It
        shrinks by no more than half at a time, doubles towards a side where one of those lies
        outside, and grows fivefold where the cut itself does: a range that has lost its scores
        finds them again in a few steps, however narrow it was. Returns [L, E] and [L, E, 2] fp32.
    """
    num_bins = stats.histogram.shape[2]
    share = share.clamp(1e-4, 1 - 1e-4)
    cut, lost_below, lost_above = histogram_quantile(stats.histogram, ranges, 1 - share)
    low, under, _ = histogram_quantile(stats.histogram, ranges, 1 - (4 * share).clamp(max=0.95))
    high, _, over = histogram_quantile(stats.histogram, ranges, 1 - share / 4)

    # Each side by itself: from the quantile beyond the cut, or outwards where that was not in the
    # bins.
    width = num_bins / ranges[..., 1]
    bottom, top = ranges[..., 0], ranges[..., 0] + width
    bottom_next = torch.where(under, bottom - width, cut - 2 * (cut - low))
    top_next = torch.where(over, top + width, cut + 2 * (high - cut))

    # Where the cut itself was not, the lost side goes far out and the other stays.
    bottom_next = torch.where(lost_above, bottom, bottom_next)
    bottom_next = torch.where(lost_below, bottom - 4 * width, bottom_next)
    top_next = torch.where(lost_below, top, top_next)
    top_next = torch.where(lost_above, top + 4 * width, top_next)

    width_next = torch.maximum(top_next - bottom_next, width / 2).clamp_min(MIN_RANGE)
    middle = (bottom_next + top_next) / 2
    return cut, torch.stack((middle - width_next / 2, num_bins / width_next), dim=-1)


def balance_metrics(
    counts: torch.Tensor, layers: tuple[int, ...] | None = None
) -> dict[str, float]:
    """Summary of [moe_layers, E] global counts: the numbers people watch. Load is relative to the
    layer's mean (1 = fair).

    layers: transformer layer of each row, for moe/max_load_layer; None: the rows' own numbers.
    """
    num_experts = counts.shape[1]
    load = counts.double() / counts.double().mean(-1, keepdim=True).clamp_min(1e-9)
    fractions = load / load.sum(-1, keepdim=True).clamp_min(1e-9)
    entropy = -(fractions * fractions.clamp_min(1e-30).log()).sum(-1)

    # The layer that is worst off has a metric of its own.
    max_load, layer = load.max(-1).values.max(0)

    # Gini coefficient of sorted loads x_i: sum (2 i - n - 1) x_i / (n sum x_i).
    ranked = load.sort(-1).values
    rank = torch.arange(1, num_experts + 1, dtype=torch.float64, device=counts.device)
    weights = 2 * rank - num_experts - 1
    gini = (ranked * weights).sum(-1) / (num_experts * ranked.sum(-1)).clamp_min(1e-9)

    return {
        "moe/max_load": float(max_load),
        "moe/max_load_layer": int(layer) if layers is None else layers[int(layer)],
        "moe/min_load": float(load.min()),
        "moe/max_vio": float(load.max(-1).values.mean()) - 1,
        "moe/load_cv": float(load.std(-1, unbiased=False).mean()),
        "moe/load_gini": float(gini.mean()),
        "moe/load_entropy": float(entropy.mean()),
        "moe/dead_experts": int((counts == 0).sum()),
        "moe/dead_fraction": float((load < 0.05).double().mean()),
        "moe/hot_fraction": float(fractions.max()),
    }
