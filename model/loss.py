"""Losses as sums with counts; whoever knows the global counts divides. See docs/numerics.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model.config import BalanceConfig
from model.parallel.tensor import TensorExchange
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
    kl_sum: torch.Tensor
    """[] fp32, divergence from a teacher in nats over the targets (model/distillation.py), at its
    temperature; 0 without a teacher.
    """
    agreed: torch.Tensor
    """[] int64, targets at which the likeliest token is the teacher's; 0 without a teacher."""
    hidden: torch.Tensor
    """[B, S, D] without a gradient, what the head projected, where it was asked for; else empty."""
    largest_logits: torch.Tensor
    """[layers, heads] fp32, the largest attention logit of each head, those of multi-token
    prediction last; -inf of heads that other ranks attend with. Empty where it was not asked for.
    """
    logit_z_sum: torch.Tensor
    """[] fp32, squared logsumexp of the output logits, summed over the targets of loss_sum; 0
    where it was not asked for.
    """
    handed_on: torch.Tensor | None = None
    """[B, S, D] with gradient, what the next stage goes on with; None where there is none."""


def joined(outputs: Sequence[ModelOutput]) -> ModelOutput:
    """Of a stage's laps, in their order -> that of all its layers, without what was handed on. Of
    one alone: itself.
    """
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]

    def of(name: str) -> list[torch.Tensor]:
        return [getattr(output, name) for output in outputs]

    summed = {name: torch.stack(of(name)).sum(0) for name in SUMS}
    tables = {name: torch.cat(of(name)) for name in TABLES}
    return last._replace(
        **summed,
        **tables,
        routings=tuple(routing for output in outputs for routing in output.routings),
        handed_on=None,
    )


SUMS = (
    *("loss_sum", "aux_sum", "z_sum", "penalty_sum", "processed", "mtp_sums", "kl_sum", "agreed"),
    "logit_z_sum",
)
"""Fields of ModelOutput that add up over a model's layers."""
TABLES = ("counts", "scope_counts", "stats", "attention_stats", "largest_logits")
"""Those with rows by layer."""


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


class _CrossEntropyAndZ(torch.autograd.Function):
    """One pass over the logits each way: backward makes a single tensor of their size."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normalizer = logits.float().logsumexp(1)
        counted = targets != IGNORE_INDEX
        ctx.save_for_backward(logits, targets, normalizer)
        chosen = logits.gather(1, targets.clamp_min(0)[:, None]).float()[:, 0]
        zero = normalizer.new_zeros(())
        losses = torch.where(counted, normalizer - chosen, zero)
        return losses.sum(), torch.where(counted, normalizer.square(), zero).sum()

    @staticmethod
    def backward(ctx: Any, of_loss: torch.Tensor, of_z: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, normalizer = ctx.saved_tensors
        counted = (targets != IGNORE_INDEX).float()
        gradient = (logits.float() - normalizer[:, None]).exp_()
        gradient *= (counted * (of_loss + 2 * of_z * normalizer))[:, None]
        gradient.scatter_add_(1, targets.clamp_min(0)[:, None], -(counted * of_loss)[:, None])
        return gradient.to(logits.dtype), None


def cross_entropy_and_z_sums(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cross_entropy_sum, and the sum of logsumexp(logits) squared over the same positions, both
    [] fp32: the z-loss of output logits (Chowdhery et al., PaLM, arXiv 2204.02311, section 5),
    which keeps their normalizer near 1.

    Args:
        logits: [..., vocab_size]; targets: [...] int64 with IGNORE_INDEX.
    """
    sums: tuple[torch.Tensor, torch.Tensor] = _CrossEntropyAndZ.apply(  # type: ignore[no-untyped-call]
        logits.view(-1, logits.shape[-1]), targets.reshape(-1)
    )
    return sums


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


class _SharedCrossEntropy(torch.autograd.Function):
    """As _CrossEntropyAndZ, of logits whose vocabulary is shared out."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, tensor: TensorExchange
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values = logits.float()
        top = values.amax(1)
        tensor.reduce(top, dist.ReduceOp.MAX)

        counted = targets != IGNORE_INDEX
        places = targets - tensor.rank * logits.shape[1]
        here = counted & (places >= 0) & (places < logits.shape[1])
        places = places.clamp(0, logits.shape[1] - 1)
        zero = top.new_zeros(())
        chosen = torch.where(here, values.gather(1, places[:, None])[:, 0], zero)
        both = torch.stack(((values - top[:, None]).exp_().sum(1), chosen))
        tensor.reduce(both, dist.ReduceOp.SUM)

        normalizer = top + both[0].log()
        ctx.save_for_backward(logits, places, here, counted, normalizer)
        losses = torch.where(counted, normalizer - both[1], zero)
        return losses, torch.where(counted, normalizer, zero)

    @staticmethod
    def backward(
        ctx: Any, of_losses: torch.Tensor, of_normalizers: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        logits, places, here, counted, normalizer = ctx.saved_tensors
        gradient = (logits.float() - normalizer[:, None]).exp_()
        gradient *= (counted * (of_losses + of_normalizers))[:, None]
        gradient.scatter_add_(1, places[:, None], -(here * of_losses)[:, None])
        return gradient.to(logits.dtype), None, None


def shared_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, tensor: TensorExchange
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and normalizer, logsumexp(logits), of a rank's own tokens; 0 where there is no
    target. Collective: one maximum and one sum of [T] numbers, so that no rank has all logits.

    Args:
        logits: [T, vocab_size / size], of the tokens of all ranks in their order and this rank's
            run of the vocabulary; targets: [T] int64 with IGNORE_INDEX.

    Returns:
        [T / size] fp32 each.
    """
    losses, normalizers = _SharedCrossEntropy.apply(logits, targets, tensor)  # type: ignore[no-untyped-call]
    return tensor.own(losses), tensor.own(normalizers)


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


class Teaching(NamedTuple):
    """Weights of what a model learns from: (1 - w) and w T^2 for a teacher of weight w and
    temperature T, whose gradients shrink with T^2 (arXiv 1503.02531).
    """

    targets: float
    """Of the mean cross-entropy of the targets."""
    teacher: float
    """Of the mean divergence from the teacher."""

    @staticmethod
    def of(weight: float, temperature: float) -> Teaching:
        return Teaching(1 - weight, weight * temperature**2)


UNTAUGHT = Teaching(1.0, 0.0)


def training_loss(
    output: ModelOutput,
    num_targets: int,
    num_tokens: int,
    balance: BalanceConfig,
    mtp_coeff: float = 0.0,
    num_mtp_targets: Sequence[int] = (),
    z_loss_coeff: float = 0.0,
    teaching: Teaching = UNTAUGHT,
) -> torch.Tensor:
    """This micro-batch's share of the step's loss; shares of all ranks and micro-batches add up to
    the whole.

    num_targets, num_tokens: predicted targets and unpadded tokens of the entire step, over ranks
        and micro-batches.
    mtp_coeff: weight of the mean over modules of multi-token prediction of their mean losses;
        num_mtp_targets: of each module, as num_targets.
    z_loss_coeff: weight of the mean of squared normalizers of the output logits.
    teaching: how much the targets count, and the teacher.
    """
    data = output.loss_sum / max(num_targets, 1)
    if teaching.targets != 1:
        data = teaching.targets * data
    if teaching.teacher > 0:
        data = data + teaching.teacher * output.kl_sum / max(num_targets, 1)
    loss = data + output.penalty_sum / max(num_tokens, 1)
    if balance.aux_loss_coeff > 0:
        loss = loss + balance.aux_loss_coeff * output.aux_sum / max(num_tokens, 1)
    if balance.z_loss_coeff > 0:
        loss = loss + balance.z_loss_coeff * output.z_sum / max(num_tokens, 1)
    if z_loss_coeff > 0:
        loss = loss + z_loss_coeff * output.logit_z_sum / max(num_targets, 1)
    for mtp_sum, number in zip(output.mtp_sums, num_mtp_targets, strict=True):
        loss = loss + mtp_coeff / len(num_mtp_targets) * mtp_sum / max(number, 1)
    return loss
