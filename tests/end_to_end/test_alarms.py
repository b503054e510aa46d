"""A router that goes wrong on purpose (planted.py): the alarm rings within 20 steps, and does what
it was told to.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import forked
from tests.end_to_end.commandline import ROOT, TINY, last_json, last_of_each, launch, write_text

pytestmark = pytest.mark.slow
PLANTED_AT = 6


def train(folder: Path, fault: str, *overrides: str) -> subprocess.CompletedProcess:
    settings = (
        *TINY,
        *write_text(folder),
        "train.num_steps=30",
        "train.eval_max_sequences=2",
        f"run_dir={folder / 'run'}",
        *overrides,
    )
    arguments = [fault, *last_of_each(settings)]
    return forked.run(
        ROOT / "tests/end_to_end/planted.py", arguments, {**os.environ, "OMP_NUM_THREADS": "1"}, 300
    )


def records(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def test_collapse_rings_saves_and_ends_the_run(tmp_path):
    result = train(
        tmp_path,
        "collapse",
        "router.top_k=1",
        "router.normalize_weights=false",
        "alarms.collapse.action=stop",
        "alarms.collapse.after_step=5",
    )
    assert result.returncode == 65, result.stdout[-3000:] + result.stderr[-3000:]
    event = next(e for e in records(tmp_path, "alarms.jsonl") if e["alarm"] == "collapse")
    assert PLANTED_AT <= event["step"] <= PLANTED_AT + 20
    assert (event["expert"], event["action"], event["event"]) == (0, "stop", "raised") and event[
        "value"
    ] > 0.9
    assert "ALARM collapse" in result.stderr and "alarms.collapse.action=none" in result.stderr
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved and int(saved[-1].name[5:]) == event["step"]
    last = records(tmp_path, "metrics.jsonl")[-1]
    assert last["step"] == event["step"] and last["alarm/collapse"] == 1
    resumed = launch(
        "train", f"resume={tmp_path / 'run'}", "alarms.collapse.action=none", "train.num_steps=20"
    )
    assert last_json(resumed)["step"] == 20


def test_a_dead_expert_rings_and_the_bias_stays(tmp_path):
    result = train(tmp_path, "dead", "balance=loss_free", "alarms.dead_experts.action=freeze_bias")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    event = next(
        e
        for e in records(tmp_path, "alarms.jsonl")
        if e["alarm"] == "dead_experts" and e["step"] > PLANTED_AT
    )
    assert event["step"] <= PLANTED_AT + 20 and event["expert"] == 0
    ranges = {
        r["step"]: r["moe/bias_range"]
        for r in records(tmp_path, "metrics.jsonl")
        if "moe/bias_range" in r
    }
    moving = {ranges[step] for step in range(PLANTED_AT, event["step"] + 1)}
    frozen = {ranges[step] for step in range(event["step"] + 1, 31)}
    assert len(moving) > 1 and len(frozen) == 1


def test_a_drifting_budget_rings_and_brings_plain_top_k_back(tmp_path):
    result = train(
        tmp_path,
        "drift",
        "router=threshold",
        "router.budget=1",
        "router.max_experts=4",
        "balance=none",
        "budget.warm_start_steps=0",
        "budget.blend_steps=1",
        "budget.guard_steps=1000",
        "alarms.budget.after_step=5",
        "alarms.budget.action=top_k",
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    event = next(e for e in records(tmp_path, "alarms.jsonl") if e["alarm"] == "budget")
    assert (
        event["step"] <= PLANTED_AT + 20
        and event["layer"] is not None
        and abs(event["value"]) > 0.1
    )
    kept = [
        r
        for r in records(tmp_path, "metrics.jsonl")
        if r["step"] > event["step"] + 2 and "moe/experts_per_token" in r
    ]
    assert kept and all(abs(r["moe/budget_error"]) < 0.1 for r in kept), [
        r["moe/budget_error"] for r in kept
    ]
    last = records(tmp_path, "alarms.jsonl")[-1]
    assert any(
        e["alarm"] == "budget" and e["event"] == "cleared"
        for e in records(tmp_path, "alarms.jsonl")
    ), last
