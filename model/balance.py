"""Load balance: per-layer sums, the auxiliary loss built from them, and the loss-free bias. See docs/numerics.md.

Everything leaves a layer as a sum over its local tokens, so adding up ranks and micro-batches gives the global value.
Recomputed layers return the same sums a second time; only the first forward's are used, so nothing counts twice.
Shape letters: T tokens, E experts, N sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from model.config import BalanceConfig
from model.parallel import ParallelGroups
from model.routers.base import Router, Routing


class RouterSums(NamedTuple):
    """One MoE layer, summed over the local tokens of a micro-batch.

    counts: [E] int64, assignments per expert.
    score_sums: [E] fp32 with gradient, sum of each token's scores normalised to 1.
    z_sum: [] fp32 with gradient, sum of squared log-sum-exp.
    sequence_aux_sum: [] fp32 with gradient, auxiliary loss per sequence times its tokens; 0 unless scope is sequence.
    processed: rows this rank's experts computed (of any rank's tokens); over all ranks, counts minus these were dropped.
    """

    counts: torch.Tensor
    score_sums: torch.Tensor
    z_sum: torch.Tensor
    sequence_aux_sum: torch.Tensor
    processed: int = 0


def router_sums(routing: Routing, token_mask: torch.Tensor | None, num_sequences: int,
                balance: BalanceConfig) -> RouterSums:
    """Statistics of one layer. routing has T = num_sequences * S tokens in row order; masked tokens count nowhere."""
    num_experts = routing.scores.shape[1]
    probabilities = routing.scores / routing.scores.sum(-1, keepdim=True).clamp_min(1e-20)
    log_z_squared = routing.log_z.square()
    if token_mask is not None:
        probabilities = probabilities * token_mask.unsqueeze(1)
        log_z_squared = log_z_squared * token_mask
    sequence_aux_sum = routing.scores.new_zeros(())
    if balance.aux_loss_coeff > 0 and balance.aux_loss_scope == "sequence":
        counts_NE = _counts(routing.expert_ids.view(num_sequences, -1), num_experts)
        score_sums_NE = probabilities.view(num_sequences, -1, num_experts).sum(1)
        counts = counts_NE.sum(0)
        sequence_aux_sum = (load_fractions(counts_NE) * score_sums_NE).sum() * num_experts
        return RouterSums(counts, score_sums_NE.sum(0), log_z_squared.sum(), sequence_aux_sum)
    counts = _counts(routing.expert_ids.reshape(1, -1), num_experts)[0]
    return RouterSums(counts, probabilities.sum(0), log_z_squared.sum(), sequence_aux_sum)


def _counts(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[N, slots] ids with -1 for unused -> [N, num_experts] int64."""
    keys = torch.where(expert_ids < 0, num_experts, expert_ids)
    table = torch.zeros(expert_ids.shape[0], num_experts + 1, dtype=torch.int64, device=expert_ids.device)
    return table.scatter_add_(1, keys, torch.ones_like(keys))[:, :num_experts]


def load_fractions(counts: torch.Tensor) -> torch.Tensor:
    """[..., E] counts -> fp32 shares of all assignments, which sum to 1 (0 where there are none)."""
    return counts.float() / counts.sum(-1, keepdim=True).clamp_min(1).float()


def auxiliary_loss_sum(counts: torch.Tensor, score_sums: torch.Tensor, balance: BalanceConfig, groups: ParallelGroups,
                       previous_counts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Local share of E * sum_e f_e * P_e (Switch eq. 4), summed over layers and multiplied by the number of tokens.

    counts, score_sums: [layers, E] of this rank's micro-batch. The load fractions f are taken over the scope: all
    data-parallel ranks of this micro-batch, plus `previous_counts` (the earlier micro-batches of the step, already
    summed over ranks) for global_batch. They carry no gradient, so each rank's share is linear in its own scores and
    the shares of all ranks add up to the loss of the union of their tokens.

    Returns:
        the sum ([] fp32) and the counts over the scope [layers, E], to be passed on as `previous_counts`.
    """
    scope_counts = counts
    if groups.data_size > 1:
        scope_counts = counts.clone()
        dist.all_reduce(scope_counts, group=groups.data)
    if balance.aux_loss_scope == "global_batch" and previous_counts is not None:
        scope_counts = scope_counts + previous_counts
    return (load_fractions(scope_counts) * score_sums).sum() * counts.shape[1], scope_counts


@torch.no_grad()
def update_balance_bias(routers: list[Router], global_counts: torch.Tensor, update_rate: float) -> None:
    """Raise the bias of under-loaded experts and lower that of over-loaded ones by `update_rate` (arXiv 2408.15664).

    global_counts: [layers, E] int64 over the whole step and all ranks, so that every rank makes the same update.
    The mean is subtracted, which leaves the selection unchanged and keeps the bias from drifting.
    """
    for router, counts in zip(routers, global_counts, strict=True):
        error = counts.float().mean() - counts.float()
        step = update_rate * error.sign()
        router.balance_bias += (step - step.mean()).to(router.balance_bias.device)


def balance_metrics(counts: torch.Tensor, layers: tuple[int, ...] | None = None) -> dict[str, float]:
    """Summary of [moe_layers, E] global counts: the numbers people watch. Load is relative to the layer's mean (1 = fair).

    layers: transformer layer of each row, for moe/max_load_layer; None: the rows' own numbers.
    """
    load = counts.double() / counts.double().mean(-1, keepdim=True).clamp_min(1e-9)
    fractions = load / load.sum(-1, keepdim=True).clamp_min(1e-9)
    entropy = -(fractions * fractions.clamp_min(1e-30).log()).sum(-1)
    max_load, layer = load.max(-1).values.max(0)
    return {
        "moe/max_load": float(max_load),
        "moe/max_load_layer": int(layer) if layers is None else layers[int(layer)],
        "moe/min_load": float(load.min()),
        "moe/load_cv": float(load.std(-1, unbiased=False).mean()),
        "moe/load_entropy": float(entropy.mean()),
        "moe/dead_experts": int((counts == 0).sum()),
    }
