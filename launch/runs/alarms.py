"""Alarms of a run: those it rang, and those that its records would have rung."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from launch.runs.curves import records
from launch.runs.records import Alarm, Curve, Frames, spans
from train.config.watching import AlarmRule
from train.guard.alarms import place, reading, worst


def read_alarms(
    path: Path,
    frames: Frames | None,
    layers: tuple[int, ...],
    rules: Mapping[str, AlarmRule],
    latest: Mapping[str, float],
) -> list[Alarm] | None:
    """Read the alarms of alarms.jsonl, the active ones first. None where the run keeps no such
    file.

    rules: of the run's config, by alarm. latest: the newest value of every metric.
    """
    if not path.is_file():
        return None

    # An alarm that was raised rings until it is cleared or raised anew.
    found: list[Alarm] = []
    ringing: dict[str, dict[str, Any]] = {}
    for event in records(path):
        name = str(event.get("alarm"))
        raised = ringing.pop(name, None)
        if raised is not None:
            found.append(_alarm(raised, event["step"], frames, layers))
        if event.get("event") == "raised":
            ringing[name] = event

    # What still rings is shown as it is now, not as it was when it was raised.
    present = [
        _at_present(event, rules.get(name), frames, layers, latest)
        for name, event in ringing.items()
    ]
    found += [_alarm(event, None, frames, layers) for event in present]
    return sorted(found, key=_urgency)


SEVERE = frozenset({"collapse", "attention_bound"})
"""Alarms (conf/alarms) that are critical in themselves; others are if they act on the run, point at
an expert that takes half of a layer, or have a value that is not finite.
"""


def read_not_finite(folder: Path, curves: dict[str, Curve]) -> list[Alarm]:
    """Skipped steps, losses that are not finite, and the step that ended the run: whatever alarms
    the run has.
    """
    found = []
    newest = max((int(curve.step[-1]) for curve in curves.values()), default=0)

    # The metric counts from the run's start: it grows where a step was skipped.
    if (skipped := curves.get("train/skipped_steps")) is not None and skipped.values.any():
        gains = np.flatnonzero(np.diff(skipped.values, prepend=0.0) > 0)
        first, last = int(gains[0]), int(gains[-1])
        until = None if last == len(skipped.step) - 1 else int(skipped.step[last + 1])
        text = (
            f"{skipped.values.max():.0f} of {newest} steps were "
            "skipped: their loss or gradient was not finite"
        )
        found.append(
            Alarm(
                "critical",
                text,
                int(skipped.step[first]),
                until,
                "train.on_nonfinite=skip; their batches are in failures/",
            )
        )

    for key, name in (("train/loss", "training"), ("eval/val_loss", "held-out")):
        if key in curves and not math.isfinite((loss := curves[key]).last):
            finite = np.flatnonzero(np.isfinite(loss.values))
            found.append(
                Alarm(
                    "critical",
                    f"the {name} loss is not a finite number",
                    int(loss.step[finite[-1] + 1 if len(finite) else 0]),
                )
            )

    # A run that ended at such a step has logged nothing of it, but kept its batch.
    ended = max(
        (
            int(path.parent.name[5:])
            for path in folder.glob("failures/step-*/rank-*.json")
            if path.parent.name[5:].isdigit()
        ),
        default=0,
    )
    if ended > newest:
        found.append(
            Alarm(
                "critical",
                f"loss or gradient of step {ended} was not finite, and nothing was logged since",
                ended,
                None,
                f"its batch is in failures/step-{ended:08d}",
            )
        )
    return found


def _urgency(alarm: Alarm) -> tuple[bool, bool, int]:
    return not alarm.active, alarm.severity != "critical", -alarm.since


def _at_present(
    event: dict[str, Any],
    rule: AlarmRule | None,
    frames: Frames | None,
    layers: tuple[int, ...],
    latest: Mapping[str, float],
) -> dict[str, Any]:
    """The event that raised an alarm, with the value, words and place of the newest record: how
    things stand, not how they once were. `before`: what it said. Without the rule or the metric
    only the loads can be looked at again."""
    name = str(event.get("alarm"))
    found = None if rule is None else worst(rule, latest)
    if rule is None or found is None:
        return event
    metric, value = found
    counts = () if frames is None else frames.counts[-1].tolist()
    layer, expert = place(metric, rule, counts, layers)
    words = reading(name, rule, metric, value)
    before = {} if value == event.get("value") else {"before": event.get("message")}
    return {**event, "value": value, "layer": layer, "expert": expert, "message": words, **before}


def _alarm(
    event: dict[str, Any], until: int | None, frames: Frames | None, layers: tuple[int, ...]
) -> Alarm:
    """An event of alarms.jsonl as an alarm, led by the expert that it points at if there is one."""
    name = str(event.get("alarm"))
    layer = event.get("layer")
    expert = event.get("expert")
    message = str(event.get("message") or name)

    value = event.get("value")
    text = message
    detail = ""
    crowded = False

    # An expert's share says more than the metric's value: as it is now, or, once the alarm is over,
    # as it was when it was raised.
    if (
        frames is not None
        and layer in layers
        and isinstance(expert, int)
        and 0 <= expert < frames.counts.shape[2]
    ):
        then = int(np.searchsorted(frames.step, event["step"]).clip(0, len(frames.step) - 1))
        at = then if until is not None else len(frames.step) - 1
        share, fair = frames.share[:, layers.index(layer), expert], 1 / frames.counts.shape[2]
        crowded = share[at] >= max(0.5, 2 * fair)
        text, detail = f"layer {layer}: {expert_words(expert, float(share[at]), fair)}", message
        if abs(share[at] - share[then]) > 0.1 * share[then]:
            detail = f"{message}; {share[then]:.0%} when it was raised"

    if event.get("before"):
        detail = f"{detail}; when it was raised: {event['before']}".removeprefix("; ")
    action = event.get("action")
    acts = bool(action and action != "none")
    if acts:
        detail = f"{detail}; action: {action}".removeprefix("; ")

    not_finite = "value" in event and (
        value is None or (isinstance(value, float) and not math.isfinite(value))
    )
    serious = name in SEVERE or acts or crowded or not_finite
    return Alarm("critical" if serious else "warning", text, event["step"], until, detail)


def expert_words(expert: int, share: float, fair: float) -> str:
    verb = "takes" if share >= fair else "gets only"
    return f"expert {expert} {verb} {share:.0%} of assignments (a fair share is {fair:.1%})"


RULES: tuple[tuple[str, str, float, str], ...] = (
    # metric, severity, limit of the absolute value, words; {value} is the last one within the span
    (
        "moe/layers_collapsed",
        "critical",
        0,
        "{value:.0f} collapsed layers route every token to one expert",
    ),
    (
        "attention/bound_violations",
        "critical",
        0,
        "{value:.0f} audited rows of attention lie beyond a bound that is proven",
    ),
    (
        "moe/dead_fraction",
        "warning",
        0.01,
        "{value:.1%} of experts get less than 5% of their fair share",
    ),
    (
        "moe/rank_load/max",
        "warning",
        1.3,
        "the busiest rank has {value:.2f} times the mean load, and all wait for it",
    ),
    ("moe/budget_error", "warning", 0.1, "tokens visit {value:+.0%} experts against the budget"),
    ("moe/dropped", "warning", 0.01, "{value:.1%} of assignments are dropped"),
    *(
        (
            f"moe/fallback/{reason}",
            "warning",
            0.001,
            f"{{value:.1%}} of tokens are routed by a fallback ({reason})",
        )
        for reason in ("nonfinite", "empty", "frozen", "overloaded")
    ),
)
"""What counts as wrong in a run that keeps no alarms of its own."""
VISITED = 0.8
"""An expert that so many of a layer's tokens visit, and twice its fair share, has swallowed the
layer.
"""
CROWDED = 4.0
"""Load over the mean above which one expert is worth a warning."""


def judge(curves: dict[str, Curve], frames: Frames | None, layers: tuple[int, ...]) -> list[Alarm]:
    """Alarms from the metrics and loads themselves, by RULES, VISITED and CROWDED."""
    found = []
    for key, severity, limit, words in RULES:
        if key in curves:
            curve = curves[key]
            found += [
                Alarm(
                    severity,
                    words.format(value=float(curve.values[end - 1])),
                    int(curve.step[start]),
                    None if end == len(curve.step) else int(curve.step[end]),
                )
                for start, end in spans(np.abs(curve.values) > limit)
            ]

    # An expert that takes the whole layer is an alarm of its own; others are named once for all
    # layers.
    if frames is not None:
        load = frames.load
        share = frames.share
        fair = 1 / frames.counts.shape[2]
        tokens = None if frames.k_histogram is None else frames.k_histogram.sum(2).clip(1)
        most = load.max(2)
        visited = np.zeros(most.shape) if tokens is None else frames.counts.max(2) / tokens
        swallowed = (visited >= VISITED) & (most >= 2)

        def crowd(row: int, line: int) -> str:
            expert = int(frames.counts[line, row].argmax())
            return (
                f"layer {layers[row]}: "
                f"{expert_words(expert, float(share[line, row, expert]), fair)}"
            )

        def add(severity: str, mask: np.ndarray, text: Callable[[int], str]) -> None:
            found.extend(
                Alarm(
                    severity,
                    text(end - 1),
                    int(frames.step[start]),
                    None if end == len(mask) else int(frames.step[end]),
                )
                for start, end in spans(mask)
            )

        for row in range(len(layers)):
            add("critical", swallowed[:, row], partial(crowd, row))
        crowded = (most >= CROWDED) & ~swallowed

        def worst(line: int) -> str:  # one alarm for all layers: there may be dozens
            row = int(np.where(crowded[line], most[line], 0).argmax())
            others = int(crowded[line].sum()) - 1
            return crowd(row, line) + (
                f", and {others} more layers have an expert beyond {CROWDED:g} times the mean"
                if others
                else ""
            )

        add("warning", crowded.any(1), worst)
    return sorted(found, key=_urgency)
