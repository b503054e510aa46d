"""Sparse attention from the command line: stages, resuming, turning a dense run sparse, serving
with another attention.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commandline import TINY, full_and_half, last_json, launch, losses, train_on, write_text

pytestmark = [pytest.mark.slow]
SMALL = (
    "attention.block_size=4",
    "attention.coarse_block_size=2",
    "attention.top_k=1",
    "attention.window_size=4",
    "attention.audit_rows=0.2",
)
SPARSE = (
    "attention=scc",
    *SMALL,
    "attention.dense_steps=4",
    "attention.noise_steps=10",
    "attention.min_top_k=0",
    "attention.offset=true",
    "attention.trust=true",
    "attention.sink=true",
    "attention.entries=gated",
    "attention.mass_kl_coeff=0.1",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Sparse runs on two expert-parallel ranks, one uninterrupted, one that stopped after 10 steps;
    and a dense run.
    """
    folder = tmp_path_factory.mktemp("sparse")
    full_and_half(folder, *SPARSE, "train.num_steps=16")
    launch(
        "train",
        *TINY,
        *write_text(folder),
        "train.num_steps=16",
        f"run_dir={folder / 'dense'}",
        "train.stop_after_step=8",
    )
    return folder


def metrics(run: Path) -> list[dict]:
    return [
        r
        for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "train/loss" in r
    ]


def attention_metrics(record: dict) -> dict:
    return {name: value for name, value in record.items() if name.startswith("attention/")}


def test_noise_stages_and_audit_resume_bit_for_bit(runs):
    shutil.copytree(runs / "half", runs / "resumed")
    train_on(2, f"resume={runs / 'resumed'}")
    assert losses(runs / "resumed") == losses(runs / "full")
    for resumed, full in zip(metrics(runs / "resumed"), metrics(runs / "full"), strict=True):
        assert attention_metrics(resumed) == attention_metrics(full), full["step"]


def test_metrics_begin_after_the_dense_steps(runs):
    records = metrics(runs / "full")
    assert not any(attention_metrics(record) for record in records[:4])
    for record in records[4:]:
        assert (
            0 < record["attention/tail_mass"] < 1 and 0 < record["attention/tail_mass/layer_1"] < 1
        )
        assert 0 < record["attention/error"] <= record["attention/error_bound"] <= 1
        assert record["attention/bound_violations"] == 0 and record["attention/union_factor"] >= 1


def test_a_dense_run_goes_on_sparsely(runs):
    shutil.copytree(runs / "dense", runs / "converted")
    launch("train", f"resume={runs / 'converted'}", "attention=scc", *SMALL)
    records = metrics(runs / "converted")
    assert (
        len(records) == 16 and not attention_metrics(records[7]) and attention_metrics(records[8])
    )
    assert abs(records[8]["train/loss"] - records[7]["train/loss"]) < 0.5


def test_runs_are_evaluated_and_continued_with_another_attention(runs):
    # nothing is left out of documents this short: the same numbers, to rounding
    dense = last_json(launch("evaluate", f"run={runs / 'dense'}"))
    covered = last_json(
        launch("evaluate", f"run={runs / 'dense'}", "attention=scc", "attention.block_size=32")
    )
    assert (
        covered["val_loss"] == pytest.approx(dense["val_loss"], rel=1e-5)
        and covered["attention/tail_mass"] == 0
    )
    sparse = last_json(
        launch(
            "evaluate", f"run={runs / 'dense'}", "attention=scc", *SMALL, "attention.audit_rows=1"
        )
    )
    assert sparse["val_loss"] != dense["val_loss"] and 0 < sparse["attention/error"] < 1
    text = last_json(
        launch(
            "generate",
            f"run={runs / 'dense'}",
            "prompt=the quick",
            "attention=drop",
            *SMALL,
            "max_new_tokens=20",
        )
    )
    assert text["text"]


def test_wrong_settings_are_named_before_anything_starts():
    for overrides, words in (
        (["+attention.topk=4"], ["did you mean attention.top_k?"]),
        (["attention.tail=ht"], ["attention.tail is 'ht'; choose one of coarse, drop"]),
        (
            ["attention.top_k=-1", "attention.block_size=48"],
            ["attention.top_k is -1", "attention.block_size 48 is not divisible"],
        ),
    ):
        result = launch("plan", *TINY, "attention=scc", *overrides, check=False)
        said = result.stdout + result.stderr
        assert (
            result.returncode != 0
            and "Traceback" not in said
            and all(word in said for word in words)
        ), said
