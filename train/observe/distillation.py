"""How near a model is to its teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from model.loss import ModelOutput
from train.agenda import Step
from train.observe.base import Ask, MicroBatch, Observer, StepResult


class Distillation(Observer):
    """Divergence from the teacher and agreement with it, over the targets of the interval's
    updates; of a second pass, at a lower budget, its loss as well.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums, self._of_step = self._zeros(), self._zeros()
        self._has_second = False

    def _zeros(self) -> torch.Tensor:
        """[divergence, agreed, loss of the second pass, targets]."""
        return torch.zeros(4, dtype=torch.float64, device=self.device)

    def begin_step(self, step: Step) -> Ask:
        self._of_step = self._zeros()
        return Ask.NOTHING

    def micro_batch(self, step: Step, done: MicroBatch) -> None:
        self._has_second |= done.second is not None
        output: ModelOutput = done.output if done.second is None else done.second
        self._of_step[0] += output.kl_sum.detach()
        self._of_step[1] += output.agreed
        self._of_step[2] += output.loss_sum.detach()
        self._of_step[3] += done.batch.num_targets

    def end_step(self, step: Step, result: StepResult) -> None:
        if result.applied:
            self._sums += self._of_step

    def log(self, step: Step) -> dict[str, Any]:
        """Collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        kl, agreed, loss, targets = self._sums.tolist()
        self._sums = self._zeros()
        if not targets:
            return {}
        found = {"distil/kl": kl / targets, "distil/agreement": agreed / targets}
        if self._has_second:
            found["distil/student_loss"] = loss / targets
        return found
