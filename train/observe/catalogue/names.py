"""All metrics, and what other code asks of them by name. Imports no torch.

What reads the catalogue: docs/metrics.md is written from it (`make docs`); alarms may watch the
names in it; panels of the dashboard are there when their metrics are; the report takes labels,
number formats and the better direction from it; and tests compare it with what runs log.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from train.observe.catalogue.attention import ATTENTION
from train.observe.catalogue.evaluation import EVALUATION_AND_ALARMS
from train.observe.catalogue.record import Level, Metric, Moment, Need
from train.observe.catalogue.routing import ROUTING
from train.observe.catalogue.training import TRAINING

GROUPS = (*TRAINING, *ROUTING, *ATTENTION, *EVALUATION_AND_ALARMS)
"""In the order of docs/metrics.md."""
METRICS = {metric.name: metric for group in GROUPS for metric in group.metrics}
"""All scalars by name."""


def find(name: str) -> Metric:
    """The metric that is logged under this name: of a layer, an alarm, a decile, or its own.

    Raises:
        KeyError: no metric has this name; says which one is near.
    """
    base = re.sub(r"/(max|min|layer_\d+)$", "", name)
    base = re.sub(r"(?<=_)\d+$", "<decile>", base)
    if base.startswith("alarm/"):
        base = "alarm/<alarm>"
    if base.startswith("eval/val_loss/"):
        base = "eval/val_loss/<source>"
    for candidate in (name, base):
        if candidate in METRICS:
            return METRICS[candidate]
    near = difflib.get_close_matches(name, METRICS, 1)
    raise KeyError(
        f"{name!r} is no metric of train/observe/catalogue"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def matching(pattern: str) -> list[Metric]:
    """Metrics with some name that the regular expression matches as a whole."""
    return [
        metric
        for metric in METRICS.values()
        if any(re.fullmatch(pattern, name) for name in metric.names((0,), (0,), True))
    ]


def metric_names(
    moe_layers: Iterable[int], sparse_layers: Iterable[int], detailed: bool
) -> set[str]:
    """What a run with these layers can log at logged steps, whatever its router: what alarms can
    watch. detailed: with tracker.metrics=detailed.
    """
    moe, sparse = tuple(moe_layers), tuple(sparse_layers)
    found: set[str] = set()
    for metric in METRICS.values():
        if metric.moment is Moment.EVALUATION or Need.ALARMS in metric.needs:
            continue
        # What only some devices log is silent on the others and may be watched on all of them.
        if detailed or Need.DETAILED not in metric.needs or Need.CUDA in metric.needs:
            found |= metric.names(moe, sparse, detailed)
    return found


def names_under(
    conditions: Iterable[Need], moe_layers: Iterable[int], sparse_layers: Iterable[int]
) -> set[str]:
    """What a run with exactly these conditions and layers logs, evaluations included."""
    given, moe, sparse = frozenset(conditions), tuple(moe_layers), tuple(sparse_layers)
    return {
        name
        for metric in METRICS.values()
        if metric.needs <= given
        for name in metric.names(moe, sparse, Need.DETAILED in given)
    }


def _short(prefix: str, *levels: Level) -> tuple[str, ...]:
    """Names without their prefix of the metrics with one of these levels, in order."""
    return tuple(
        metric.name.removeprefix(prefix)
        for metric in METRICS.values()
        if metric.name.startswith(prefix) and set(levels) & set(metric.levels)
    )


BY_LAYER = _short("moe/", Level.LAYERS)
"""Routing metrics that are written for every layer; the others as mean and largest."""
SMALL_IS_BAD = _short("moe/", Level.MIN)
"""Routing metrics whose smallest layer is written as well."""
ATTENTION_BY_LAYER = _short("attention/", Level.LAYERS)
"""Attention metrics that are written for every sparse layer; of the others the mean."""
REASONS = tuple(
    name.removeprefix("moe/fallback/") for name in METRICS if name.startswith("moe/fallback/")
)
"""Why a token was routed otherwise than its router's mode alone would have: ops.router.Reason."""
