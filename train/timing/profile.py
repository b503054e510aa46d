"""Where the time of some steps goes: a table by phase and operation, and torch's trace of them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from train.agenda import Step
from train.config.watching import ProfileConfig
from train.files.durable import replacing, write_json
from train.observe.base import Observer, Phase

log = logging.getLogger("loadstone")
FOLDER = "profile"
INSIDE: tuple[Phase, ...] = ("data", "forward", "backward", "pair", "step")
"""Phases that a step is made of; what is left of it is called other: agreement of the ranks, guards
and observers.
"""
BETWEEN: tuple[Phase, ...] = ("log", "evaluate", "save")
NUM_OPERATIONS = 12
"""Operations that the table names."""


class Operation(NamedTuple):
    """What torch measured of one kind of operation."""

    name: str
    calls: int
    seconds: float
    """On the device where there is one, else on the host; without that of operations inside."""


class Profiler(Observer):
    """Measures the phases of the steps first to last and lets torch trace them. Looking costs time:
    every phase ends when the device is done.

    Args:
        config: which steps; writes: whether this rank leaves a trace; prints: whether it prints the
            table.
    """

    def __init__(
        self, config: ProfileConfig, run_dir: Path, device: torch.device, rank: int, prints: bool
    ):
        self.first, self.last = config.steps[0], config.steps[-1]
        self.device, self.rank, self.prints = device, rank, prints
        self.folder = run_dir / FOLDER
        self.seconds: dict[str, float] = {}
        self._steps = 0
        self._trace: Any = None
        if rank == 0 or config.all_ranks:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
            self._trace = torch.profiler.profile(activities=activities)
        self._running = False

    @contextlib.contextmanager
    def phase(self, step: Step, name: Phase) -> Iterator[None]:
        if not self.first <= step.number <= self.last or name == "pause":
            yield
            return
        if name == "whole" and self._trace is not None and not self._running:
            self._trace.start()
            self._running = True
        started = self._now()
        with torch.profiler.record_function(f"phase/{name}"):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started
        if name == "whole":
            self._steps += 1
            if step.number == self.last:
                self._end()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def close(self) -> None:
        """A run that ends before the last step leaves what there is."""
        self._end()

    def _end(self) -> None:
        if not self._running:
            return
        self._running = False
        self._trace.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{self.rank:05d}.json"
        with replacing(path) as scratch:
            self._trace.export_chrome_trace(str(scratch))
        operations = self.operations()
        write_json(self.folder / f"rank-{self.rank:05d}-phases.json", self.facts(operations))
        if self.prints:
            for line in self.table(operations):
                log.info("profile  %s", line)
            log.info("profile  trace %s, for ui.perfetto.dev or chrome://tracing", path)

    def operations(self) -> list[Operation]:
        """Those that took most, the longest first."""
        on_device = self.device.type == "cuda"
        found = [
            Operation(
                event.key,
                event.count,
                (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6,
            )
            for event in self._trace.key_averages()
            if not event.key.startswith(("phase/", "ProfilerStep"))
        ]
        found.sort(key=lambda one: (-one.seconds, one.name))
        return [one for one in found[:NUM_OPERATIONS] if one.seconds > 0]

    def shares(self) -> dict[str, float]:
        """Seconds of a step by phase, `other` among them; between steps, seconds of all steps."""
        steps = max(1, self._steps)
        names = [name for name in INSIDE if name != "pair" or name in self.seconds]
        inside: dict[str, float] = {name: self.seconds.get(name, 0.0) / steps for name in names}
        whole = self.seconds.get("whole", 0.0) / steps
        return {**inside, "other": max(0.0, whole - sum(inside.values()))}

    def facts(self, operations: list[Operation]) -> dict[str, Any]:
        """What the file holds."""
        return {
            "steps": [self.first, self.first + self._steps - 1],
            "seconds_a_step": self.seconds.get("whole", 0.0) / max(1, self._steps),
            "phases": self.shares(),
            "between": {name: self.seconds[name] for name in BETWEEN if name in self.seconds},
            "operations": [one._asdict() for one in operations],
        }

    def table(self, operations: list[Operation]) -> list[str]:
        """The same for people."""
        facts = self.facts(operations)
        whole = facts["seconds_a_step"]
        last = facts["steps"][1]
        lines = [f"steps {self.first} to {last}, rank {self.rank}: {1e3 * whole:.1f} ms a step"]
        for name, seconds in facts["phases"].items():
            share = seconds / whole if whole else 0.0
            lines.append(f"  {name:24s} {1e3 * seconds:10.1f} ms  {share:6.1%}")
        total = whole * self._steps
        lines.append(f"operations on the {'device' if self.device.type == 'cuda' else 'host'}")
        for one in operations:
            share = one.seconds / total if total else 0.0
            lines.append(
                f"  {one.name[:60]:60s} {1e3 * one.seconds / max(1, self._steps):10.1f} ms  "
                f"{share:6.1%}  {one.calls:,} calls"
            )
        return lines
