"""Random kills and stops in every phase, a few of them (tests/faults/chaos.py makes as many as one
likes).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(3600)]
DISTURBANCES = 16


def test_random_kills_and_stops_change_nothing(tmp_path):
    """In a process of its own, which adopts the orphans that it looks for."""
    counts = tmp_path / "counts.json"
    command = [
        sys.executable,
        str(Path(__file__).parent / "chaos.py"),
        "--folder",
        str(tmp_path),
        "--seed",
        os.environ.get("LOADSTONE_SEED", "1"),
        "--out",
        str(counts),
        "--disturbances",
        str(DISTURBANCES),
        "--per-cycle",
        "8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(counts.read_text()) if counts.exists() else {}
    assert done.returncode == 0, f"{found}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    assert found["disturbances"] >= DISTURBANCES and not found["failures"], found
    print({key: found[key] for key in ("disturbances", "cycles", "by_phase", "by_kind", "codes")})
