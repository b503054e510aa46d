"""The one seam for everything that watches training.

An observer is a class derived from `Observer` that overrides the hooks it needs. To add one: a file
in train/observe/, and its line in `standard_observers` of train/observers.py (or, from a script of
one's own, the argument `observers` of `train.fit.fit`). What it returns from `log` stands in
metrics.jsonl and in every sink, and alarms may watch it (its name belongs in
train/observe/catalogue). A whole one, which logs the share of padding:

    class Padding(Observer):
        def __init__(self) -> None:
            self.tokens = self.places = 0

        def micro_batch(self, step: Step, done: MicroBatch) -> None:
            self.tokens += done.batch.num_tokens
            self.places += done.batch.targets.numel()

        def log(self, step: Step) -> dict[str, Any]:
            share, self.tokens, self.places = 1 - self.tokens / self.places, 0, 0
            return {"data/padding": share}

Rules, which let every run stay the same run however closely it is watched:

- An observer changes neither weights nor data nor random streams.
- All ranks hold the same observers in the same order, and only `log` may call a collective, on all
  ranks or on none.
- An error of an observer ends the run as any other does: were it passed over on one rank, that rank
  would leave out a collective in which the others wait. An observer that must not end a run catches
  its own errors, as the routing audit does.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from train.agenda import Step

if TYPE_CHECKING:
    from model.loss import ModelOutput
    from model.moe.balance import LayerStats
    from ops.all_to_all import Communication
    from train.data.loader import Batch
    from train.engine.qk_clip import Clipped

Phase = Literal[
    "whole", "data", "forward", "backward", "pair", "step", "log", "pause", "evaluate", "save"
]
"""What training does. "whole" is one optimisation step: "data", a "forward" and a "backward" for
each micro-batch and lap, or both of two as a "pair", and "step", the update. "pause" is what comes
between two steps besides "log": "evaluate", entered for each held-out batch, and "save".
"""


class Ask(enum.Flag):
    """What an observer needs to be measured in a step, which costs time or memory."""

    NOTHING = 0
    ROUTING = enum.auto()
    """`ModelOutput.routings`: which token went where."""
    ATTENTION = enum.auto()
    """`ModelOutput.attention_stats`: what sparse attention leaves out."""
    COMMUNICATION = enum.auto()
    """`MicroBatch.communication` and `StepResult.communication`."""


class MicroBatch(NamedTuple):
    """What one forward and backward pass of this rank was made of."""

    batch: Batch
    """On the host."""
    output: ModelOutput
    """On the device."""
    communication: Communication | None
    """Of the forward pass, and of the backward pass before it; None where nobody asked for it."""
    second: ModelOutput | None = None
    """Of the second pass that an objective may ask for (train/objectives); None: there was none."""


class StepResult(NamedTuple):
    """What one optimisation step came to, over all ranks unless it says otherwise."""

    num_tokens: int
    """Tokens that were read, without padding."""
    first_sample: int
    """Number of its first sample, from 0."""
    end_sample: int
    """Number of the sample after its last one."""
    grad_norm: float
    """Global gradient norm before clipping; NaN or infinite where the step was skipped."""
    applied: bool
    """Whether the weights were updated: False where the gradient was not finite."""
    layers: LayerStats | None
    """Statistics of the routers, one row per MoE layer; None without experts."""
    communication: Communication | None
    """What this rank sent and waited for; None where nobody asked for it."""
    clipped: Clipped | None = None
    """What clipping attention logits has found; None in a step that was not measured."""


@dataclass
class Record:
    """What is written after a logged step."""

    step: int
    tokens: int
    """Tokens that the run has read so far."""
    scalars: dict[str, Any]
    """By name, as in metrics.jsonl."""
    tables: dict[str, Any]
    """Of each MoE layer, as in routing.jsonl; {} where nothing was routed."""


class Observer:
    """Looks at training. Hooks come in the order in which they stand here."""

    def begin_step(self, step: Step) -> Ask:
        """The ranks have read the step's batches and go on to learn from them."""
        return Ask.NOTHING

    def phase(self, step: Step, name: Phase) -> AbstractContextManager[None]:
        """What is inside the context belongs to this phase."""
        return nullcontext()

    def micro_batch(self, step: Step, done: MicroBatch) -> None:
        """A micro-batch went forward and backward on this rank."""

    def end_step(self, step: Step, result: StepResult) -> None:
        """The step is done, or was skipped. One that ends the run comes here, too."""

    def log(self, step: Step) -> dict[str, Any]:
        """Scalars of the steps since the last call, by name. May be collective."""
        return {}

    def tables(self) -> dict[str, Any]:
        """What routing.jsonl gets of the steps that the last `log` was about."""
        return {}

    def close(self) -> None:
        """The run ends, with or without an error."""


class Watch(Observer):
    """Several observers as one: each hook asks all of them, in their order.

    Args:
        observers: at every hook of a phase the first enters first and leaves last.
    """

    def __init__(self, observers: Sequence[Observer]):
        self.observers = tuple(observers)
        # Most observers have no phase, and a step has many.
        self._of_phases = [o for o in observers if type(o).phase is not Observer.phase]

    def begin_step(self, step: Step) -> Ask:
        asked = Ask.NOTHING
        for observer in self.observers:
            asked |= observer.begin_step(step)
        return asked

    @contextlib.contextmanager
    def phase(self, step: Step, name: Phase) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for observer in self._of_phases:
                stack.enter_context(observer.phase(step, name))
            yield

    def micro_batch(self, step: Step, done: MicroBatch) -> None:
        for observer in self.observers:
            observer.micro_batch(step, done)

    def end_step(self, step: Step, result: StepResult) -> None:
        for observer in self.observers:
            observer.end_step(step, result)

    def log(self, step: Step) -> dict[str, Any]:
        scalars: dict[str, Any] = {}
        for observer in self.observers:
            scalars |= observer.log(step)
        return scalars

    def tables(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for observer in self.observers:
            found |= observer.tables()
        return found

    def close(self) -> None:
        for observer in self.observers:
            observer.close()
