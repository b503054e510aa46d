"""Own files first; a sink that fails never ends a run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from train.config.training import TrainConfig
from train.config.watching import TrackerConfig, WandbConfig
from train.guard.alarms import AlarmEvent
from train.loop import evaluates_first
from train.progress import Progress
from train.sinks.media import Histogram, load_heatmap
from train.sinks.tracker import Tracker
from train.sinks.weights_and_biases import WeightsAndBiases, wandb_mode

QUIET = TrackerConfig(WandbConfig("disabled"))


def records(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def test_every_record_is_on_disk_at_once(tmp_path):
    tracker = Tracker(tmp_path, QUIET, {}, "name")
    tracker.log(1, 10, {"train/loss": 2.0})
    tracker.log_routing(1, 10, {"counts": [[3, 4]]})
    assert records(tmp_path) == [{"step": 1, "tokens": 10, "train/loss": 2.0}]
    assert records(tmp_path, "routing.jsonl") == [{"step": 1, "tokens": 10, "counts": [[3, 4]]}]
    tracker.close({})


def test_resuming_drops_records_that_will_be_written_again(tmp_path):
    tracker = Tracker(tmp_path, QUIET, {}, "name")
    for step in range(1, 6):
        tracker.log(step, step, {})
    tracker.close({})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "cut o')
    Tracker(tmp_path, QUIET, {}, "name", resume_step=3).close({})
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("act", "words", "kept"),
    [
        (
            lambda path: path.unlink(),
            "was removed while the run writes it: its records up to here are lost",
            [2, 3],
        ),
        (lambda path: path.write_text(""), "was cut short while the run writes it", [2, 3]),
        (lambda path: path.rename(path.with_suffix(".old")), "was removed", [2, 3]),
        (
            lambda path: (path.rename(path.with_suffix(".old")), path.touch()),
            "was replaced",
            [2, 3],
        ),
    ],
)
def test_a_file_that_vanishes_under_the_run_is_said_once_and_begun_anew(
    tmp_path, caplog, act, words, kept
):
    tracker = Tracker(tmp_path, QUIET, {}, "name")
    for step in (1, 2, 3):
        if step == 2:
            act(tmp_path / "metrics.jsonl")
        tracker.log(step, step, {})
        tracker.log_routing(step, step, {"counts": [[1]]})
    tracker.close({})
    assert [r["step"] for r in records(tmp_path)] == kept and len(
        records(tmp_path, "routing.jsonl")
    ) == 3
    assert len(caplog.messages) == 1 and words in caplog.text


def test_a_file_that_cannot_be_made_again_ends_no_run(tmp_path, caplog):
    tracker = Tracker(tmp_path, QUIET, {}, "name")
    tracker.log(1, 1, {})
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    for step in (2, 3):
        tracker.log(step, step, {})
    tracker.close({})
    assert len(caplog.messages) == 1 and "cannot be made again (Is a directory)" in caplog.text


def test_a_resumed_run_whose_records_are_gone_says_so(tmp_path, caplog):
    Tracker(tmp_path, QUIET, {}, "name").close({})
    (tmp_path / "metrics.jsonl").unlink()
    Tracker(tmp_path, QUIET, {}, "name", resume_step=7).close({})
    assert (
        len(caplog.messages) == 1
        and "metrics.jsonl is gone: its records up to step 7 are lost" in caplog.text
    )


@pytest.mark.parametrize("again", [False, True])
def test_an_evaluation_that_is_made_again_is_recorded_once(tmp_path, again):
    """Killed after an evaluation that a resumed run had made up for, a run had it twice in
    metrics.jsonl.
    """
    tracker = Tracker(tmp_path, QUIET, {}, "name")
    for step in (3, 6):
        tracker.log(step, step, {"train/loss": 2.0})
        tracker.log(step, step, {"eval/val_loss": 3.0})
    tracker.log(7, 7, {"train/loss": 2.0})
    tracker.close({})
    Tracker(tmp_path, QUIET, {}, "name", resume_step=6, evaluates_again=again).close({})
    assert [(r["step"], *[k for k in r if "/" in k]) for r in records(tmp_path)] == [
        (3, "train/loss"),
        (3, "eval/val_loss"),
        (6, "train/loss"),
        *([] if again else [(6, "eval/val_loss")]),
    ]


@pytest.mark.parametrize(
    ("step", "left", "stop_after_step", "expected"),
    [
        (6, True, None, True),
        (6, False, None, False),
        (20, False, None, True),
        (6, False, 6, True),
        (6, False, 8, False),
        (0, False, None, False),
    ],
)
def test_what_is_evaluated_first(step, left, stop_after_step, expected):
    settings = TrainConfig(20, 8, 1, 1, stop_after_step=stop_after_step)
    assert evaluates_first(Progress(step=step, evaluation_left=left), settings) is expected


def test_auto_is_offline_without_a_key_or_a_server(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert wandb_mode("auto") == ("offline", "no API key: `wandb login` to go online")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode("auto") == ("offline", "127.0.0.1 cannot be reached")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto")[0] == "disabled"


def test_a_failing_sink_is_switched_off(tmp_path, caplog):
    class Broken:
        def log(self, *args, **kwargs):
            raise OSError("quota")

    tracker = Tracker(tmp_path, QUIET, {}, "name")
    heard: list[int] = []
    whole = SimpleNamespace(log=lambda step, *rest: heard.append(step), close=heard.append)
    tracker.services[:] = [WeightsAndBiases(Broken()), whole]
    tracker.log(1, 1, {"a": 1})
    tracker.log(2, 2, {"a": 2})
    assert caplog.text.count("switched off") == 1
    assert [r["a"] for r in records(tmp_path)] == [1, 2]
    # the others go on
    assert heard == [1, 2] and tracker.services == [whole]
    tracker.close({})


def test_online_without_a_server_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracker = Tracker(tmp_path, TrackerConfig(WandbConfig("online")), {}, "name")
    tracker.log(1, 1, {"a": 1})
    tracker.close({})
    assert "W&B could not start" in caplog.text and len(records(tmp_path)) == 1


@pytest.mark.slow
def test_an_offline_run_can_be_read_back(tmp_path, monkeypatch):
    """With wandb's own reader: keys, values and the x-axis."""
    import subprocess
    import sys
    from pathlib import Path

    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(
        tmp_path, TrackerConfig(WandbConfig("offline")), {"model": {"num_experts": 8}}, "name"
    )
    assert tracker.wandb_id
    tracker.log(1, 100, {"train/loss": 2.5, "moe/max_load": 1.25})
    tracker.log(2, 200, {"train/loss": 2.0, "moe/max_load": 1.5})
    tracker.close({"val_loss": 2.0})
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    wandb = Path(sys.executable).with_name("wandb")
    out = subprocess.run(
        [str(wandb), "leet", "inspect", "--json", str(run)],
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    assert '"train/loss"' in out.stdout and "2.5" in out.stdout and '"train/tokens"' in out.stdout


def test_alarms_have_a_file_of_their_own_that_a_resume_cuts_off(tmp_path):
    tracker = Tracker(tmp_path, QUIET, {}, "name")
    for step in (3, 9):
        tracker.alarm(
            AlarmEvent(
                step, 10 * step, "a", "raised", 2.0, 1.0, 1, 5, "too much", None, "moe/max_vio"
            )
        )
    assert [e["step"] for e in records(tmp_path, "alarms.jsonl")] == [3, 9]
    assert records(tmp_path, "alarms.jsonl")[0]["expert"] == 5
    tracker.close({})
    Tracker(tmp_path, QUIET, {}, "name", resume_step=5).close({})
    assert [e["step"] for e in records(tmp_path, "alarms.jsonl")] == [3]


def test_heatmaps_and_histograms_reach_tensorboard_every_so_many_records(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(
        tmp_path,
        TrackerConfig(WandbConfig("disabled"), tensorboard=True, media_interval=2),
        {},
        "name",
    )
    for step in range(1, 6):
        tracker.log(step, step, {"train/loss": 1.0 / step})
        tracker.log_routing(
            step,
            step,
            {"counts": [[1, 2, 5], [0, 4, 4]], "k_histogram": [[0, 8], [1, 7]], "reasons": []},
        )
    tracker.close({})
    found = EventAccumulator(
        str(tmp_path / "tensorboard"), size_guidance={"images": 0, "histograms": 0, "scalars": 0}
    )
    found.Reload()
    assert [e.step for e in found.Images("routing/expert_load")] == [1, 3, 5]
    assert [e.step for e in found.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    last = found.Histograms("routing/experts_per_token")[-1].histogram_value
    assert (last.num, last.bucket) == (16, [1, 15])
    assert found.Histograms("routing/expert_load_histogram")[-1].histogram_value.num == 6


def test_the_heatmap_is_white_at_the_mean_and_saturates_at_twice():
    image = load_heatmap(np.array([[0.0, 1.0, 2.0, 9.0]]))
    cell = image.shape[0]
    blue, white, red, beyond = (image[0, cell * i] for i in range(4))
    assert image.shape == (cell, 4 * cell, 3) and white.min() > 240
    assert blue[2] > blue[0] and red[0] > red[2] and (red == beyond).all()


def test_histograms_have_at_most_as_many_bins_as_wandb_takes():
    heights, edges = np.arange(1300), np.arange(1301) - 0.5
    few, limits = Histogram(heights, edges).of_at_most(512)
    assert (
        len(few) <= 512
        and len(limits) == len(few) + 1
        and few.sum() == heights.sum()
        and (np.diff(limits) > 0).all()
    )
