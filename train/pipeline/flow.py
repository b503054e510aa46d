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

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from model.loss import ModelOutput, joined
from model.parallel.groups import ParallelGroups
from model.request import ForwardRequest, TokenBatch
from model.transformer import Transformer
from train.engine.deepspeed import Engine
from train.pipeline.link import GRADIENT, HIDDEN, Link, Message
from train.pipeline.schedule import Exchange, Pair, Pass, actions, forward_actions


class Passes(Protocol):
    """What a stage does with a micro-batch of a step."""

    def forward(self, one: Pass, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """From the hidden states [B, S, D] of the stage before (None where the model begins) to
        those that the next one gets (None where it ends).
        """

    def backward(self, one: Pass, carried: torch.Tensor | None, is_last: bool) -> None:
        """carried: a zero that takes the gradient of what was handed on, to be added to the loss
        (Engine.backward); None where the model ends. is_last: no other backward pass follows.
        """

    def pair(
        self, one: Pass, hidden: torch.Tensor | None, back: Pass, carried: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`forward` of `one` and `backward` of `back`, which another backward pass follows, by
        turns.
        """


class Pipeline:
    """The stages as this rank sees them. One stage alone is a loop over micro-batches.

    Making one, and every method, is collective over the pipeline group.

    Args:
        in_pairs: rows of experts travel while another micro-batch is computed
            (parallel.overlap_experts).
    """

    def __init__(self, engine: Engine, groups: ParallelGroups, in_pairs: bool = False):
        self.engine, self.groups = engine, groups
        self._in_pairs = in_pairs
        self.link = Link(groups)
        model = engine.module
        self._laps = len(model.laps)
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
        shape = (*tokens, self.engine.module.config.residual_size)
        flight = _Flight()
        lent = self._lent_sum()

        last = Pass("backward", num_micro_batches - 1)
        for action in actions(place, size, num_micro_batches, self._laps, self._in_pairs):
            if isinstance(action, Exchange):
                self._exchange(action, shape, flight)
            elif isinstance(action, Pair):
                hidden = flight.enter(action.forward)
                carried = flight.carried(action.backward)
                out = passes.pair(action.forward, hidden, action.backward, carried)
                flight.keep(action.forward, out)
                flight.leave(action.backward)
                if lent is not None:
                    self._add_lent_gradient(lent)
            elif action.kind == "forward":
                out = passes.forward(action, flight.enter(action))
                flight.keep(action, out)
            else:
                # The last pass of the first stage takes in what the last one gathered for it.
                is_last = action == last
                carried = flight.carried(action)
                if is_last:
                    carried = self._with_lent_gradient(carried)
                passes.backward(action, carried, is_last)
                flight.leave(action)
                if lent is not None:
                    self._add_lent_gradient(lent)

        if lent is not None:
            self.link.send_to(0, lent)

    def _exchange(self, action: Exchange, shape: tuple[int, ...], flight: _Flight) -> None:
        sends = [self._message(one, flight.departs.pop(one), 1) for one in action.sends]
        for one in action.receives:
            flight.arrived[one] = self._empty(shape)
        receives = [self._message(one, flight.arrived[one], -1) for one in action.receives]
        self.link.exchange(sends, receives)

    def _message(self, one: Pass, tensor: torch.Tensor, step: int) -> Message:
        """step: 1 for what a pass has made, -1 for what it goes on with."""
        if one.kind == "forward":
            return Message(tensor, self.link.neighbour(step), HIDDEN)
        return Message(tensor, self.link.neighbour(-step), GRADIENT)

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
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
                shape = (config.vocab_size // self.groups.tensor_size, config.hidden_size)
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
    def forward(
        self, batches: Sequence[TokenBatch], requests: Sequence[ForwardRequest]
    ) -> list[ModelOutput]:
        """Of batches of one shape, which take their laps together, without gradients; the embedding
        was lent before. Stages go on with the next ones while later stages are at these.
        """
        place, size = self.groups.pipeline_rank, self.groups.pipeline_size
        shape = (*batches[0].input_ids.shape, self.engine.module.config.residual_size)
        flight = _Flight()
        laps: list[list[ModelOutput]] = [[] for _ in batches]
        for action in forward_actions(place, size, len(batches), self._laps):
            if isinstance(action, Exchange):
                self._exchange(action, shape, flight)
                continue
            assert isinstance(action, Pass)
            hidden, number = flight.arrived.pop(action, None), action.number
            output = self.engine.forward(batches[number], requests[number], hidden, action.lap)
            if output.handed_on is not None:
                flight.departs[action] = output.handed_on
            laps[number].append(output._replace(handed_on=None))
        return [joined(outputs) for outputs in laps]

    @property
    def at_once(self) -> int:
        """How many batches `forward` is best given: with virtual stages one alone would
        keep all stages but one waiting.
        """
        return 4 * self.groups.pipeline_size if self._laps > 1 else 1


class _Flight:
    """Hidden states and gradients of the micro-batches that a stage holds.

    Attributes:
        arrived: hidden states, or the gradient that came back, for the pass that goes on with them;
            departs: what is to be sent, by the pass that made it.
    """

    def __init__(self) -> None:
        self.arrived: dict[Pass, torch.Tensor] = {}
        self.departs: dict[Pass, torch.Tensor] = {}
        self._held: dict[tuple[int, int], tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        self._entered: torch.Tensor | None = None

    def enter(self, one: Pass) -> torch.Tensor | None:
        """Hidden states that a forward pass goes on with; None where the model begins."""
        hidden = self.arrived.pop(one, None)
        self._entered = None if hidden is None else hidden.requires_grad_()
        return self._entered

    def keep(self, one: Pass, out: torch.Tensor | None) -> None:
        """What the pass has made of them, None where the model ends."""
        self._held[one.unit], self._entered = (self._entered, out), None
        if out is not None:
            self.departs[one] = out

    def carried(self, one: Pass) -> torch.Tensor | None:
        """A zero with the gradient that came back; None where the model ends."""
        out = self._held[one.unit][1]
        return None if out is None else given(out, self.arrived.pop(one))

    def leave(self, one: Pass) -> None:
        """After the backward pass: its gradient goes to the stage before, and all else is let
        go.
        """
        hidden, _ = self._held.pop(one.unit)
        if hidden is not None:
            assert hidden.grad is not None, f"no gradient has reached {one}"
            self.departs[one], hidden.grad = hidden.grad, None


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
