"""A rank killed at a random step, on one machine: the job resumes by itself and no number of it
changes.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "end_to_end")]
from commandline import TINY, launch, losses, write_text  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]
NUM_STEPS, SAVE_INTERVAL = 16, 3
ROUTERS = {
    "threshold": ("router=threshold", "balance=none", "router.budget=1.5"),
    "top_p": ("router=top_p", "router.budget=1.5"),
    "null experts": ("router=null_experts", "router.budget=1.5"),
}
"""Adaptive routers: quantile cuts, a controlled P, a controlled shift of null logits. All state is
in buffers.
"""
CASES = [
    (stage, router)
    for stage, router in zip(
        (0, 1, 2, 3), ("threshold", "top_p", "null experts", "threshold"), strict=True
    )
]


def train(folder: Path, *overrides: str, fault: str = "", debug: str = "") -> dict[int, float]:
    (folder / "faults").mkdir(exist_ok=True)
    env = (
        {
            "LOADSTONE_FAULT": fault,
            "LOADSTONE_FAULT_DIR": str(folder / "faults"),
            "PYTHONPATH": os.pathsep.join([str(HERE / "site"), os.environ.get("PYTHONPATH", "")]),
        }
        if fault
        else {}
    )
    launch(
        "train",
        *TINY,
        f"train.num_steps={NUM_STEPS}",
        f"checkpoint.save_interval={SAVE_INTERVAL}",
        "launch=deepspeed",
        "launch.num_devices=2",
        "parallel.expert_parallel_size=2",
        "launch.max_restarts=1",
        "launch.restart_delay_seconds=0.1",
        "budget.warm_start_steps=3",
        "budget.blend_steps=4",
        *overrides,
        f"run_dir={folder / 'run'}",
        env=env,
        timeout=300,
    )
    return losses(folder / "run")


@pytest.mark.parametrize(("stage", "router"), CASES, ids=str)
def test_a_rank_killed_at_a_random_step_changes_nothing(tmp_path, stage, router):
    data = write_text(tmp_path)
    chance = random.Random(f"{stage} {router} {os.environ.get('LOADSTONE_SEED', '')}")
    rank, step = chance.randrange(2), chance.randrange(SAVE_INTERVAL + 2, NUM_STEPS)
    overrides = [*data, f"deepspeed=zero{stage}", *ROUTERS[router]]
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    expected = train(tmp_path / "whole", *overrides)
    found = train(tmp_path / "broken", *overrides, fault=f"kill@{rank}:{step}")
    struck = [
        json.loads(path.read_text()) for path in (tmp_path / "broken" / "faults").glob("*.json")
    ]
    assert [fact["rank"] for fact in struck] == [rank], "the fault did not happen"
    assert sorted(found) == list(range(1, NUM_STEPS + 1))
    assert found == expected, f"rank {rank} was killed at step {step}"
    print(
        f"ZeRO {stage}, {router}: rank {rank} killed at step {step}, {NUM_STEPS} losses bit-equal"
    )


PLACES = {
    "warm-up": (0, "forward#1"),
    "steady state": (1, "backward#2"),
    "drain": (0, "backward#4"),
}
"""Of four micro-batches in two stages: rank 0 goes forward once, then in turn, at last backward."""
LAPS = {
    "warm-up of laps": (0, "forward#3"),
    "steady state of laps": (1, "backward#3"),
    "drain of laps": (0, "backward#8"),
}
"""Likewise, of two runs of layers in each stage: rank 0 goes forward four times first."""


@pytest.mark.parametrize("place", [*PLACES, *LAPS])
def test_a_stage_killed_anywhere_in_the_pipeline_changes_nothing(tmp_path, place):
    data = write_text(tmp_path)
    rank, phase = (PLACES | LAPS)[place]
    laps = ("model.num_layers=4", "parallel.virtual_stages=2") if place in LAPS else ()
    overrides = [
        *data,
        "parallel=pp2",
        "parallel.expert_parallel_size=1",
        "deepspeed=zero1",
        "model.tie_embeddings=true",
        *ROUTERS["top_p"],
        *laps,
    ]
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    expected = train(tmp_path / "whole", *overrides)
    found = train(tmp_path / "broken", *overrides, fault=f"kill@{rank}:8:{phase}")
    (struck,) = [
        json.loads(path.read_text()) for path in (tmp_path / "broken" / "faults").glob("*.json")
    ]
    assert (struck["rank"], struck["step"], struck["phase"]) == (rank, 8, phase.partition("#")[0])
    assert sorted(found) == list(range(1, NUM_STEPS + 1)) and found == expected
    verdicts = [
        json.loads(line)
        for line in (tmp_path / "broken/run/supervisor.jsonl").read_text().splitlines()
    ]
    assert any(v.get("ranks") == [rank] and v.get("kind") == "killed" for v in verdicts), verdicts
    print(f"{place}: rank {rank} killed at {phase} of step 8, {NUM_STEPS} losses bit-equal")


def test_deterministic_reruns_are_bit_equal(tmp_path):
    data, found = write_text(tmp_path), []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        train(tmp_path / name, *data, "debug=deterministic", *ROUTERS["threshold"])
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        found.append(
            [
                {k: v for k, v in json.loads(line).items() if not k.startswith(("perf/", "comm/"))}
                for line in lines
            ]
        )
    assert found[0] == found[1] and len(found[0]) > NUM_STEPS
