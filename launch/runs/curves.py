"""Records of a run, line by line, and the curves in them."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from launch.runs.records import Curve
from train.files.log_file import MERGED, parsed

NO_METRICS = ("step", "tokens", MERGED)
"""What a record of metrics.jsonl says about itself."""


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a file as records, without those that are damaged or that a crash cut off. Nothing,
    where there is no file.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if (facts := parsed(line)) is not None:
                yield facts


def read_curves(path: Path) -> dict[str, Curve]:
    """Every metric of metrics.jsonl that is a number. null (older versions wrote NaN) is NaN:
    measured, and not finite.
    """
    steps, tokens = array("q"), array("q")
    rows: dict[str, array[int]] = {}
    values: dict[str, array[float]] = {}

    for number, facts in enumerate(records(path)):
        steps.append(facts["step"])
        tokens.append(int(facts.get("tokens", 0)))
        for key, value in facts.items():
            if key not in NO_METRICS and (value is None or isinstance(value, (int, float))):
                rows.setdefault(key, array("I")).append(number)
                values.setdefault(key, array("d")).append(
                    math.nan if value is None else float(value)
                )

    all_steps, all_tokens = np.array(steps, np.int64), np.array(tokens, np.int64)
    # most metrics are in the same records, and share their axes
    places: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    curves = {}
    for key, of_key in rows.items():
        at = np.array(of_key)
        axes = places.setdefault(
            hashlib.sha256(at.tobytes()).digest(), (all_steps[at], all_tokens[at])
        )
        curves[key] = Curve(*axes, np.array(values.pop(key)))
    return curves


def spent_flops(curves: dict[str, Curve], config: Any) -> Curve:
    """Training FLOPs so far: the sum over records of (tokens since the last one) * (D + 3 *
    moe/expert_flops_per_token).

    D are the training FLOPs of a token without its routed experts
    (model.cost.parameters.flops_per_token with 0 of them). The metric counts the forward pass of
    the experts that tokens really visited in the record's interval; backward costs twice as much.
    Records without the metric count as many experts as the config means a token to visit.
    """
    from model.cost.parameters import flops_per_token

    # Any metric of training will do as a grid; these stand in every record of it.
    grid = curves.get("train/lr") or curves.get("train/loss") or next(iter(curves.values()), None)
    if grid is None:
        empty = np.zeros(0, np.int64)
        return Curve(empty, empty, np.zeros(0))

    dense, planned = (
        flops_per_token(config.model, k, config.train.seq_len, config.attention.arguments)
        for k in (0.0, config.experts_per_token)
    )

    spent = dict.fromkeys(grid.step.tolist(), planned)
    experts = curves.get("moe/expert_flops_per_token")
    if experts is not None:
        spent |= {
            int(s): dense + 3 * v
            for s, v in zip(experts.step, experts.values, strict=True)
            if math.isfinite(v)
        }

    per_token = np.array([spent[int(s)] for s in grid.step])
    return Curve(grid.step, grid.tokens, np.cumsum(np.diff(grid.tokens, prepend=0) * per_token))
