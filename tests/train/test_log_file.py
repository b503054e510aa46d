"""Logs of a run stay below their limit, keep their sums, survive a kill at any moment, and are cut
from the end.
"""

from __future__ import annotations

import errno
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from train.config.watching import TrackerConfig, WandbConfig
from train.files import log_file
from train.files.log_file import LogFile, cut_after, is_evaluation, merge_metrics, merge_routing
from train.sinks.tracker import Tracker

LAYERS, EXPERTS = 2, 8
LIMIT = 40_000


def table(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {
        "counts": rng.integers(0, 1000, (LAYERS, EXPERTS)).tolist(),
        "k_histogram": [[step, 1]] * LAYERS,
        "reasons": [[step % 3] * 8] * LAYERS,
    }


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def total(records: list[dict], upto: int | None = None) -> np.ndarray:
    return sum(
        (np.array(r["counts"]) for r in records if upto is None or r["step"] <= upto),
        np.zeros((LAYERS, EXPERTS), int),
    )


def routing_log(path: Path, resume_step: int | None = None, borders=lambda: ()) -> LogFile:
    return LogFile(path, resume_step, LIMIT, merge_routing, borders=borders)


def write(log: LogFile, steps) -> None:
    for step in steps:
        log.write({"step": step, "tokens": 10 * step, **table(step)})


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 64, 1 << 18])
@pytest.mark.parametrize(
    "tail", ["", '{"step": 9, "cut o', "not json\n", '{"tokens": 1, "step": 9}\n']
)
def test_what_comes_after_the_resumed_step_is_cut_off(tmp_path, monkeypatch, block, tail):
    monkeypatch.setattr(log_file, "BLOCK", block)
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "x": "y" * step}) + "\n" for step in (1, 2, 2, 4, 5)]
    for step, kept in ((0, 0), (1, 1), (2, 3), (3, 3), (4, 4), (7, 5)):
        path.write_text("".join(lines) + tail)
        cut_after(path, step)
        assert path.read_text() == "".join(lines[:kept])


def test_a_resume_reads_the_end_of_a_log_and_holds_a_line_of_it(tmp_path):
    path = tmp_path / "routing.jsonl"
    with path.open("w") as file:
        for step in range(1, 401):
            file.write(json.dumps({"step": step, "counts": [12345] * 10_000}) + "\n")
    size = path.stat().st_size
    tracemalloc.start()
    LogFile(path, resume_step=390).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 25e6 and peak < 2e6
    assert len(path.read_text().splitlines()) == 390


# --- thinning -------------------------------------------------------------------------------------


def test_a_log_stays_below_its_limit_with_exact_sums_and_its_newest_records_as_they_were(tmp_path):
    path = tmp_path / "routing.jsonl"
    log, whole, largest = routing_log(path), np.zeros((LAYERS, EXPERTS), int), 0
    for step in range(1, 3001):
        write(log, [step])
        whole += np.array(table(step)["counts"])
        largest = max(
            largest, path.stat().st_size + sum(p.stat().st_size for p in tmp_path.glob(".*.tmp"))
        )
        assert path.stat().st_size <= LIMIT
    log.close()
    records = read(path)
    assert (total(records) == whole).all() and largest < 1.6 * LIMIT
    steps = [r["step"] for r in records]
    assert steps == sorted(set(steps)) and steps[-1] == 3000
    assert records[-1] == {"step": 3000, "tokens": 30_000, **table(3000)}
    assert sum(r.get("records", 1) for r in records) == 3000
    # a record is about the steps since the last
    for before, record in zip([{"step": 0}, *records], records, strict=False):
        assert (
            np.array(record["counts"])
            == total(
                [table(s) | {"step": s} for s in range(before["step"] + 1, record["step"] + 1)]
            )
        ).all()
    # the old part is even
    assert len({r["records"] for r in records if r["step"] < 1024}) == 1


def test_a_kill_at_any_moment_of_a_thinning_loses_nothing(tmp_path):
    path = tmp_path / "routing.jsonl"
    log, last = routing_log(path), 0
    while not log._thinning.is_on:
        last += 1
        write(log, [last])
    killed_in = 0
    while log._thinning.is_on:
        copy = tmp_path / f"killed-{last}"
        copy.mkdir()
        for file in (path, log._thinning.scratch):
            (copy / file.name).write_bytes(file.read_bytes())
        again = routing_log(copy / path.name, resume_step=last)
        assert [p.name for p in copy.iterdir()] == [path.name]
        write(again, range(last + 1, last + 4))
        again.close()
        assert (
            total(read(copy / path.name))
            == total([table(s) | {"step": s} for s in range(1, last + 4)])
        ).all()
        killed_in, last = killed_in + 1, last + 1
        write(log, [last])
    assert killed_in > 10 and read(path)[0]["records"] > 1


def test_a_thinning_that_cannot_be_written_leaves_the_log_as_it_is(tmp_path, monkeypatch, caplog):
    path = tmp_path / "routing.jsonl"
    log = routing_log(path)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log_file.os, "fsync", full)
    write(log, range(1, 300))
    log.close()
    assert [r["step"] for r in read(path)] == list(
        range(1, 300)
    ) and "could not be thinned (No space" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_no_record_is_merged_across_a_step_that_a_run_may_be_resumed_from(tmp_path):
    saved = (5, 333, 700)
    path = tmp_path / "routing.jsonl"
    log = routing_log(path, borders=lambda: saved)
    write(log, range(1, 1500))
    log.close()
    content = path.read_bytes()
    for step in saved:
        path.write_bytes(content)
        routing_log(path, resume_step=step).close()
        assert (
            total(read(path)) == total([table(s) | {"step": s} for s in range(1, step + 1)])
        ).all()


def test_a_table_of_another_shape_is_kept_apart():
    one, two = table(1), table(2)
    assert merge_routing(None, one, {**two, "counts": [[1]] * LAYERS}) is None
    assert merge_routing(None, one, {**two, "counts": two["counts"][:1]}) is None
    longer = merge_routing(None, one, {**two, "k_histogram": [[2, 1, 7]] * LAYERS})
    assert longer["k_histogram"] == [[3, 2, 7]] * LAYERS


def test_old_metrics_keep_spent_flops_mean_loss_and_every_evaluation(tmp_path):
    path, rng = tmp_path / "metrics.jsonl", np.random.default_rng(0)
    log = LogFile(path, None, LIMIT, merge_metrics, is_evaluation)
    tokens, flops, loss, evaluations = 0, 0.0, 0.0, []
    for step in range(1, 2001):
        new, per_token, value = int(rng.integers(1, 100)), float(rng.random()), float(rng.random())
        tokens, flops, loss = tokens + new, flops + new * per_token, loss + new * value
        log.write(
            {
                "step": step,
                "tokens": tokens,
                "train/loss": value,
                "train/lr": step / 2000,
                "moe/expert_flops_per_token": per_token,
                "moe/max_vio": value,
                "x": "y" * 40,
            }
        )
        if step % 50 == 0:
            evaluations.append({"step": step, "tokens": tokens, "eval/val_loss": value})
            log.write(evaluations[-1])
        assert path.stat().st_size <= LIMIT
    log.close()
    records = read(path)
    train = [r for r in records if "train/loss" in r]
    new = np.diff([r["tokens"] for r in train], prepend=0)
    assert new @ [r["moe/expert_flops_per_token"] for r in train] == pytest.approx(flops, rel=1e-12)
    assert new @ [r["train/loss"] for r in train] == pytest.approx(loss, rel=1e-12)
    assert [r for r in records if "eval/val_loss" in r] == evaluations
    assert all(r["train/lr"] == r["step"] / 2000 for r in train) and len(train) < 500
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)


def test_a_loss_that_was_not_finite_leaves_the_mean_of_the_others():
    def at(tokens, loss):
        return {"step": tokens, "tokens": tokens, "train/loss": loss}

    assert merge_metrics(None, at(10, None), at(20, 3.0))["train/loss"] == 3.0
    assert merge_metrics(None, at(10, 2.0), at(20, None))["train/loss"] == 2.0
    assert merge_metrics(at(10, 9.0), at(20, 2.0), at(50, 6.0))["train/loss"] == 5.0


def test_the_tracker_bounds_its_files_and_keeps_the_steps_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr("train.sinks.tracker.MIB", 20_000)
    (tmp_path / "checkpoints" / "step-00000123").mkdir(parents=True)
    tracker = Tracker(tmp_path, TrackerConfig(WandbConfig("disabled"), max_log_mib=1), {}, "name")
    for step in range(1, 600):
        tracker.log(step, step, {"train/loss": 1.0, "x": 0.123456789})
        tracker.log_routing(step, step, table(step))
    tracker.close({})
    for name in ("metrics.jsonl", "routing.jsonl"):
        assert (tmp_path / name).stat().st_size <= 20_000
        assert 123 in [r["step"] for r in read(tmp_path / name)]
    assert (
        total(read(tmp_path / "routing.jsonl"))
        == total([table(s) | {"step": s} for s in range(1, 600)])
    ).all()
