"""Which rank is slow: all ranks take the same time for a step, the slow one just waits least. So
own work is compared.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from train.agenda import Step
from train.observe.base import Ask, MicroBatch, Observer, Phase
from train.rank import heartbeat

log = logging.getLogger("loadstone")
MIN_SECONDS = 0.02
PATIENCE = 3


class StragglerWatch(Observer):
    """Sums what this rank spends on its own work in logged steps: reading data and the forward
    pass, without the waits for other ranks' tokens.

    Args:
        ratio: a rank above this many times the median (and MIN_SECONDS above it) in PATIENCE logged
            steps in a row is a straggler; 0: nothing is timed.
        stage_size: ranks that have the same layers, neighbours, which are compared with each other
            alone; None: all.
    """

    def __init__(self, ratio: float, device: torch.device, stage_size: int | None = None):
        self.ratio, self.device, self.stage_size = ratio, device, stage_size
        self.seconds = 0.0
        self._suspect: int | None = None
        self._times = 0

    def begin_step(self, step: Step) -> Ask:
        return Ask.COMMUNICATION if step.logs else Ask.NOTHING

    def phase(self, step: Step, name: Phase) -> AbstractContextManager[None]:
        return self.own_work(name in ("data", "forward") and step.logs)

    def micro_batch(self, step: Step, done: MicroBatch) -> None:
        if done.communication is not None:
            self.waited(done.communication.exposed_seconds)

    def log(self, step: Step) -> dict[str, Any]:
        """perf/rank_skew: own seconds of the slowest rank over the median. Tells who is a
        straggler. Collective.
        """
        skew, straggler = self.compare()
        if straggler is not None:
            log.warning(
                "step %d: rank %d is a straggler, its own work takes %.1f times the median",
                step.number,
                straggler,
                skew,
            )
            if dist.get_rank() == straggler:
                heartbeat.event(
                    "straggler", step=step.number, ratio=round(skew, 2), host=socket.gethostname()
                )
        return {"perf/rank_skew": skew}

    @contextlib.contextmanager
    def own_work(self, measuring: bool) -> Iterator[None]:
        if not measuring or not self.ratio:
            yield
            return
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - started

    def waited(self, seconds: float) -> None:
        """Part of the own work was spent waiting for others."""
        self.seconds -= seconds

    def compare(self) -> tuple[float, int | None]:
        """The slowest rank's own seconds over the median, and that rank when it is a straggler;
        resets. Collective.
        """
        if not self.ratio or dist.get_world_size() == 1:
            return 1.0, None
        every = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.all_gather(every, torch.tensor([max(self.seconds, 0.0)], dtype=torch.float64))
        self.seconds = 0.0
        return self.judge([float(seconds) for seconds in every])

    def judge(self, seconds: list[float]) -> tuple[float, int | None]:
        if not any(seconds):  # no step was logged since the last time
            return 1.0, None
        size = self.stage_size or len(seconds)
        stages = [seconds[first : first + size] for first in range(0, len(seconds), size)]
        medians = [statistics.median_low(stage) for stage in stages for _ in stage]

        def skew_of(rank: int) -> float:
            return seconds[rank] / max(medians[rank], 1e-6)

        slowest = max(range(len(seconds)), key=skew_of)
        median, skew = medians[slowest], skew_of(slowest)
        slow = skew > self.ratio and seconds[slowest] - median > MIN_SECONDS
        self._times = self._times + 1 if slow and self._suspect == slowest else int(slow)
        self._suspect = slowest if slow else None
        return skew, slowest if self._times >= PATIENCE else None
