"""How long training stands still for checkpoints, and how fast it is without what interrupts it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from train.agenda import Step
from train.observe.base import Observer, Phase, StepResult


class SaveSeconds(Observer):
    """perf/save_seconds: how long training stood still for checkpoints since the last record."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def phase(self, step: Step, name: Phase) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if name == "save":
            self.seconds += time.perf_counter() - started

    def log(self, step: Step) -> dict[str, Any]:
        seconds, self.seconds = self.seconds, 0.0
        return {"perf/save_seconds": seconds}


class Speed(Observer):
    """Tokens per second over a run, for its result: of the time in optimisation steps alone, and
    without the first interval between records, in which kernels are compiled and memory is found.
    """

    def __init__(self) -> None:
        self._tokens, self._seconds = 0, 0.0
        self._warm_up: tuple[int, float] | None = None

    @contextlib.contextmanager
    def phase(self, step: Step, name: Phase) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if name == "whole":
            self._seconds += time.perf_counter() - started

    def end_step(self, step: Step, result: StepResult) -> None:
        self._tokens += result.num_tokens

    def log(self, step: Step) -> dict[str, Any]:
        if self._warm_up is None:
            self._warm_up = self._tokens, self._seconds
            self._tokens, self._seconds = 0, 0.0
        return {}

    @property
    def tokens_per_second(self) -> float | None:
        """Of the first interval where there is no other; None before the first step."""
        tokens, seconds = self._tokens, self._seconds
        if tokens == 0 and self._warm_up is not None:
            tokens, seconds = self._warm_up
        return tokens / seconds if tokens else None
