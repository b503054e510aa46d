"""Readers of long logs hold what they show, see merged records as what they are, and keep to the
file they began to read.
"""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest

from launch.place import measure
from launch.runs import loads as loads_of_runs
from launch.runs.curves import read_curves
from launch.runs.lines import LineIndex, spread_records
from launch.runs.loads import read_frames
from train.audit.files import evenly_over
from train.files.log_file import LogFile, merge_routing

SHAPE = (2, 4)


@pytest.fixture
def routing(tmp_path):
    """A thinned log of 1,000 steps, in which every layer and expert gets `step` assignments."""
    log = LogFile(tmp_path / "routing.jsonl", None, 20_000, merge_routing)
    for step in range(1, 1001):
        log.write(
            {
                "step": step,
                "tokens": 10 * step,
                "counts": [[step] * 4] * 2,
                "k_histogram": [[0, step]] * 2,
            }
        )
    log.close()
    return tmp_path / "routing.jsonl"


def test_frames_of_a_thinned_log_are_even_over_steps_and_have_its_sums(routing, monkeypatch):
    whole = read_frames(routing, *SHAPE)
    assert (
        whole is not None
        and whole.counts.sum() == 8 * 1000 * 1001 / 2
        and whole.k_histogram is not None
    )
    assert (
        whole.num_lines == len(whole.step) < 300
        and whole.tokens.tolist() == (10 * whole.step).tolist()
    )
    monkeypatch.setattr(loads_of_runs, "MAX_FRAMES", 5)
    few = read_frames(routing, *SHAPE)
    assert few is not None and few.num_lines == whole.num_lines
    assert few.step[[0, -1]].tolist() == whole.step[[0, -1]].tolist()
    assert np.abs(few.step - np.linspace(few.step[0], 1000, 5)).max() <= 64


def test_placement_sums_neighbours_where_there_are_many(routing, monkeypatch):
    _, step, loads = measure.read_loads(routing, SHAPE)
    monkeypatch.setattr(measure, "MAX_LOADS", 8 * 10)
    _, few, sums = measure.read_loads(routing, SHAPE)
    assert len(few) <= 10 < len(step) and few[-1] == step[-1] == 1000
    np.testing.assert_array_equal(sums.sum(0), loads.sum(0))
    after, last, _ = measure.read_loads(routing, SHAPE, 6)
    assert last.tolist() == [*range(995, 1001)] and after == 994


def test_a_log_that_is_replaced_meanwhile_is_read_as_it_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step}) + "\n" for step in range(1, 50)) + '{"step": 50, "cut o'
    )
    index = LineIndex(path)
    (tmp_path / "other").write_text('{"step": 9}\n')
    (tmp_path / "other").replace(path)
    assert [json.loads(line)["step"] for line in index.lines(np.arange(49))] == list(range(1, 50))
    assert [r["step"] for r in spread_records(path, 3)] == [9] and spread_records(
        tmp_path / "none", 3
    ) == []


def test_a_cut_last_line_gives_way_to_the_one_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step}) + "\n" for step in range(1, 50)) + '{"step": 50, "cut o'
    )
    assert [r["step"] for r in spread_records(path, 3)] == [1, 25, 49]


def test_merged_metrics_are_curves_and_their_number_of_records_is_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 4, "tokens": 40, "records": 4, "train/loss": 2.0},
        {"step": 4, "tokens": 40, "eval/val_loss": 3},
        {"step": 5, "tokens": 50, "train/loss": None, "flag": True, "text": "x"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = read_curves(path)
    assert set(curves) == {"train/loss", "eval/val_loss", "flag"}
    assert curves["train/loss"].tokens.tolist() == [40, 50] and np.isnan(curves["train/loss"].last)
    assert curves["eval/val_loss"].step.tolist() == [4] and curves["flag"].step.tolist() == [5]


def test_curves_take_twenty_bytes_a_value(tmp_path):
    path, number = tmp_path / "metrics.jsonl", 2000
    path.write_text(
        "".join(
            json.dumps({"step": s, "tokens": s, **{f"m{i}": s / 7 for i in range(100)}}) + "\n"
            for s in range(number)
        )
    )
    tracemalloc.start()
    curves = read_curves(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(curves) == 100 and peak < 24 * 100 * number


@pytest.mark.parametrize("most", [1, 2, 3, 7, 100])
def test_even_choices_have_both_ends(most):
    steps = np.array([1, 2, 3, 50, 51, 52, 53, 54, 99, 100])
    rows = evenly_over(steps, most)
    assert (
        len(rows) <= most
        and rows[-1] == 9
        and (most == 1 or rows[0] == 0)
        and (np.diff(rows) > 0).all()
    )
