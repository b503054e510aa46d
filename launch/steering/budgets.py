"""Which budget a request gets that fixes none: the largest that holds a latency, by what was
measured and by what is seen. Pure arithmetic: no clock, no tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

WINDOW = 32
"""Steps between two decisions."""
SPARE = 0.06
"""Of the limit, which a larger budget is to leave before it is taken: one that only just holds it
would be given up again by the noise.
"""
GAIN = 0.02
"""A lower budget is taken only where it was measured to be faster by more than this share."""
LEAST_PREFILL = 1 / 8
"""Of engine.prefill_tokens: pieces of prompts become so short, before requests are refused."""


class Point(NamedTuple):
    """A cell of launch.benchmark."""

    budget: float
    rows: int
    context: int
    itl_ms: float


class LatencyTable:
    """Measured times between two tokens by budget, rows and context."""

    def __init__(self, points: Sequence[Point]):
        self.cells: dict[tuple[int, int], dict[float, float]] = {}
        for point in points:
            self.cells.setdefault((point.rows, point.context), {})[point.budget] = point.itl_ms
        budgets = {frozenset(cell) for cell in self.cells.values()}
        if len(budgets) != 1 or len(next(iter(budgets))) < 2:
            raise ValueError("it needs two budgets at least, and the same ones in every cell")
        (known,) = budgets
        self.budgets = tuple(sorted(known))

    def at(self, rows: int, context: float) -> dict[float, float]:
        """Budget -> milliseconds, of the cell nearest to the present rows and context, by their
        logarithms.
        """
        nearest = min(
            self.cells,
            key=lambda cell: (
                abs(math.log(cell[0] / max(1, rows))) + abs(math.log(cell[1] / max(1.0, context))),
                cell,
            ),
        )
        return self.cells[nearest]

    def useful(self, rows: int, context: float) -> tuple[float, ...]:
        """The budgets worth choosing among, the largest first: each is faster than all before it by
        more than GAIN. Another one would give up quality for nothing.
        """
        times = self.at(rows, context)
        found = [self.budgets[-1]]
        for budget in self.budgets[-2::-1]:
            if times[budget] < (1 - GAIN) * times[found[-1]]:
                found.append(budget)
        return tuple(found)


def read_latency(path: str, budgets: Sequence[float], device: str) -> LatencyTable:
    """What launch.benchmark has written.

    Raises:
        ValueError: it cannot be used: another device, other budgets, or no such file.
    """
    try:
        found = json.loads(Path(path).expanduser().read_bytes())
        measured_on = str(found["device"]["device"])
        points = [_point(entry) for entry in found["measured"] if entry["budget"] is not None]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"serve.latency={path} cannot be read ({type(error).__name__}: {error}); write it with "
            "python -m launch.benchmark output=FILE"
        ) from error
    if measured_on != device:
        raise ValueError(
            f"serve.latency={path} was measured on {measured_on}, and this is {device}; measure it "
            "here"
        )
    attentions = {attention for attention, _ in points}
    missing = sorted(set(budgets) - {point.budget for _, point in points})
    if len(attentions) > 1 or missing:
        why = (
            f"lacks budget {', '.join(f'{b:g}' for b in missing)}"
            if missing
            else "has several attentions"
        )
        raise ValueError(
            f"serve.latency={path} {why}; measure the saved budgets with one attention"
        )
    try:
        return LatencyTable([point for _, point in points if point.budget in set(budgets)])
    except ValueError as error:
        raise ValueError(f"serve.latency={path}: {error}") from error


def _point(entry: dict[str, Any]) -> tuple[str, Point]:
    itl = float(entry["itl_p50_ms"])
    if not 0 < itl < math.inf:
        raise ValueError(f"itl_p50_ms is {itl}")
    return str(entry["attention"]), Point(
        float(entry["budget"]), int(entry["rows"]), int(entry["context"]), itl
    )


class LoadController:
    """Holds a latency. What is seen at the present budget, times what was measured of another one
    against it, is expected of the other; the largest useful budget is given of which the limit is
    expected to hold.

    Args:
        target_ms: below which 95% of the times between tokens are to stay; least: no lower budget
            is given.

    Attributes:
        budget: what a request gets now; prefill_share: of engine.prefill_tokens that a step may
            have, which shrinks when the lowest useful budget is not enough.
    """

    def __init__(self, table: LatencyTable, target_ms: float, least: float | None = None):
        self.table, self.target = table, target_ms / 1e3
        self.least = table.budgets[0] if least is None else least
        self.budget = table.budgets[-1]
        self.prefill_share = 1.0
        self._seen: list[tuple[float, int, float]] = []

    def saw(self, seconds: float, rows: int, context: float) -> bool:
        """A step in which `rows` requests got a token, with so many tokens held by each; True: a
        decision was taken.
        """
        self._seen.append((seconds, rows, context))
        if len(self._seen) < WINDOW:
            return False
        times = sorted(seconds for seconds, _, _ in self._seen)
        p95 = times[math.ceil(0.95 * len(times)) - 1]
        _, all_rows, contexts = zip(*self._seen, strict=True)
        self._seen = []
        self._decide(p95, round(sum(all_rows) / WINDOW), sum(contexts) / WINDOW)
        return True

    def _decide(self, p95: float, rows: int, context: float) -> None:
        times = self.table.at(rows, context)
        useful = [b for b in self.table.useful(rows, context) if b >= self.least]
        useful = useful or [self.table.budgets[-1]]
        now = self.budget

        def holds(budget: float) -> bool:
            limit = self.target * (1 - SPARE) if budget > now else self.target
            return p95 * times[budget] / times[now] <= limit

        self.budget = next((b for b in useful if holds(b)), useful[-1])
        if self.budget == useful[-1] and p95 > self.target:
            self.prefill_share = max(LEAST_PREFILL, self.prefill_share / 2)
        elif p95 < self.target * (1 - SPARE):
            self.prefill_share = min(1.0, 2 * self.prefill_share)
