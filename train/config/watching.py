"""Settings of what is logged, watched and kept for later: tracker, alarms, audit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with a key and a reachable server, else offline."""
    project: str = "loadstone"
    entity: str | None = None


@dataclass(frozen=True)
class TrackerConfig:
    """Sinks besides metrics.jsonl and routing.jsonl, which are always written."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    metrics: Literal["brief", "detailed"] = "brief"
    """detailed: routing and attention metrics of every single layer, also those that are written as
    mean and largest otherwise (`layers*` in docs/metrics.md), and how gradients spread.
    """
    media_interval: int = 10
    """Every so many logged steps a heatmap and histograms of the experts' load go to the sinks; 0:
    never.
    """
    max_log_mib: int = 256
    """Most MiB of metrics.jsonl and of routing.jsonl each: old records are merged
    (train/files/log_file.py) to stay below;
    0: no limit."""

    def problems(self) -> list[str]:
        return [
            f"tracker.{name} is {getattr(self, name)}; it must not be negative (0 {meaning})"
            for name, meaning in (
                ("media_interval", "switches it off"),
                ("max_log_mib", "is no limit"),
            )
            if getattr(self, name) < 0
        ]


@dataclass(frozen=True)
class AlarmRule:
    """One alarm (train/guard/alarms.py): a metric beyond a limit, for long enough."""

    metric: str
    """Name in metrics.jsonl; with * several, of which the worst counts:
    moe/budget_error/layer_*.
    """
    above: float | None = None
    below: float | None = None
    """The limit; exactly one of the two."""
    absolute: bool = False
    """Compare the size of the metric, whatever its sign."""
    for_steps: int = 0
    """It must have been beyond the limit for so many steps; 0: once is enough."""
    after_step: int | None = 0
    """Silent up to this step; None: until the budget has settled (train.guard.alarms.settled)."""
    action: Literal["none", "freeze_bias", "top_k", "stop"] = "none"
    """While it rings: the selection bias stays as it is; adaptive routers choose plain top-k; the
    run is saved and ends.
    """
    points_at: Literal["none", "busiest", "idlest"] = "none"
    """Which expert the message names."""
    meaning: str = ""
    """In plain words, for people."""

    @property
    def threshold(self) -> float:
        limit = self.below if self.above is None else self.above
        assert limit is not None
        return limit

    @property
    def limit_text(self) -> str:
        return f"{'above' if self.above is not None else 'below'} {self.threshold:g}"

    def excess(self, value: float) -> float:
        """How far beyond the limit; not a number is furthest."""
        size = abs(value) if self.absolute else value
        distance = size - self.threshold if self.above is not None else self.threshold - size
        return math.inf if math.isnan(distance) else distance

    def beyond(self, value: float) -> bool:
        return self.excess(value) > 0

    def problems(self, path: str) -> list[str]:
        found = []
        if not self.metric:
            found.append(f"{path}.metric is empty; name a metric of metrics.jsonl")
        if (self.above is None) == (self.below is None):
            found.append(
                f"{path}: give one of above and below, the limit of {self.metric or 'the metric'}"
            )
        for name in ("for_steps", "after_step"):
            if (getattr(self, name) or 0) < 0:
                found.append(f"{path}.{name} is {getattr(self, name)}; it must not be negative")
        return found


@dataclass(frozen=True)
class AuditConfig:
    """Which tokens went where, in RUN/audit (train/audit/log.py); read it with `python -m
    launch.audit run=RUN`.
    """

    sample_one_in: int = 256
    """Tokens are sampled by a hash of their id, the same ones in every layer; 0 switches the audit
    off.
    """
    max_flagged: int = 64
    """Tokens with a fallback reason are written beside the sample, up to this many per layer,
    micro-batch and rank.
    """
    max_mib: int = 1024
    """Most MiB of RUN/audit over all ranks, shared evenly: of older steps only every so many-th
    stays; 0: no limit.
    """

    def problems(self) -> list[str]:
        return [
            f"audit.{name} is {getattr(self, name)}; it must not be negative"
            for name in ("sample_one_in", "max_flagged", "max_mib")
            if getattr(self, name) < 0
        ]


@dataclass(frozen=True)
class ProfileConfig:
    """A look at where time goes, in RUN/profile (train/timing/profile.py)."""

    steps: tuple[int, ...] = ()
    """[first, last] steps that are traced and whose time is printed by phase and operation; steps
    before them warm up. Empty: none.
    """
    all_ranks: bool = False
    """Trace every rank, not rank 0 alone."""

    def problems(self) -> list[str]:
        found = []
        if len(self.steps) not in (0, 2):
            found.append(f"profile.steps is {list(self.steps)}; give [first, last], as in [10,12]")
        elif self.steps and not 1 <= self.steps[0] <= self.steps[1]:
            found.append(
                f"profile.steps is {list(self.steps)}; the first must be at least 1, the last not "
                "before it"
            )
        if self.all_ranks and not self.steps:
            found.append("profile.all_ranks is true, but profile.steps names no step; add it")
        return found
