"""The alarms of a run: read what is logged, and agree on what follows from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from train.config.watching import AlarmRule
from train.guard.alarms import AlarmEvent, Alarms
from train.observe.base import Record
from train.rank.runtime import from_rank_zero

log = logging.getLogger("loadstone")


class AlarmActions:
    """Rules that are read on the rank that writes the records, and obeyed on all.

    Args:
        rules: by name, each with its after_step (train.guard.alarms.settled).
        state: of the checkpoint that the run goes on from (Alarms.state); {} for a new run.
        layers: transformer layer of each row of Record.tables["counts"].

    Attributes:
        actions: what ringing alarms ask for, the same on all ranks.
    """

    def __init__(
        self,
        rules: Mapping[str, AlarmRule],
        state: Mapping[str, Sequence[Any]],
        layers: Sequence[int],
    ):
        self._alarms, self._layers = Alarms(rules), layers
        self._alarms.restore(state)
        self._told_silent = False
        self.actions = frozenset(self._alarms.actions())

    def read(self, record: Record) -> list[AlarmEvent]:
        """What changed with this record, which gains alarm/<name> of every rule that has a
        metric.
        """
        if not self._told_silent and (silent := self._alarms.silent(record.scalars)):
            log.info(
                "alarms without a metric in this run: %s",
                ", ".join(f"{name} ({self._alarms.rules[name].metric})" for name in silent),
            )
        self._told_silent = True
        counts = record.tables.get("counts", ())
        events = self._alarms.check(
            record.step, record.tokens, record.scalars, counts, self._layers
        )
        record.scalars |= self._alarms.scalars(record.scalars)
        return events

    def agree(self) -> frozenset[str]:
        """What the alarms ask for after the last record, as the rank that has read it finds.
        Collective.
        """
        # Where no rule acts the ranks have nothing to agree on.
        if any(rule.action != "none" for rule in self._alarms.rules.values()):
            self.actions = from_rank_zero(lambda: frozenset(self._alarms.actions()))
        return self.actions

    def stopping(self) -> list[str]:
        """Names of the alarms that ring and ask to stop, on all ranks. Collective."""
        rules = self._alarms.rules
        return from_rank_zero(
            lambda: [name for name in self._alarms.ringing() if rules[name].action == "stop"]
        )

    def state(self) -> dict[str, tuple[int | None, bool]]:
        """What a checkpoint keeps; of the rank that reads the records."""
        return self._alarms.state()
