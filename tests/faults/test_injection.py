"""The fault injector does what it says, on stand-ins for the two modules it breaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SITE = Path(__file__).resolve().parent / "site"
LOOP = """
import train.rank.heartbeat as heartbeat, train.engine.deepspeed, time
for step in range(1, 6):
    for phase in ("data", "forward", "backward", "step", "log"):
        heartbeat.beat(step, phase)
        if phase == "backward":
            value = train.engine.deepspeed.Engine().forward().loss_sum
            if value != value:
                print("nan at", step)
print("alive, beats", heartbeat.beats, "hour", time.time() - time.monotonic() > START + 1800)
"""


@pytest.fixture
def rank(tmp_path):
    """rank(fault, number=1) -> the finished process of a stand-in rank."""
    for folder in ("train", "train/rank", "train/engine"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "train/rank/heartbeat.py").write_text(
        "beats = 0\ndef beat(step, phase):\n    global beats\n    beats += 1\n"
    )
    (tmp_path / "train/engine/deepspeed.py").write_text(
        "from typing import NamedTuple\n"
        "class Output(NamedTuple):\n"
        "    loss_sum: float\n"
        "class Engine:\n"
        "    def forward(self):\n        return Output(1.0)\n"
        "    def backward(self, loss, is_last):\n        return loss\n"
    )

    def start(
        fault: str, number: int = 1, timeout: float = 20, other: str | None = None
    ) -> subprocess.CompletedProcess:
        path = [str(SITE), str(tmp_path)]
        if other is not None:
            (tmp_path / "sitecustomize.py").write_text(other)
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "LOADSTONE_FAULT": fault,
            "RANK": str(number),
            "LOADSTONE_FAULT_DIR": str(tmp_path),
        }
        script = "import time\nSTART = time.time() - time.monotonic()\n" + LOOP
        return subprocess.run(
            [sys.executable, "-c", script],
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd=tmp_path,
        )

    return start


@pytest.mark.parametrize(
    ("kind", "code"),
    [("kill", -9), ("oom", -9), ("segv", -11), ("exit0", 0), ("exit3", 3), ("raise", 1)],
)
def test_a_fault_ends_the_rank_at_its_heartbeat_and_only_once(rank, tmp_path, kind, code):
    first = rank(f"{kind}@1:3:forward")
    assert first.returncode == code and "alive" not in first.stdout
    fact = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert (fact["rank"], fact["step"], fact["phase"], fact["kind"]) == (1, 3, "forward", kind)
    assert "alive, beats 25" in rank(f"{kind}@1:3:forward").stdout


def test_a_fault_with_an_exclamation_mark_happens_at_every_start(rank):
    assert [rank("exit3!@1:3").returncode for _ in range(2)] == [3, 3]


def test_other_ranks_are_left_alone(rank):
    assert "alive, beats 25" in rank("kill@1:3;raise@2:1", number=0).stdout


@pytest.mark.parametrize("kind", ["hang", "spin", "stop"])
def test_a_hanging_rank_hangs(rank, kind):
    with pytest.raises(subprocess.TimeoutExpired):
        rank(f"{kind}@1:2", timeout=2)


def test_the_loss_is_spoiled_in_its_step_alone(rank):
    assert [line for line in rank("nan_loss@1:3").stdout.splitlines() if "nan" in line] == [
        "nan at 3"
    ]


def test_the_clock_of_a_rank_is_set_ahead(rank):
    assert "hour True" in rank("clock@1:2").stdout and "hour False" in rank("clock@0:2").stdout


def test_a_sitecustomize_of_the_environment_still_runs(rank):
    assert "from the other" in rank("", other="print('from the other')").stdout
