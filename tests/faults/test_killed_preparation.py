"""Killed at random moments and started again, a preparation makes the store that peace makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.nightly


@pytest.mark.parametrize("seed", [0, 1])
def test_three_kills_cost_nothing_and_change_nothing(tmp_path, seed):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "bench.killed_preparation", "--megabytes", "30"),
            *("--vocabulary", "2000", "--seed", str(seed), "--folder", str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["equal"] and found["files"] > 5
    assert any(kill["killed"] for kill in found["kills"])
    assert found["shards_kept_by_the_last"] == found["kills"][-1]["shards_on_disk"]
