"""Benches run: none may rot unseen between the sessions on the machines that they are for.

Those of kernels start with `make bench`; here are the ones that a CPU does in little.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALLEST = {
    "checkpoint_scale": {"layers": 2, "experts": 8, "repeats": 1},
    "load_row": {"millions": 1, "rows": 2, "layers": 1, "length": 1024},
    "large_run": {"layers": 2, "experts": 8, "ranks": 2, "mib": 1, "audit-mib": 1},
    "prepare_data": {"megabytes": 1, "workers": 1, "rounds": 1, "vocabulary": 300},
    "killed_preparation": {"megabytes": 2, "kills": 1, "workers": 1, "vocabulary": 300},
    "reliability": {"steps": 12, "save-interval": 4},
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", SMALLEST)
def test_a_bench_runs_and_writes_what_it_found(name, tmp_path):
    found = tmp_path / "found.json"
    options = [word for key, value in SMALLEST[name].items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", f"bench.{name}", *options, "--json", str(found)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(found.read_text())
    assert result["bench"] == name and result["commit"]


def test_every_bench_of_a_cpu_is_run():
    """A new one belongs to the list above, or to those that are run otherwise."""
    otherwise = {
        *("common", "collect", "tune", "peers"),  # parts, and what needs a GPU
        *("grouped_mlp", "moe_layer", "router", "sparse_attention", "train_step"),  # make bench
        *("generation", "small_model"),  # need a run, and a package
        # need a commit to compare with; some minutes
        *("start_up", "optimizer_step", "compiled_blocks"),
    }
    there = {path.stem for path in (ROOT / "bench").glob("*.py")} - {"__init__"}
    assert there == otherwise | set(SMALLEST)
