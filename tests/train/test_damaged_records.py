"""What a run writes down about itself may be damaged when it goes on: whole lines are kept, nothing
ends the run.
"""

from __future__ import annotations

import pytest

from launch.job.worker import began_nothing, stopped_before_training
from launch.runs.curves import records
from launch.runs.lines import spread_records
from launch.saved.files import read_result
from launch.saved.resume import _has_ended
from train.config.watching import TrackerConfig, WandbConfig
from train.files.log_file import LogFile
from train.sinks.tracker import Tracker

BAD = [
    b"\xff\xfe\x00",
    b"[1, 2]",
    b'{"a": 1}',
    b'{"step": "3"}',
    b'{"step": null}',
    b"null",
    b"7",
    b"[" * 100_000,
    b'{"step": 1',
    b"\x00\x00",
    b'"\\ud800"',
    b'{"step": {}}',
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad[:12]))
def test_a_damaged_line_costs_no_other(tmp_path, bad):
    good = [b'{"step": 1}', b'{"step": 2}', b'{"step": 9}']
    text = b"\n".join([good[0], bad, *good[1:]]) + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(text)
    (tmp_path / "steps.jsonl").write_bytes(text)
    Tracker(tmp_path, TrackerConfig(wandb=WandbConfig(mode="disabled")), {}, "name", resume_step=2)
    LogFile(tmp_path / "steps.jsonl", resume_step=2)
    for name in ("metrics.jsonl", "steps.jsonl"):
        assert list(records(tmp_path / name)) == [{"step": 1}, {"step": 2}]
        assert spread_records(tmp_path / name, 10) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "bad",
    [*BAD[:2], b"", b"null", b"7", b"[" * 100_000, b'{"stopped": tru'],
    ids=lambda bad: repr(bad[:12]),
)
def test_a_damaged_result_is_none(tmp_path, bad):
    """Found by damaged run directories: an empty result.json ended resume=RUN with a traceback."""
    (tmp_path / "result.json").write_bytes(bad)
    assert read_result(tmp_path) is None
    assert not began_nothing(tmp_path) and not _has_ended(tmp_path, 3)
    assert stopped_before_training(tmp_path)["stopped"] is True
    assert began_nothing(tmp_path) and read_result(tmp_path)["step"] == 0
