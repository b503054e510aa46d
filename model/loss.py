"""Losses as sums with counts; whoever knows the global counts divides. See docs/numerics.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model.config import BalanceConfig
from ops.router import RouterOutput

IGNORE_INDEX = -100
"""Target of positions that are not predicted: padding, and the first token of the next document."""


class ModelOutput(NamedTuple):
    """Sums over this rank's micro-batch. A NamedTuple so that ZeRO-3's hooks find the tensors
    inside. Of a stage of a pipeline, tables have rows for its own layers alone, and the losses that
    the last stage makes are 0 on others.
    """

    loss_sum: torch.Tensor
    """[] fp32, cross-entropy in nats over targets other than IGNORE_INDEX."""
    aux_sum: torch.Tensor
    """[] fp32, balance loss per token, summed over tokens and MoE layers."""
    z_sum: torch.Tensor
    """[] fp32, z-loss per token, summed over tokens and MoE layers."""
    penalty_sum: torch.Tensor
    """[] fp32, further penalties per token, already weighted: the routers' entropy and
    orthogonality, sparse attention's regularisers.
    """
    counts: torch.Tensor
    """[moe_layers, num_experts] int64, local assignments; [0, 0] for a dense model."""
    scope_counts: torch.Tensor
    """[moe_layers, num_experts] int64, the counts over the auxiliary loss's scope so far; equal to
    `counts` when that loss is off.
    """
    stats: torch.Tensor
    """[moe_layers, size] int64, all integer statistics of the routers
    (model.moe.balance.pack_stats).
    """
    processed: torch.Tensor
    """[] int64, rows that this rank's experts computed, over all MoE layers."""
    routings: tuple[RouterOutput, ...]
    """One RouterOutput per MoE layer, where they were asked for; else empty."""
    attention_stats: torch.Tensor
    """[sparse layers, len(STATS)] fp32 (model.attention.base), zeros unless they were asked for."""
    token_losses: torch.Tensor
    """[B, S] fp32, cross-entropy of every position (0 without target), when routings are kept in
    evaluation; else empty.
    """
    mtp_sums: torch.Tensor
    """[model.num_mtp_layers] fp32, cross-entropy in nats over the targets of each module of
    multi-token prediction (targets_ahead); empty in evaluation.
    """
    hidden: torch.Tensor | None = None
    """[B, S, D] with gradient, what the next stage goes on with; None where there is none."""


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in fp32: logits [..., vocab_size], targets [...] int64 with
    IGNORE_INDEX.
    """
    return F.cross_entropy(
        logits.float().view(-1, logits.shape[-1]),
        targets.reshape(-1),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


def token_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every position in fp32, 0 where the target is IGNORE_INDEX: of the shape of
    targets.
    """
    return F.cross_entropy(
        logits.float().view(-1, logits.shape[-1]),
        targets.reshape(-1),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    ).view_as(targets)


def is_ahead(positions: torch.Tensor, number: int) -> torch.Tensor:
    """[B, S] positions that restart at 0 in each document -> [B, S] bool: whether the token
    `number` places further on is of the same document and row.
    """
    later = torch.full_like(positions, -1)
    later[:, : max(0, positions.shape[1] - number)] = positions[:, number:]
    return later == positions + number


def targets_ahead(targets: torch.Tensor, positions: torch.Tensor, number: int) -> torch.Tensor:
    """[B, S] targets of the tokens `number` places further on, IGNORE_INDEX where the document or
    the row ends before: what module number - 1 of multi-token prediction predicts.
    """
    return torch.where(is_ahead(positions, number), targets.roll(-number, 1), IGNORE_INDEX)


def training_loss(
    output: ModelOutput,
    num_targets: int,
    num_tokens: int,
    balance: BalanceConfig,
    mtp_coeff: float = 0.0,
    num_mtp_targets: Sequence[int] = (),
) -> torch.Tensor:
    """This micro-batch's share of the step's loss; shares of all ranks and micro-batches add up to
    the whole.

    num_targets, num_tokens: predicted targets and unpadded tokens of the entire step, over ranks
        and micro-batches.
    mtp_coeff: weight of the mean over modules of multi-token prediction of their mean losses;
        num_mtp_targets: of each module, as num_targets.
    """
    loss = output.loss_sum / max(num_targets, 1) + output.penalty_sum / max(num_tokens, 1)
    if balance.aux_loss_coeff > 0:
        loss = loss + balance.aux_loss_coeff * output.aux_sum / max(num_tokens, 1)
    if balance.z_loss_coeff > 0:
        loss = loss + balance.z_loss_coeff * output.z_sum / max(num_tokens, 1)
    for mtp_sum, number in zip(output.mtp_sums, num_mtp_targets, strict=True):
        loss = loss + mtp_coeff / len(num_mtp_targets) * mtp_sum / max(number, 1)
    return loss
