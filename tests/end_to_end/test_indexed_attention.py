"""Attention by an index from the command line: a dense run converts, its index learns and then
chooses, and one that has learned nothing is refused wherever it would choose.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commandline import TINY, full_and_half, last_json, launch, losses, train_on, write_text

pytestmark = [pytest.mark.nightly]
INDEX = (
    "attention=qsa",
    "attention.block_size=2",
    "attention.top_k=2",
    "attention.index_heads=2",
    "attention.audit_rows=0.5",
)


def metrics(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "train/loss" in record]


def refusal(*command: str) -> str:
    result = launch(*command, check=False)
    said = result.stdout + result.stderr
    assert result.returncode != 0 and "Traceback" not in said, said
    return said


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with an index on two expert-parallel ranks, dense for 11 of 14 steps, uninterrupted and
    stopped after 10; and a dense run.
    """
    folder = tmp_path_factory.mktemp("indexed")
    full_and_half(folder, *INDEX, "attention.dense_steps=11", "train.num_steps=14")
    text = write_text(folder)
    launch("train", *TINY, *text, "train.num_steps=4", f"run_dir={folder / 'dense'}")
    return folder


def test_both_stages_resume_bit_for_bit_and_log_the_index(runs):
    shutil.copytree(runs / "half", runs / "resumed")
    train_on(2, f"resume={runs / 'resumed'}")
    assert losses(runs / "resumed") == losses(runs / "full")
    records = metrics(runs / "full")
    assert all(r["attention/index_loss"] > 0 for r in records)
    assert all(0 < r["attention/index_recall"] < 1 for r in records)


def test_a_dense_run_converts_and_an_index_that_has_learned_chooses_at_once(runs):
    begun = (*TINY, *write_text(runs), "train.num_steps=3")
    launch(
        *("train", *begun, f"init.run={runs / 'dense'}", *INDEX, "attention.dense_steps=2"),
        f"run_dir={runs / 'converted'}",
    )
    dense, first = metrics(runs / "dense")[-1], metrics(runs / "converted")[0]
    assert abs(first["train/loss"] - dense["train/loss"]) < 0.5

    launch(
        *("train", *begun, f"init.run={runs / 'converted'}", "attention.dense_steps=0"),
        f"run_dir={runs / 'chooses'}",
    )
    assert len(metrics(runs / "chooses")) == 3
    said = last_json(launch("generate", f"run={runs / 'chooses'}", "prompt=the quick"))
    assert said["text"]
    found = last_json(launch("evaluate", f"run={runs / 'chooses'}"))
    assert 0 < found["attention/index_recall"] < 1


def test_an_index_that_has_learned_nothing_is_refused(runs):
    text = write_text(runs)
    new = ("train", *TINY, *text, *INDEX, f"run_dir={runs / 'never'}")
    at_once = "attention.dense_steps=0"
    for command, words in (
        ((*new, at_once), "an index which has learned nothing would choose"),
        ((*new, at_once, f"init.run={runs / 'dense'}"), "these weights do not have"),
        (
            (*new, at_once, f"init.run={runs / 'half'}"),
            "had learned for 10 of its 11 steps",
        ),
        (("evaluate", f"run={runs / 'dense'}", *INDEX), "these weights do not have"),
        (("generate", f"run={runs / 'dense'}", "prompt=a", *INDEX), "these weights do not have"),
        (("train", f"resume={runs / 'dense'}", *INDEX, "train.num_steps=8"), "does not hold"),
        (("export", f"run={runs / 'full'}", f"to={runs / 'out'}"), "no published family"),
    ):
        assert words in refusal(*command)
    assert not (runs / "never").exists()
