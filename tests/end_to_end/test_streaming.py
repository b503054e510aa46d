"""data.streaming=true by the command line: any number of ranks, workers and restarts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.commandline import TINY, last_json, launch, write_text

pytestmark = pytest.mark.nightly
STREAM = ("data.streaming=true", "data.stream.head_documents=120", "balance=none")


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines if '"train/loss"' in line]


def test_a_resumed_run_and_one_on_two_ranks_train_on_the_same_rows(tmp_path):
    data = (*write_text(tmp_path), *STREAM)
    whole, parts, ranks = (tmp_path / name for name in ("whole", "parts", "ranks"))
    result = launch("train", *TINY, *data, f"run_dir={whole}", "data.stream.workers=1")
    assert "streamed, shuffled in windows of 64 MiB" in result.stdout + result.stderr
    assert "is read to its end: pass 1 has" in result.stdout + result.stderr

    launch("train", *TINY, *data, f"run_dir={parts}", "train.stop_after_step=7")
    told = launch("train", f"resume={parts}", "train.stop_after_step=null", "data.stream.workers=3")
    assert losses(parts) == losses(whole) and len(losses(whole)) == 20
    assert last_json(told)["val_loss"] == last_json(result)["val_loss"]

    two = ("launch=deepspeed", "launch.num_devices=2", "train.global_batch_size=4")
    launch("train", *TINY, *data, *two, f"run_dir={ranks}")
    assert losses(ranks) == pytest.approx(losses(whole), rel=1e-5)

    # what reads a run: held-out text is of the head, samples of the stream have no text
    assert last_json(launch("evaluate", f"run={whole}", "max_sequences=16"))["val_loss"] > 0
    assert "the text of a stream is not kept" in launch("audit", f"run={whole}").stdout
