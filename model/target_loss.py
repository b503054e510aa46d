"""The losses of targets: logits made of hidden states, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model.distillation import divergence
from model.loss import (
    cross_entropy_and_z_sums,
    cross_entropy_sum,
    shared_cross_entropy,
    token_cross_entropy,
)
from model.parallel.tensor import TensorExchange
from model.request import Taught
from model.weight_sums import uses_of


class TargetSums(NamedTuple):
    """Of the targets: fields of ModelOutput."""

    loss_sum: torch.Tensor
    token_losses: torch.Tensor
    logit_z_sum: torch.Tensor
    kl_sum: torch.Tensor
    agreed: torch.Tensor


@dataclass(frozen=True)
class TargetLoss:
    """Makes sums over targets of hidden states.

    Attributes:
        project: hidden states [..., D], and a use of the head's weight or None -> logits [..., V].
        weight: gives the head's, [V, D]; asked for only where it is used, since ZeRO-3 gathers what
            is looked at.
        tensor: of the ranks that share out the vocabulary; None: each has all of it.
        chunk_size: tokens whose logits are in memory at a time; 0: all.
    """

    project: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    weight: Callable[[], torch.Tensor]
    tensor: TensorExchange | None
    chunk_size: int

    def __call__(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        by_token: bool,
        taught: Taught | None = None,
        with_z: bool = False,
    ) -> TargetSums:
        """What ModelOutput says of the targets [B, S] of hidden states [B, S, D].

        by_token: each one's loss as well; taught: what a teacher says of them; with_z: the squares
        of the normalizers as well.
        """

        def of_chunk(
            hidden: torch.Tensor,
            targets: torch.Tensor,
            weight: torch.Tensor | None = None,
            taught: Taught | None = None,
        ) -> TargetSums:
            if self.tensor is not None:
                return self._shared(self.tensor, hidden, targets, by_token, with_z, weight)
            logits = self.project(hidden, weight)
            by_tokens = (
                token_cross_entropy(logits, targets)
                if by_token
                else logits.new_empty(0, dtype=torch.float32)
            )
            if with_z:
                loss_sum, z_sum = cross_entropy_and_z_sums(logits, targets)
            else:
                loss_sum = cross_entropy_sum(logits, targets)
                z_sum = loss_sum.new_zeros(())
            kl_sum, agreed = loss_sum.new_zeros(()), targets.new_zeros(())
            if taught is not None:
                kl_sum, agreed = divergence(logits, targets, taught, self._teacher_logits(taught))
            return TargetSums(loss_sum, by_tokens, z_sum, kl_sum, agreed)

        size = self.chunk_size
        if not 0 < size < targets.numel():
            return of_chunk(hidden, targets, None, taught)
        hiddens, parts = hidden.flatten(0, 1).split(size), targets.flatten().split(size)
        teachings = [None] * len(parts) if taught is None else taught.chunks(size)

        # In bf16 a weight that many chunks use would add up its gradient in bf16: see uses_of.
        weights: list[torch.Tensor] | list[None] = [None] * len(parts)
        if torch.is_grad_enabled() and hidden.dtype != torch.float32:
            weights = uses_of(self.weight(), len(parts))

        sums, by_tokens, z_sums, divergences, agreed = zip(
            *(
                checkpoint(of_chunk, *chunk, use_reentrant=False)
                if torch.is_grad_enabled()
                else of_chunk(*chunk)
                for chunk in zip(hiddens, parts, weights, teachings, strict=True)
            ),
            strict=True,
        )
        return TargetSums(
            torch.stack(sums).sum(),
            torch.cat(by_tokens).view(targets.shape if by_token else 0),
            torch.stack(z_sums).sum(),
            torch.stack(divergences).sum(),
            torch.stack(agreed).sum(),
        )

    def _shared(
        self,
        tensor: TensorExchange,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        by_token: bool,
        with_z: bool,
        weight: torch.Tensor | None,
    ) -> TargetSums:
        """Of own tokens, whose logits are made on all ranks of the tensor group, which has the
        head's rows in parts. Collective.
        """
        tokens = tensor.gather(hidden.reshape(-1, hidden.shape[-1]))
        logits = self.project(tokens, weight)
        losses, normalizers = shared_cross_entropy(
            logits, tensor.gathered(targets.reshape(-1)), tensor
        )
        zero = losses.new_zeros(())
        by_tokens = losses.view_as(targets) if by_token else losses.new_empty(0)
        z_sum = normalizers.square().sum() if with_z else zero
        return TargetSums(losses.sum(), by_tokens, z_sum, zero, targets.new_zeros(()))

    @torch.no_grad()
    def _teacher_logits(self, taught: Taught) -> torch.Tensor | None:
        """[..., vocab_size] of a teacher that is known by its hidden states; None: by its words."""
        if taught.hidden is None:
            return None
        if taught.weight is None:
            return self.project(taught.hidden, None)
        return F.linear(taught.hidden, taught.weight)
