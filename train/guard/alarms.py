"""Alarms: rules over logged metrics. Pure: it sees records and answers with events; loop.py acts on
them.

A rule holds while its metric is beyond its limit, and rings once it has held for `for_steps` steps;
it is over when the metric is within the limit again. Several metrics may match a rule (one of each
layer): the worst counts, and its layer is named.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from model.config import BudgetConfig
from train.config.watching import AlarmRule


@dataclass(frozen=True)
class AlarmEvent:
    """One line of alarms.jsonl. event: "raised" or "cleared". value: of the metric, at that step.
    layer, expert: where, as far as the metric tells."""

    step: int
    tokens: int
    alarm: str
    event: str
    value: float
    threshold: float
    layer: int | None
    expert: int | None
    message: str
    action: str | None
    metric: str


class AlarmStop(RuntimeError):
    """An alarm whose action is to stop. The run was saved."""

    on_all_ranks = True


@dataclass
class Held:
    """State of one rule; saved with every checkpoint."""

    since: int | None = None
    """First logged step of those in a row beyond the limit."""
    ringing: bool = False


SETTLING_STEPS = 100
"""How long the budget's controller may take after the warm start and the blend."""


def settled(rules: Mapping[str, AlarmRule], budget: BudgetConfig) -> dict[str, AlarmRule]:
    """The rules with a step instead of after_step=None."""
    step = budget.warm_start_steps + budget.blend_steps + SETTLING_STEPS
    return {
        name: rule if rule.after_step is not None else replace(rule, after_step=step)
        for name, rule in rules.items()
    }


@dataclass
class Alarms:
    """All rules of a run, each with its after_step (see `settled`). held: their state, by name."""

    rules: Mapping[str, AlarmRule]
    held: dict[str, Held] = field(default_factory=dict)

    def check(
        self,
        step: int,
        tokens: int,
        scalars: Mapping[str, Any],
        counts: Sequence[Sequence[int]] = (),
        layers: Sequence[int] = (),
    ) -> list[AlarmEvent]:
        """What changed at a logged step. counts: assignments by MoE layer and expert of the
        interval, to name an expert.
        """
        events = []
        for name, rule in self.rules.items():
            found = worst(rule, scalars)
            assert rule.after_step is not None
            if found is None:
                continue
            metric, value = found
            held = self.held.setdefault(name, Held())
            # a resumed run may have moved after_step
            if step <= rule.after_step or not rule.beyond(value):
                held.since = None
                if held.ringing:
                    held.ringing = False
                    events.append(
                        _event(step, tokens, name, "cleared", rule, metric, value, None, None)
                    )
                continue
            held.since = step if held.since is None else held.since
            if not held.ringing and step - held.since >= rule.for_steps:
                held.ringing = True
                layer, expert = place(metric, rule, counts, layers)
                events.append(
                    _event(step, tokens, name, "raised", rule, metric, value, layer, expert)
                )
        return events

    def silent(self, logged: Mapping[str, Any]) -> list[str]:
        """Rules that this record has no metric for."""
        return [name for name, rule in self.rules.items() if worst(rule, logged) is None]

    def ringing(self) -> list[str]:
        return [name for name in self.rules if name in self.held and self.held[name].ringing]

    def actions(self) -> set[str]:
        """What the alarms that ring now ask for."""
        found: set[str] = {self.rules[name].action for name in self.ringing()}
        return found - {"none"}

    def scalars(self, logged: Mapping[str, Any]) -> dict[str, int]:
        """alarm/<name>: 1 while it rings; of the rules whose metric this run logs."""
        silent = self.silent(logged)
        return {
            f"alarm/{name}": int(name in self.held and self.held[name].ringing)
            for name in self.rules
            if name not in silent
        }

    def state(self) -> dict[str, tuple[int | None, bool]]:
        return {name: (held.since, held.ringing) for name, held in self.held.items()}

    def restore(self, state: Mapping[str, Sequence[Any]]) -> None:
        self.held = {name: Held(*values) for name, values in state.items() if name in self.rules}


def worst(rule: AlarmRule, scalars: Mapping[str, Any]) -> tuple[str, float] | None:
    """The matching metric that is furthest beyond (or nearest to) the limit; one that is not a
    number is beyond any.
    """
    if any(c in rule.metric for c in "*?["):
        found = [(k, v) for k, v in scalars.items() if fnmatch.fnmatchcase(k, rule.metric)]
    else:
        found = [(rule.metric, scalars[rule.metric])] if rule.metric in scalars else []
    found = [(k, v) for k, v in found if isinstance(v, (int, float))]
    return max(found, key=lambda item: rule.excess(item[1])) if found else None


def place(
    metric: str, rule: AlarmRule, counts: Sequence[Sequence[int]], layers: Sequence[int]
) -> tuple[int | None, int | None]:
    """Layer and expert: the layer from the metric's name or else the one where the busiest (idlest)
    expert stands out.
    """
    if not metric.startswith("moe/") or rule.points_at == "none" or not len(counts):
        return _layer_of(metric), None
    rows = [i for i, layer in enumerate(layers) if _layer_of(metric) in (None, layer)]
    sign = 1 if rule.points_at == "busiest" else -1

    def load(row: int, expert: int) -> float:
        return sign * counts[row][expert] * len(counts[row]) / max(1, sum(counts[row]))

    row, expert = max(
        ((r, e) for r in rows for e in range(len(counts[r]))), key=lambda place: load(*place)
    )
    return layers[row], expert


def _layer_of(metric: str) -> int | None:
    head, _, number = metric.rpartition("/layer_")
    return int(number) if head and number.isdigit() else None


def _event(
    step: int,
    tokens: int,
    name: str,
    event: str,
    rule: AlarmRule,
    metric: str,
    value: float,
    layer: int | None,
    expert: int | None,
) -> AlarmEvent:
    if event == "raised":
        held = f" for {rule.for_steps} steps" if rule.for_steps else ""
        where = (
            ""
            if layer is None
            else f"; layer {layer}" + ("" if expert is None else f", expert {expert}")
        )
        text = f"{reading(name, rule, metric, value)}{held}{where}"
    else:
        text = f"over: {metric} is {_number(value)} again"
    threshold = rule.threshold
    return AlarmEvent(
        step,
        tokens,
        name,
        event,
        value,
        threshold,
        layer,
        expert,
        text,
        rule.action if event == "raised" and rule.action != "none" else None,
        metric,
    )


def reading(name: str, rule: AlarmRule, metric: str, value: float) -> str:
    """What is wrong, in a few words: the meaning of the rule, the value and the limit."""
    return f"{rule.meaning or name}: {metric} is {_number(value)}, {rule.limit_text}"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
