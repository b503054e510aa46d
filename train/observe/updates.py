"""What the optimiser did in the last step."""

from __future__ import annotations

import math
from typing import Any

from train.agenda import Step
from train.engine.schedule import Schedule
from train.observe.base import Observer, StepResult


class Updates(Observer):
    """Learning rate, gradient norm and the number of skipped steps.

    Args:
        skipped_steps: how many steps the run had skipped before this process.
    """

    def __init__(self, schedule: Schedule, skipped_steps: int):
        self._schedule, self._skipped_steps = schedule, skipped_steps
        self._grad_norm = math.nan

    def end_step(self, step: Step, result: StepResult) -> None:
        self._grad_norm = result.grad_norm
        self._skipped_steps += not result.applied

    def log(self, step: Step) -> dict[str, Any]:
        return {
            "train/lr": self._schedule.learning_rate,
            "train/grad_norm": self._grad_norm,
            "train/skipped_steps": self._skipped_steps,
        }
