"""A command that needs no tensor starts without torch and numpy: what is wrong is said at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("exit", end.code, file=sys.stderr)
heavy = [name for name in ("torch", "numpy") if name in sys.modules]
print("loaded:", *heavy, file=sys.stderr)
"""
SPARSE = ("attention=scc", "router=threshold", "balance=none", "parallel=ep8")
EIGHT = ("launch=deepspeed", "launch.num_devices=8", "train.micro_batch_size=1")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("launch.plan",), '"problems": []'),
        (("launch.plan", *SPARSE, *EIGHT), '"problems": []'),
        (("launch.plan", "train.num_steps=-1"), "train.num_steps is -1"),
        (("launch.train", "--cfg", "job"), "num_steps: 300"),
        (("launch.train", "train.num_steps=-1"), "train.num_steps is -1"),
        (("launch.train", "router.top_k=99"), "router.top_k is 99; it must be between 1 and"),
        (("launch.train", *EIGHT, "launch.dry_run=true"), '"dry_run": true'),
        (("launch.train", "resume=nowhere"), "nowhere does not exist"),
        (("launch.evaluate", "run=nowhere"), "run=nowhere: nowhere does not exist; python -m"),
        (
            ("launch.generate", "run=nowhere", "prompt=x"),
            "run=nowhere: nowhere does not exist; python -m",
        ),
        (("launch.serve", "run=.", "serve.port=-1"), "serve.port is -1; it must be between"),
        (("launch.serve", "run=.", "serve.host=0.0.0.0"), "set the variable LOADSTONE_SERVE"),
        (("launch.prepare", "data.validation_fraction=7"), "data.validation_fraction is 7"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_it_says_what_it_has_to_without_torch(command, says):
    ran = subprocess.run(
        (sys.executable, "-W", "ignore", "-c", RUN, *command),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert says in ran.stdout + ran.stderr, ran.stderr[-2000:]
    loaded = ran.stderr.splitlines()[-1]
    assert loaded == "loaded:" or ("error:" not in ran.stderr and loaded == "loaded: numpy")


def test_the_probe_sees_what_was_loaded():
    line = "import sys; sys.modules['torch'] = sys\n" + RUN
    ran = subprocess.run(
        (sys.executable, "-W", "ignore", "-c", line, "launch.plan", "train.num_steps=-1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.stderr.splitlines()[-1] == "loaded: torch"
