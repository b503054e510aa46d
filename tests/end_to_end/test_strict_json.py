"""A run whose steps are skipped, because nothing is finite any more, writes JSON that every parser
reads.
"""

from __future__ import annotations

import json

import pytest

from tests.end_to_end.commandline import TINY, launch, write_text

pytestmark = pytest.mark.slow


def strict(text: str):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_run_that_skips_every_step_writes_json_and_says_so(tmp_path):
    run = tmp_path / "run"
    done = launch(
        "train",
        *TINY,
        *write_text(tmp_path),
        f"run_dir={run}",
        "train.num_steps=6",
        "optim.lr=1e15",
        "optim.warmup_steps=0",
        "train.clip_grad_norm=0",
        "train.on_nonfinite=skip",
        "train.eval_interval=4",
        "checkpoint.save_interval=3",
        "tracker.metrics=detailed",
        "+alarms.mine={metric: train/loss, above: 9}",
    )
    result = strict(done.stdout.strip().splitlines()[-1])
    assert (
        result["val_loss"] is None and result["train_loss"] is None and result["skipped_steps"] == 5
    )
    assert "5 of 6 steps were skipped" in done.stdout
    written = [path for path in run.rglob("*.json*") if "wandb" not in path.parts]
    names = {path.name for path in written}
    assert {
        "metrics.jsonl",
        "routing.jsonl",
        "alarms.jsonl",
        "result.json",
        "state.json",
        "steps.jsonl",
    } <= names
    for path in written:
        for text in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        ):
            strict(text)
    records = [strict(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "train/lr" in record]
    assert [record["step"] for record in trained if record["train/loss"] is not None] == [1]
    assert all("moe/max_vio" not in record for record in trained[1:])
    alarm = strict((run / "alarms.jsonl").read_text().splitlines()[0])
    assert (
        alarm["alarm"] == "mine"
        and alarm["value"] is None
        and "train/loss is nan" in alarm["message"]
    )
    evaluated = launch("evaluate", f"run={run}")
    assert strict(evaluated.stdout.strip().splitlines()[-1])["val_loss"] is None
    resumed = launch("train", f"resume={run}", "train.num_steps=7")
    assert strict(resumed.stdout.strip().splitlines()[-1])["skipped_steps"] == 6
