"""Notice a spike of the gradient norm, and route with an earlier router for a while.

The gradient norm is the same number on every rank, so all ranks decide alike without talking.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from model.config import FailSafeConfig

MOMENTUM = 0.98
WARM_UP = 50
"""Steps before the running mean and deviation mean anything."""


@dataclass
class SpikeGuard:
    """Running mean and variance of the logarithm of the gradient norm; saved with every
    checkpoint.
    """

    mean: float = 0.0
    variance: float = 0.0
    steps: int = 0
    frozen_steps: int = 0
    """Steps still to be routed with the snapshot."""
    has_snapshot: bool = False

    def continued(self, was_on: bool, settings: FailSafeConfig) -> SpikeGuard:
        """The guard of a resumed run: this one, if spikes were watched for in the steps before it
        (was_on) and are now, else a new one, which knows of no norm and no snapshot.
        """
        if not was_on or settings.spike_zscore == 0:
            return SpikeGuard()
        return replace(self, frozen_steps=min(self.frozen_steps, settings.freeze_steps))

    def takes_snapshot(self, step: int, settings: FailSafeConfig) -> bool:
        """Whether the step after `step` completed ones stores the routers' weights for later."""
        return (
            settings.spike_zscore > 0
            and self.frozen_steps == 0
            and step % settings.snapshot_interval == 0
        )

    def update(self, grad_norm: float, took_snapshot: bool, settings: FailSafeConfig) -> bool:
        """Take the norm of a finished step; True when it starts a freeze."""
        self.has_snapshot |= took_snapshot
        if settings.spike_zscore == 0 or not math.isfinite(grad_norm) or grad_norm <= 0:
            return False
        self.frozen_steps = max(0, self.frozen_steps - 1)
        value = math.log(grad_norm)
        deviation = math.sqrt(self.variance) + 1e-3
        spiked = (
            self.steps >= WARM_UP
            and self.has_snapshot
            and self.frozen_steps == 0
            and value - self.mean > settings.spike_zscore * deviation
        )
        if spiked:
            self.frozen_steps = settings.freeze_steps
            return True  # the spike itself does not move the mean
        self.steps += 1
        rate = max(1 - MOMENTUM, 1 / self.steps)
        change = value - self.mean
        self.mean += rate * change
        self.variance = (1 - rate) * (self.variance + rate * change * change)
        return False
