"""Where a record goes: the log of the console, the run's files, and the services that show them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from train.guard.alarms import AlarmEvent
from train.observe.base import Record
from train.sinks.console import console_line
from train.sinks.tracker import Tracker

log = logging.getLogger("loadstone")


class Sinks:
    """Writes what training found; on the one rank that writes.

    Args:
        num_steps: of the whole run, which the console shows.
        last_step: after which this run ends, for the time that is left.
    """

    def __init__(self, tracker: Tracker, num_steps: int, last_step: int):
        self._tracker, self._num_steps, self._last_step = tracker, num_steps, last_step

    def write(self, record: Record, events: Sequence[AlarmEvent]) -> None:
        """One logged step: what changed with the alarms first, since they say what to look at."""
        for event in events:
            log.warning(
                "step %d: ALARM %s %s: %s%s",
                event.step,
                event.alarm,
                event.event,
                event.message,
                f" (action: {event.action})" if event.action else "",
            )
            self._tracker.alarm(event)
        scalars = record.scalars
        self._tracker.log(record.step, record.tokens, scalars)
        if scalars.get("moe/layers_collapsed"):
            log.warning(
                "step %d: %d MoE layers have collapsed onto a few experts and are routed to "
                "one expert a token "
                "(fail_safe.collapse_share)",
                record.step,
                scalars["moe/layers_collapsed"],
            )
        if record.tables:
            self._tracker.log_routing(record.step, record.tokens, record.tables)
        seconds_left = (self._last_step - record.step) * scalars["perf/step_seconds"]
        log.info(console_line(record.step, self._num_steps, scalars, seconds_left))

    def write_evaluation(self, step: int, tokens: int, scalars: dict[str, Any]) -> None:
        """What a held-out evaluation found, by name."""
        self._tracker.log(step, tokens, scalars)

    def close(self, summary: dict[str, Any]) -> None:
        """The run is done; `summary` is its result."""
        self._tracker.close(summary)
