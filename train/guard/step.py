"""What may route a step otherwise, skip it, or end the run with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from model.config import FailSafeConfig
from train.agenda import Step
from train.data.loader import Batch
from train.guard.nonfinite import NonFiniteError, describe
from train.guard.spike import SpikeGuard
from train.observe.base import StepResult

log = logging.getLogger("loadstone")


class Orders(NamedTuple):
    """How a step is routed where it is not as usual (model.routers.base.RoutingRequest)."""

    snapshot: bool
    """The routers' weights are stored, to be gone back to after a spike."""
    frozen: bool
    """Experts are chosen by the weights that were stored."""


class StepGuard:
    """Guards every step against a gradient that is not finite, and the steps after a spike of its
    norm against what the spike did to the routers. All ranks decide alike, by the global norm.

    Args:
        spike: saved with every checkpoint.
        on_nonfinite: train.on_nonfinite.
        skipped_steps: how many steps the run had skipped before this process.
        before_ending: called on all ranks before an error ends the run.
    """

    def __init__(
        self,
        spike: SpikeGuard,
        fail_safe: FailSafeConfig,
        on_nonfinite: Literal["stop", "skip"],
        skipped_steps: int,
        run_dir: Path,
        before_ending: Callable[[], object],
    ):
        self._spike, self._fail_safe = spike, fail_safe
        self._on_nonfinite, self._skipped_steps = on_nonfinite, skipped_steps
        self._run_dir, self._before_ending = run_dir, before_ending

    def before(self, step: Step) -> Orders:
        """How the step is to be routed."""
        return Orders(
            snapshot=self._spike.takes_snapshot(step.number - 1, self._fail_safe),
            frozen=self._spike.frozen_steps > 0,
        )

    def after(
        self,
        step: Step,
        result: StepResult,
        orders: Orders,
        losses: Sequence[torch.Tensor],
        batches: Sequence[Batch],
    ) -> None:
        """Notice a spike of the gradient norm, or keep the batches of a step that was not applied.
        Collective where it was not.

        Args:
            losses, batches: of this rank's micro-batches; losses in nats summed over targets.

        Raises:
            NonFiniteError: on all ranks, where train.on_nonfinite=stop.
        """
        if not result.applied:
            self._skip(step, result, losses, batches)
        elif self._spike.update(result.grad_norm, orders.snapshot, self._fail_safe):
            log.info(
                "gradient norm %.3g at step %d is a spike: experts are chosen by the snapshot for "
                "%d steps",
                result.grad_norm,
                step.number,
                self._fail_safe.freeze_steps,
            )

    def _skip(
        self,
        step: Step,
        result: StepResult,
        losses: Sequence[torch.Tensor],
        batches: Sequence[Batch],
    ) -> None:
        found = describe(
            step.number,
            result.grad_norm,
            [float(loss) for loss in losses],
            batches,
            (result.first_sample, result.end_sample - 1),
            self._run_dir,
        )
        if self._on_nonfinite == "stop":
            self._before_ending()
            raise NonFiniteError(
                f"{found}; lower optim.lr and resume, or set train.on_nonfinite=skip"
            )
        self._skipped_steps += 1
        log.warning("%s: skipped (train.on_nonfinite=skip; %d so far)", found, self._skipped_steps)
