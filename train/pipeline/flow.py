"""A step's micro-batches, or held-out batches, through the stages of a pipeline.

Only hidden states and their gradients travel. Every stage has a share of the step's loss of its
own: cross-entropy on the last, balance and penalties where the layers are. Backward on an earlier
stage is of its own share and of a zero whose gradient with respect to the hidden states is the one
that came back (`_Given`), so that the engine sees one scalar as ever.

A tied head, and multi-token prediction, need the embedding on the last stage too. There is still
one parameter, on the first stage, with its optimiser state, its place in the gradient norm and its
key in checkpoints: the last stage is lent the weight at the beginning of a step, adds up what its
micro-batches have as gradients in fp32, and the sum goes back before the first stage's last
backward pass, which takes it in as it takes the hidden states' gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from model.loss import ModelOutput
from model.parallel.groups import ParallelGroups
from model.request import ForwardRequest, TokenBatch
from model.transformer import Transformer
from train.engine.deepspeed import Engine
from train.pipeline.link import Link
from train.pipeline.schedule import Pass, actions


class Passes(Protocol):
    """What a stage does with a micro-batch of a step."""

    def forward(self, number: int, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """Of micro-batch `number`, from the hidden states [B, S, D] of the stage before (None on
        the first) to those that the next one gets (None on the last).
        """

    def backward(self, number: int, carried: torch.Tensor | None, is_last: bool) -> None:
        """carried: a zero that takes the gradient of what was handed on, to be added to the loss
        (Engine.backward); None on the last stage. is_last: no other backward pass follows.
        """


class Pipeline:
    """The stages as this rank sees them. One stage alone is a loop over micro-batches.

    Making one, and every method, is collective over the pipeline group.
    """

    def __init__(self, engine: Engine, groups: ParallelGroups):
        self.engine, self.groups = engine, groups
        self.link = Link(groups)
        model = engine.module
        self._dtype = model.any_weight.dtype
        config = model.config
        self._shares_embedding = groups.pipeline_size > 1 and (
            config.tie_embeddings or config.num_mtp_layers > 0
        )
        # NCCL makes a group's connections at its first collective, in which all of its ranks have
        # to take part; what neighbours send each other is no such one.
        if groups.pipeline_size > 1:
            dist.all_reduce(torch.zeros(1, device=engine.device), group=groups.pipeline)

    # --- training ---------------------------------------------------------------------------------

    def run(self, num_micro_batches: int, tokens: torch.Size, passes: Passes) -> None:
        """All passes of a step. tokens: [B, S] of every micro-batch here."""
        place, size = self.groups.pipeline_rank, self.groups.pipeline_size
        shape = (*tokens, self.engine.module.config.hidden_size)
        arrived: dict[int, torch.Tensor] = {}
        departs: dict[int, torch.Tensor] = {}
        held: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        lent = self._lent_sum()

        for action in actions(place, size, num_micro_batches):
            if not isinstance(action, Pass):
                received = self._received(shape, action.receive)
                sent = None if action.send is None else departs.pop(action.send)
                self.link.exchange(action.with_next, sent, received)
                if received is not None and action.receive is not None:
                    arrived[action.receive] = received
                continue

            number = action.number
            if action.kind == "forward":
                before = arrived.pop(number, None)
                hidden = None if before is None else before.requires_grad_()
                out = passes.forward(number, hidden)
                held[number] = hidden, out
                if out is not None:
                    departs[number] = out
                continue

            hidden, out = held.pop(number)
            is_last = number == num_micro_batches - 1
            carried = None if out is None else given(out, arrived.pop(number))
            if is_last:
                carried = self._with_lent_gradient(carried)
            passes.backward(number, carried, is_last)
            if lent is not None:
                self._add_lent_gradient(lent)
            if hidden is not None:
                assert hidden.grad is not None
                departs[number], hidden.grad = hidden.grad, None

        if lent is not None:
            self.link.send_to(0, lent)

    def _received(self, shape: tuple[int, ...], number: int | None) -> torch.Tensor | None:
        if number is None:
            return None
        return torch.empty(shape, dtype=self._dtype, device=self.engine.device)

    # --- what the last stage is lent --------------------------------------------------------------

    @torch.no_grad()
    def lend_embedding(self) -> None:
        """From the first stage to the last, where that needs it."""
        if not self._shares_embedding:
            return
        model, last = self.engine.module, self.groups.pipeline_size - 1
        if model.embedding is not None:
            self.link.send_to(last, model.embedding.weight)
        elif model.borrows_embedding:
            if model.lent_embedding is None:
                config = model.config
                shape = (config.vocab_size, config.hidden_size)
                model.lent_embedding = torch.empty(
                    shape, dtype=self._dtype, device=self.engine.device
                )
            model.lent_embedding.requires_grad_(False)
            self.link.receive_from(0, model.lent_embedding)

    def _lent_sum(self) -> torch.Tensor | None:
        """Lends the embedding; where it was lent to, the sum of its gradients so far."""
        self.lend_embedding()
        model: Transformer = self.engine.module
        if not model.borrows_embedding:
            return None
        assert model.lent_embedding is not None
        model.lent_embedding.requires_grad_()
        return torch.zeros_like(model.lent_embedding, dtype=torch.float32, requires_grad=False)

    def _add_lent_gradient(self, total: torch.Tensor) -> None:
        weight = self.engine.module.lent_embedding
        if weight.grad is not None:
            total += weight.grad
            weight.grad = None

    def _with_lent_gradient(self, carried: torch.Tensor | None) -> torch.Tensor | None:
        """On the first stage: also what the last one has as a gradient of the embedding."""
        model: Transformer = self.engine.module
        if not self._shares_embedding or model.embedding is None:
            return carried
        weight = model.embedding.weight
        total = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        self.link.receive_from(self.groups.pipeline_size - 1, total)
        of_weight = given(weight, total.to(weight.dtype))
        return of_weight if carried is None else carried + of_weight

    # --- evaluation -------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, batch: TokenBatch, request: ForwardRequest) -> ModelOutput:
        """One batch, without gradients; the embedding was lent before. Stages go on with the next
        batch while later ones are at this one.
        """
        place, size = self.groups.pipeline_rank, self.groups.pipeline_size
        hidden = None
        if place > 0:
            shape = (*batch.input_ids.shape, self.engine.module.config.hidden_size)
            hidden = torch.empty(shape, dtype=self._dtype, device=self.engine.device)
            self.link.exchange(False, None, hidden)
        output = self.engine.forward(batch, request, hidden)
        if place < size - 1:
            self.link.exchange(True, output.hidden, None)
        return output


def given(tensor: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """[] fp32, a zero whose gradient with respect to `tensor` is `gradient`."""
    apply: Callable[..., torch.Tensor] = _Given.apply
    return apply(tensor, gradient)


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return torch.zeros((), dtype=torch.float32, device=tensor.device)

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * factor.to(gradient.dtype), None
