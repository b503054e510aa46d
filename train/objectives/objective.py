"""Objectives: what the loss of a micro-batch is made of, and whether it goes through once more."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from model.loss import UNTAUGHT, ModelOutput, Teaching
from model.request import SUMS_ALONE, ForwardRequest, Taught, TokenBatch
from train.config.objective import DistilConfig, SelfDistilConfig
from train.data.loader import Batch


class Teacher(Protocol):
    """Whoever says what the next token is."""

    def taught(self, batch: Batch, inputs: TokenBatch) -> Taught:
        """Of every token of a micro-batch, on the device of `inputs`. Collective where the
        teacher's experts are spread over ranks.
        """


class Again(NamedTuple):
    """A second pass of a micro-batch, which neither routers' statistics nor balance hear of."""

    inputs: TokenBatch
    request: ForwardRequest
    weight: float
    """Of its mean divergence from the teacher, which alone it learns from."""


class Objective:
    """Learn from the text alone."""

    teaching: Teaching = UNTAUGHT
    """Of the first pass."""
    keeps_hidden = False
    """Whether a second pass reads what the first one's head projected."""

    def inputs(self, batch: Batch, inputs: TokenBatch) -> TokenBatch:
        """What the first pass of a micro-batch reads."""
        return inputs

    def again(self, inputs: TokenBatch, output: ModelOutput, step: int) -> Again | None:
        """The second pass of a micro-batch; None: there is none. The same on all ranks.

        inputs, output: of the first pass; step: its number, from 1.
        """
        return None


class Distillation(Objective):
    """(1 - w) cross-entropy + w T^2 divergence from a teacher."""

    def __init__(self, settings: DistilConfig, teacher: Teacher):
        self.teacher = teacher
        self.teaching = Teaching.of(settings.weight, settings.temperature)

    def inputs(self, batch: Batch, inputs: TokenBatch) -> TokenBatch:
        return inputs._replace(taught=self.teacher.taught(batch, inputs))


class SelfDistillation(Objective):
    """Cross-entropy at the full budget, which then teaches a lower one: w T^2 divergence. The full
    budget learns from the text alone, so that it cannot come to meet the lower one.
    """

    keeps_hidden = True

    def __init__(self, settings: SelfDistilConfig):
        self.settings = settings

    def again(self, inputs: TokenBatch, output: ModelOutput, step: int) -> Again:
        settings = self.settings
        # One budget for all micro-batches of a step, so that it is the same under every layout.
        plain_k = settings.top_k[(step - 1) % len(settings.top_k)]
        taught = Taught(settings.temperature, hidden=output.hidden)
        weight = settings.weight * settings.temperature**2
        request = SUMS_ALONE._replace(plain_k=plain_k)
        return Again(inputs._replace(taught=taught), request, weight)
