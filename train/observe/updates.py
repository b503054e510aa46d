"""What the optimiser did in the last step."""

from __future__ import annotations

import math
from typing import Any

from model.config import BalanceConfig
from train.agenda import Step
from train.engine.qk_clip import Clipped
from train.engine.schedule import Schedule
from train.observe.base import Observer, StepResult


class Updates(Observer):
    """Learning rate, what is scheduled of the balance, gradient norm and the number of skipped
    steps.

    Args:
        balance, num_steps: of the run.
        skipped_steps: how many steps the run had skipped before this process.
    """

    def __init__(
        self, schedule: Schedule, skipped_steps: int, balance: BalanceConfig, num_steps: int
    ):
        self._balance, self._num_steps = balance, num_steps
        self._schedule, self._skipped_steps = schedule, skipped_steps
        self._grad_norm = math.nan
        self._clipped: Clipped | None = None

    def end_step(self, step: Step, result: StepResult) -> None:
        self._grad_norm = result.grad_norm
        self._skipped_steps += not result.applied
        self._clipped = result.clipped or self._clipped

    def log(self, step: Step) -> dict[str, Any]:
        return {
            "train/lr": self._schedule.learning_rate,
            **self._scheduled(step.number),
            **self._of_clip(),
            "train/grad_norm": self._grad_norm,
            "train/skipped_steps": self._skipped_steps,
        }

    def _of_clip(self) -> dict[str, float]:
        if self._clipped is None:
            return {}
        return {
            "train/max_attention_logit": self._clipped.largest,
            "train/clipped_heads": self._clipped.num_heads,
        }

    def _scheduled(self, step: int) -> dict[str, float]:
        found, now = {}, self._balance.at(step, self._num_steps)
        if self._balance.aux_loss_schedule.style != "constant":
            found["train/aux_loss_coeff"] = now.aux_loss_coeff
        if self._balance.bias_rate_schedule.style != "constant":
            found["train/bias_update_rate"] = now.bias_update_rate
        return found
