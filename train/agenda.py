"""What a training step is followed by: a function of its number and the settings alone."""

from __future__ import annotations

from dataclasses import dataclass

from train.config.training import CheckpointConfig, TrainConfig


@dataclass(frozen=True)
class Step:
    """One optimisation step and what comes after it, the same on all ranks."""

    number: int
    """Counted from 1; 0 is the state before the first step."""
    logs: bool = False
    """Metrics are written after it, so that it is measured more closely than others."""
    evaluates: bool = False
    """A held-out evaluation follows, and training goes on after it."""
    saves: bool = False
    """A checkpoint follows, and training goes on after it."""
    last: bool = False
    """No step follows: what a run does at its end is not on the agenda of a step."""


def last_step_of(settings: TrainConfig) -> int:
    """The step after which a run ends."""
    return min(settings.num_steps, settings.stop_after_step or settings.num_steps)


def agenda(number: int, settings: TrainConfig, checkpoint: CheckpointConfig) -> Step:
    """What step `number` of a run with these settings is followed by."""
    last = number >= last_step_of(settings)
    return Step(
        number,
        logs=last or _is_due(number, settings.log_interval),
        evaluates=not last and _is_due(number, settings.eval_interval),
        saves=not last and _is_due(number, checkpoint.save_interval),
        last=last,
    )


def _is_due(number: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) follows this one."""
    return interval > 0 and number % interval == 0
