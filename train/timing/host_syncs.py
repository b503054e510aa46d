"""How often a step waits for the device: with tracker.metrics=detailed on CUDA, in logged steps."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from train.agenda import Step
from train.observe.base import Observer, Phase


class HostSyncs(Observer):
    """Counts the synchronising calls that torch reports (torch.cuda.set_sync_debug_mode). Other
    libraries' are not seen.
    """

    def __init__(self, device: torch.device, wanted: bool):
        self.wanted = wanted and device.type == "cuda"
        self.count: int | None = None

    def phase(self, step: Step, name: Phase) -> AbstractContextManager[None]:
        return self.counting(name == "whole" and step.logs)

    def log(self, step: Step) -> dict[str, Any]:
        return self.take()

    @contextlib.contextmanager
    def counting(self, measuring: bool) -> Iterator[None]:
        """Count what happens inside; other warnings are passed on."""
        if not (self.wanted and measuring):
            yield
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        syncs = [w for w in caught if "synchroniz" in str(w.message)]
        self.count = (self.count or 0) + len(syncs)
        for warning in caught:
            if warning not in syncs:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )

    def take(self) -> dict[str, int]:
        """perf/host_syncs of the logged step, {} where none was counted; resets."""
        count, self.count = self.count, None
        return {} if count is None else {"perf/host_syncs": count}
