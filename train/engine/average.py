"""An exponential moving average of the weights, kept beside the optimizer's moments: of the fp32
masters, in the slices that ZeRO makes of them, so that it is sharded, saved and resumed as they
are.

    a <- d a + (1 - d) w     after every update;  d = min(decay, (1 + n) / (10 + n)) of update n

The first update sets a = w. The smaller decay at the beginning keeps the first weights from
counting long after they are gone (TensorFlow's ExponentialMovingAverage with num_updates).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

AVERAGE = "ema"
"""The average among the states of a parameter, in an optimizer and in a checkpoint."""


class MovingAverage:
    """The average of everything that one optimizer moves.

    Args:
        decay: how much of the average stays at an update.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self._updates: dict[Tensor, int] = {}

    def begin(self, master: Tensor, updates: int) -> Tensor:
        """Make room for the average of a master after so many updates; returns it, to be filled."""
        self._updates[master] = updates
        return torch.zeros_like(master)

    @torch.no_grad()
    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Take in the weights that the optimizer's step has just made. ZeRO shows an optimizer its
        groups one by one, so that every master counts its own updates; one without a gradient was
        not moved.
        """
        for group in optimizer.param_groups:
            for master in group["params"]:
                if master.grad is None:
                    continue
                number = self._updates.get(master, 0)
                state = optimizer.state[master]
                if number == 0:
                    state[AVERAGE] = master.detach().clone()
                else:
                    state[AVERAGE].lerp_(master, 1 - self.decay_of(number + 1))
                self._updates[master] = number + 1

    def decay_of(self, number: int) -> float:
        """Of an update, the first of which is 1."""
        return min(self.decay, (1 + number) / (10 + number))


class AveragedAdamW(torch.optim.AdamW):
    """AdamW that keeps a moving average of what it moves."""

    average: MovingAverage | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = super().step(closure)
        if self.average is not None:
            self.average.follow(self)
        return result
