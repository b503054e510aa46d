"""What a run says about itself, as records: curves, frames of loads, alarms, origins of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Curve:
    """A metric over the records that have it."""

    step: np.ndarray
    """[N] int64."""
    tokens: np.ndarray
    """[N] int64: tokens of training up to that record."""
    values: np.ndarray
    """[N] float64."""

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass(frozen=True)
class Frames:
    """Lines of routing.jsonl, evenly spread when there are too many."""

    step: np.ndarray
    """[F] int64."""
    tokens: np.ndarray
    """[F] int64, consumed so far."""
    counts: np.ndarray
    """[F, L, E] float32 assignments."""
    k_histogram: np.ndarray | None
    """[F, L, K + 1] float32 tokens by number of experts. None: the lines do not say."""
    deciles: dict[str, np.ndarray]
    """"frequency" and "loss" -> [F, 10] float64, mean experts of held-out tokens by decile, of the
    newest evaluation up to the step; NaN before the first.
    """
    num_lines: int
    """Usable lines of the file, shown or not."""

    @property
    def load(self) -> np.ndarray:
        """[F, L, E]: assignments over the layer's mean; 0 in a layer without any."""
        over_mean: np.ndarray = self.counts / np.maximum(self.counts.mean(2, keepdims=True), 1e-9)
        return over_mean

    @property
    def share(self) -> np.ndarray:
        """[F, L, E]: share of the layer's assignments."""
        shares: np.ndarray = self.counts / np.maximum(self.counts.sum(2, keepdims=True), 1e-9)
        return shares


@dataclass(frozen=True)
class Alarm:
    """Something wrong in plain words."""

    severity: str
    """critical or warning."""
    text: str
    """What is wrong, in one sentence."""
    since: int
    """Step."""
    until: int | None = None
    """Step; None while it lasts."""
    detail: str = ""
    """What else is known; "" if nothing is."""

    @property
    def active(self) -> bool:
        return self.until is None


@dataclass(frozen=True)
class Origins:
    """Where the tokens of experts come from, by the routing audit's sample."""

    sources: list[str]
    """Names of the data sources."""
    layers: list[list[dict[str, Any]]]
    """Per MoE layer a list of {expert, assignments, share, frequent, typical, sources}, the busiest
    expert first. Frequent and typical are lists of [text, times, lift]; sources is the share of the
    expert's assignments by source, aligned with `sources` above.
    """
    note: str
    """What the sample covers, or why there is none."""


@dataclass(frozen=True)
class RunData:
    """Everything the report shows of a run."""

    directory: Path
    """The run's directory."""
    config: Any
    """Its saved config."""
    curves: dict[str, Curve]
    """Its metrics by name."""
    flops: Curve
    """Training FLOPs spent so far, at every record of training (see spent_flops)."""
    frames: Frames | None
    """Loads of the experts over time; None: the run has no routing records."""
    alarms: list[Alarm]
    """What was wrong, the most urgent first."""
    alarm_source: str
    """What the alarms were read from."""
    origins: Origins | None
    """None: the run has no routing audit."""
    missing: list[str]
    """What could not be shown, and why."""
    settings: dict[str, Any]
    """The same config as plain data, resolved, without secrets."""

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(self.config.model.moe_layers)

    def last(self, key: str) -> float | None:
        return self.curves[key].last if key in self.curves else None


def evenly(number: int, most: int) -> np.ndarray:
    """Indices of at most `most` out of `number`, evenly spread, the first and the last among
    them.
    """
    return np.unique(np.linspace(0, max(0, number - 1), min(number, most)).round().astype(int))


MIN_RECORDS = 2
"""Shorter episodes are no alarm."""


def spans(mask: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of the runs of True that have MIN_RECORDS or reach from the only record to the
    end.
    """
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(int)))
    return [
        (int(a), int(b)) for a, b in edges.reshape(-1, 2) if b - a >= min(MIN_RECORDS, len(mask))
    ]
