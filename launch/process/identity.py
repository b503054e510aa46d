"""Where this process stands: the repository it runs from, and its rank."""

from __future__ import annotations

import os
from pathlib import Path

from launch.process.environment import is_rank

ROOT = Path(__file__).resolve().parents[2]


def is_worker() -> bool:
    """Started by a launcher as one rank of a job."""
    return is_rank()


def rank() -> int:
    return int(os.environ["RANK"]) if is_rank() else 0
