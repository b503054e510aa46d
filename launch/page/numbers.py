"""Numbers as pages write them."""

from __future__ import annotations

import math

_SCALES = (
    (1e24, "Y"),
    (1e21, "Z"),
    (1e18, "E"),
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
)


def fmt(value: float | None, unit: str) -> str:
    """A number for people; fmt() in helpers.js writes the same."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else "not finite"
    if unit == "percent":
        return "<0.0001%" if 0 < abs(value) < 1e-6 else f"{100 * value:.3g}%"
    if unit == "duration":
        return duration(value)
    if unit == "seconds":
        return f"{value:.3g} s" if value >= 1 or value == 0 else f"{1000 * value:.3g} ms"
    if unit == "gib":
        return f"{value:.2f} GiB"
    for scale, letter in _SCALES:
        if abs(value) >= scale and (scale > 1e3 or abs(value) >= 1e4):
            return f"{value / scale:.3g}{letter}"
    return f"{value:.0f}" if unit == "count" or abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    if seconds < 59.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
