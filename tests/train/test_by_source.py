"""Held-out loss by source: in the records, the report and launch.evaluate, under any layout."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.end_to_end.commandline import launch, write_text
from tests.launch.test_stop import train_here
from tests.train.test_metric_names import compare
from train.data.loader import shared_out, validation_batches
from train.data.store import TokenStore, ValidationRows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("by_source")
    cache = write_text(folder)[-1]
    lines = [f"number {i * i} and {i}" for i in range(200)]
    for name in ("sums", "exam"):
        (folder / f"{name}.txt").write_text("\n".join(f"{name} {line}" for line in lines))
    of = [f"{{path:text,data_files:{folder}/{n}.txt,sample_by:line}}" for n in ("text", "sums")]
    data = [
        "data=files",
        f"data.sources=[{','.join(of)}]",
        f"data.validation.sources=[{{path:text,data_files:{folder}/exam.txt,sample_by:line}}]",
        "data.validation_fraction=0.2",
        cache,
    ]
    train_here(
        folder / "run",
        data,
        "train.num_steps=3",
        "train.eval_interval=3",
        "train.eval_max_sequences=null",
        "train.sample_prompt=null",
    )
    return folder / "run"


def test_the_losses_of_the_sources_make_the_whole_and_launch_evaluate_tells_the_same(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (record,) = [record for record in records if "eval/val_loss" in record]
    losses = {key[14:]: loss for key, loss in record.items() if key.startswith("eval/val_loss/")}
    assert set(losses) == {"text", "sums", "exam"}
    assert {f"eval/val_loss/{name}" for name in losses} <= compare(run, 1)

    told = json.loads(launch("evaluate", f"run={run}").stdout.splitlines()[-1])
    assert {name: found["val_loss"] for name, found in told["by_source"].items()} == pytest.approx(
        losses, rel=1e-5
    )
    targets = {name: found["num_targets"] for name, found in told["by_source"].items()}
    assert sum(targets.values()) == told["num_targets"]
    whole = sum(losses[name] * targets[name] for name in losses) / told["num_targets"]
    assert whole == pytest.approx(record["eval/val_loss"], rel=1e-6)

    # the numbers that end each line are hard, and only these sources have them
    assert losses["text"] != losses["sums"] != losses["exam"]

    launch("report", f"run={run}")
    page = (run / "report" / "index.html").read_text()
    assert "Held-out loss by source" in page and "eval/val_loss/exam" in page


@pytest.mark.parametrize("most", [None, 7])
def test_any_layout_sees_the_same_rows_of_every_source(run, most):
    manifest = json.loads((run / "data" / "manifest.json").read_text())
    store = TokenStore(run.parent / "cache" / manifest["fingerprint"])
    rows = ValidationRows(store, 16)

    def seen(ranks: int) -> list[tuple[int, list[int]]]:
        shares = [
            list(validation_batches(rows, 2, store.end_of_document, rank, ranks, most))
            for rank in range(ranks)
        ]
        assert len({len(share) for share in shares}) == 1
        for same in zip(*shares, strict=True):
            assert len({batch.source for batch in same}) == 1
        return sorted(
            (batch.source, row.tolist())
            for share in shares
            for batch in share
            for row, mask in zip(
                batch.input_ids,
                np.ones(2, bool) if batch.token_mask is None else batch.token_mask.any(1),
                strict=True,
            )
            if mask
        )

    one = seen(1)
    assert one == seen(2) == seen(4)
    assert {source for source, _ in one} == {0, 1, 2}
    assert most is None or len(one) == most


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ([10, 30], None, [10, 30]),
        ([10, 30], 50, [10, 30]),
        ([10, 30], 8, [2, 6]),
        ([1, 99], 10, [1, 9]),
        ([5, 5, 5], 7, [3, 2, 2]),
        ([], 7, []),
    ],
)
def test_sequences_are_shared_out_in_proportion_to_the_rows(sizes, most, expected):
    assert shared_out(sizes, most) == expected
