"""Losses as sums with counts; whoever knows the global counts divides. See docs/numerics.md."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from model.config import BalanceConfig
from ops.router import RouterOutput

IGNORE_INDEX = -100
"""Target of positions that are not predicted: padding, and the first token of the next document."""


class ModelOutput(NamedTuple):
    """Sums over this rank's micro-batch. A NamedTuple so that ZeRO-3's hooks find the tensors inside.

    loss_sum: [] fp32, cross-entropy in nats over targets other than IGNORE_INDEX.
    aux_sum, z_sum: [] fp32, balance and z-loss per token, summed over tokens and MoE layers.
    penalty_sum: [] fp32, further penalties, per token, already weighted: the routers' entropy and orthogonality,
        sparse attention's regularisers.
    counts: [moe_layers, num_experts] int64, local assignments; [0, 0] for a dense model.
    scope_counts: the counts over the auxiliary loss's scope so far (equal to `counts` when that loss is off).
    stats: [moe_layers, size] int64, all integer statistics of the routers (model.balance.pack_stats).
    processed: [] int64, rows that this rank's experts computed, over all MoE layers.
    routings: one RouterOutput per MoE layer, where they were asked for.
    attention_stats: [sparse layers, len(STATS)] fp32 (model.attention.base), zeros unless they were asked for.
    token_losses: [B, S] fp32, cross-entropy of every position (0 without target), when routings are kept in evaluation;
        else empty.
    """

    loss_sum: torch.Tensor
    aux_sum: torch.Tensor
    z_sum: torch.Tensor
    penalty_sum: torch.Tensor
    counts: torch.Tensor
    scope_counts: torch.Tensor
    stats: torch.Tensor
    processed: torch.Tensor
    routings: tuple[RouterOutput, ...]
    attention_stats: torch.Tensor
    token_losses: torch.Tensor


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in fp32: logits [..., vocab_size], targets [...] int64 with IGNORE_INDEX."""
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1),
                           ignore_index=IGNORE_INDEX, reduction="sum")


def token_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every position in fp32, 0 where the target is IGNORE_INDEX: of the shape of targets."""
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORE_INDEX,
                           reduction="none").view_as(targets)


def training_loss(output: ModelOutput, num_targets: int, num_tokens: int, balance: BalanceConfig) -> torch.Tensor:
    """This micro-batch's share of the step's loss; shares of all ranks and micro-batches add up to the whole.

    num_targets, num_tokens: predicted targets and unpadded tokens of the entire step, over ranks and micro-batches.
    """
    loss = output.loss_sum / max(num_targets, 1) + output.penalty_sum / max(num_tokens, 1)
    if balance.aux_loss_coeff > 0:
        loss = loss + balance.aux_loss_coeff * output.aux_sum / max(num_tokens, 1)
    if balance.z_loss_coeff > 0:
        loss = loss + balance.z_loss_coeff * output.z_sum / max(num_tokens, 1)
    return loss
