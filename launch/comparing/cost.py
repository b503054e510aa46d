"""What the runs cost, before and while they run. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from launch.comparing.grid import Cell
from launch.comparing.work import Outcome
from launch.job.fit import device_of
from launch.job.memory import planned_memory
from model.cost.parameters import count_parameters
from train.files.sizes import MIB

STARTING = 20.0
"""Seconds that a run takes to start and end, before one has been timed."""
SHARE_OF_CPU = 0.15
"""Of a core's fastest product of matrices that small models have reached here, before one has been
timed.
"""
PRODUCT = 512


@dataclass(frozen=True)
class Rate:
    """How long a run takes for its FLOPs."""

    flops: float
    """A second."""
    starting: float
    """Seconds of every run beside them."""
    source: str

    def seconds(self, cell: Cell) -> float:
        return self.starting + cell.flops / self.flops


def assumed_rate(cells: Sequence[Cell], mfu: float) -> Rate:
    """Before anything is timed: a share of the devices' peak, or of this CPU's fastest product."""
    ranks = max(cell.num_ranks for cell in cells)
    device = device_of(None)
    if device is not None and device.tflops is not None:
        rate = device.tflops * 1e12 * mfu * ranks
        return Rate(rate, STARTING, f"assumed: {mfu:.0%} of the peak of {ranks} devices")
    matrix = np.random.default_rng(0).random((PRODUCT, PRODUCT), dtype=np.float32)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - begin)
    rate = SHARE_OF_CPU * 2 * PRODUCT**3 / min(seconds)
    return Rate(rate, STARTING, f"assumed: {SHARE_OF_CPU:.0%} of this CPU's fastest product")


def seconds_left(
    cells: Sequence[Cell], outcomes: Mapping[str, Outcome], rate: Rate, retry_failed: bool
) -> float:
    """Of all cells that are still to be run: as those of the same size and variant took, else as
    the rate of all that have ended says, else as it is assumed.
    """
    timed = {
        cell.name: outcomes[cell.name].seconds
        for cell in cells
        if cell.name in outcomes and outcomes[cell.name].state == "done"
    }
    of_kind: dict[tuple[str | None, str], list[float]] = {}
    for cell in cells:
        if timed.get(cell.name):
            of_kind.setdefault((cell.size, cell.variant), []).append(timed[cell.name])
    done = [cell for cell in cells if timed.get(cell.name)]
    if done:
        # What starting takes is not told apart: both shares scale alike.
        assumed = sum(rate.seconds(cell) for cell in done)
        factor = sum(timed[cell.name] for cell in done) / assumed
        rate = Rate(rate.flops / factor, rate.starting * factor, "measured")

    left = 0.0
    for cell in cells:
        if is_open(outcomes.get(cell.name), retry_failed):
            kind = of_kind.get((cell.size, cell.variant))
            left += float(np.mean(kind)) if kind else rate.seconds(cell)
    return left


def is_open(outcome: Outcome | None, retry_failed: bool) -> bool:
    """Whether a cell is to be run."""
    if outcome is None or outcome.state == "interrupted":
        return True
    return outcome.state == "failed" and retry_failed


def plan_lines(
    cells: Sequence[Cell], outcomes: Mapping[str, Outcome], rate: Rate, retry_failed: bool
) -> list[list[str]]:
    """A row for every size and variant: what the runs are and take."""
    rows = []
    for cell in {(cell.size, cell.variant): cell for cell in reversed(cells)}.values():
        own = [c for c in cells if (c.size, c.variant) == (cell.size, cell.variant)]
        states = [outcomes[c.name].state for c in own if c.name in outcomes]
        run = cell.run
        count = count_parameters(run.model, run.experts_per_token, run.attention.arguments)
        rows.append(
            [
                cell.size or "own",
                cell.variant,
                f"{count.total:,}",
                f"{count.active:,}",
                f"{cell.flops_per_token:.3g}",
                f"{run.train.num_steps:,}",
                f"{cell.tokens:,}",
                f"{cell.flops:.3g}",
                f"{planned_memory(run, cell.num_ranks).total / MIB:,.0f}",
                str(len(own)),
                str(states.count("done")),
                str(states.count("failed")),
                f"{seconds_left(own, outcomes, rate, retry_failed) / 60:.1f}",
            ]
        )
    return rows[::-1]


HEAD = [
    "size",
    "variant",
    "parameters",
    "active",
    "FLOPs/token",
    "steps",
    "tokens",
    "FLOPs/run",
    "MiB/device",
    "runs",
    "done",
    "failed",
    "minutes left",
]
