"""Whose error it is: one of our checks', a library's, or another rank's end."""

from __future__ import annotations

import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("launch", "train", "infer", "model", "ops")


class LostRank(RuntimeError):
    """A rank is gone; the message says what is known of it."""


def is_ours(error: BaseException) -> bool:
    """Whether a check of ours has raised it, whose message says what to do. Errors from inside
    libraries keep their traceback; one that was never raised is nobody's.
    """
    trace = traceback.extract_tb(error.__traceback__)
    if not trace:
        return False
    where = Path(trace[-1].filename).resolve()
    return any(where.is_relative_to(ROOT / package) for package in PACKAGES)
