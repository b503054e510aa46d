"""How many bytes leave a rank, how long it waits for others' bytes, and what rounding them
costs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Communication(NamedTuple):
    """num_bytes: sent to other ranks. exposed_seconds: the device (CPU: the process) waited.
    payload_error: sums of the squared rounding error and of the squared values of the rows sent.
    """

    num_bytes: float
    exposed_seconds: float
    payload_error: tuple[float, float]


def total_communication(parts: list[Communication]) -> Communication:
    """The sum of what was counted apart, of layers or of ranks."""
    return Communication(
        sum(p.num_bytes for p in parts),
        sum(p.exposed_seconds for p in parts),
        (sum(p.payload_error[0] for p in parts), sum(p.payload_error[1] for p in parts)),
    )


class Meter:
    """Counts while `measuring`; of one layer or of many."""

    def __init__(self) -> None:
        self.measuring = False
        self._clear()

    def _clear(self) -> None:
        self.num_bytes, self.seconds = 0, 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.errors: list[torch.Tensor] = []

    def add_bytes(self, num_bytes: int) -> None:
        if self.measuring:
            self.num_bytes += num_bytes

    def add_error(self, rows: torch.Tensor, rounded: torch.Tensor) -> None:
        if self.measuring:
            rows = rows.detach().float()
            self.errors.append(
                torch.stack(((rounded.float() - rows).square().sum(), rows.square().sum()))
            )

    @contextlib.contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Around a wait: on CUDA it makes the stream wait, so that is timed; the events are read in
        `take`.
        """
        if not self.measuring:
            yield
        elif device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self.events.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - started

    def take(self) -> Communication:
        """What was counted since the last call; waits for the device."""
        seconds = self.seconds
        for begin, end in self.events:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1e3
        errors = torch.stack(self.errors).double().sum(0).tolist() if self.errors else [0.0, 0.0]
        found = Communication(float(self.num_bytes), seconds, (errors[0], errors[1]))
        self._clear()
        return found
