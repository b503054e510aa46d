"""Load of experts over time, in frames of a size that a page can hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from launch.runs.lines import LineIndex
from launch.runs.records import Curve, Frames

MAX_CELLS = 6_000_000
"""Most expert loads (frames * layers * experts) in a page; of longer runs evenly spread lines are
shown.
"""
MAX_FRAMES = 2000


def read_frames(path: Path, num_layers: int, num_experts: int) -> Frames | None:
    """Loads and histograms, line by line, so that memory holds what is shown and not the file.
    None: no usable line.
    """
    index = LineIndex(path)
    num_lines = len(index)
    wanted = index.spread(max(1, min(MAX_FRAMES, MAX_CELLS // (num_layers * num_experts))))

    step: list[int] = []
    tokens: list[int] = []
    counts, histograms = [], []

    for row, line in zip(wanted.tolist(), index.lines(wanted), strict=True):
        frame = _frame(line, (num_layers, num_experts))
        if frame is None and row == num_lines - 1 and row - 1 not in wanted and row > 0:
            # the last line was cut off: the one before it
            (line,) = index.lines(np.array([row - 1]))
            frame = _frame(line, (num_layers, num_experts))
        if frame is None:
            num_lines -= 1
            continue
        step.append(frame["step"])
        tokens.append(int(frame.get("tokens", 0)))
        counts.append(np.array(frame["counts"], np.float32))
        histograms.append(
            np.array(frame.get("k_histogram") or np.zeros((num_layers, 1)), np.float32)
        )

    if not step:
        return None
    widths = [h.shape[1] for h in histograms]
    histogram = None
    # a run that was resumed with more experts per token has longer rows from there on
    if min(widths) > 1:
        histogram = np.stack(
            [np.pad(h, ((0, 0), (0, max(widths) - h.shape[1]))) for h in histograms]
        )

    # Columns that no token ever reached at the far end are left out.
    if histogram is not None:
        histogram = histogram[:, :, : int(np.flatnonzero(histogram.any((0, 1))).max(initial=0)) + 1]

    return Frames(
        np.array(step, np.int64),
        np.array(tokens, np.int64),
        np.stack(counts),
        histogram,
        {},
        num_lines,
    )


def _frame(line: bytes, shape: tuple[int, int]) -> dict[str, Any] | None:
    try:
        facts = json.loads(line)
        return (
            facts if np.shape(facts["counts"]) == shape and isinstance(facts["step"], int) else None
        )
    except (ValueError, KeyError, TypeError):
        return None


def _deciles(curves: dict[str, Curve], steps: np.ndarray) -> dict[str, np.ndarray]:
    found = {}
    for name in ("frequency", "loss"):
        by_decile = [curves.get(f"eval/experts_per_token/{name}_{d}") for d in range(10)]
        if any(curve is not None for curve in by_decile):
            found[name] = np.full((len(steps), 10), math.nan)
            for d, curve in enumerate(by_decile):
                if curve is not None:
                    at = np.searchsorted(curve.step, steps, side="right") - 1
                    found[name][at >= 0, d] = curve.values[at[at >= 0]]
    return found
