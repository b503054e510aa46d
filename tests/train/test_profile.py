"""profile.steps: the time of these steps by phase adds up, and looking changes nothing."""

from __future__ import annotations

import json
import time

import pytest
import torch

from train.agenda import Step
from train.config.watching import ProfileConfig
from train.timing.profile import INSIDE, Profiler

CPU = torch.device("cpu")


def step(number: int) -> Step:
    fields = dict.fromkeys(Step.__annotations__, False)
    return Step(**{**fields, "number": number})


def work(profiler: Profiler, number: int, seconds: dict[str, float]) -> None:
    """A step whose phases take so long."""
    with profiler.phase(step(number), "whole"):
        for name in INSIDE:
            with profiler.phase(step(number), name):
                time.sleep(seconds.get(name, 0.0))
                torch.ones(64, 64) @ torch.ones(64, 64)
        time.sleep(seconds.get("other", 0.0))
    with profiler.phase(step(number), "pause"):
        pass


def test_the_phases_of_the_chosen_steps_add_up(tmp_path, caplog):
    profiler = Profiler(ProfileConfig((2, 3)), tmp_path, CPU, 0, prints=True)
    slow = {"forward": 0.02, "backward": 0.04, "other": 0.03}
    with caplog.at_level("INFO", "loadstone"):
        for number, seconds in ((1, {"data": 0.5}), (2, slow), (3, slow), (4, {"data": 0.5})):
            work(profiler, number, seconds)
        profiler.close()
    facts = json.loads((tmp_path / "profile/rank-00000-phases.json").read_text())
    phases = facts["phases"]
    assert facts["steps"] == [2, 3] and sum(phases.values()) == pytest.approx(
        facts["seconds_a_step"], rel=1e-6
    )
    # what slept took at least as long; the steps around are no part of it
    assert phases["forward"] >= 0.02 and phases["backward"] >= 0.04 and phases["other"] >= 0.03
    assert phases["data"] < 0.5
    assert any(
        one["name"] == "aten::mm" and one["calls"] == 2 * len(INSIDE) for one in facts["operations"]
    )

    trace = json.loads((tmp_path / "profile/rank-00000.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("phase/whole") >= 2 and "aten::mm" in names
    table = caplog.text
    assert "steps 2 to 3, rank 0" in table and "backward" in table and "ui.perfetto.dev" in table


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path):
    profiler = Profiler(ProfileConfig((1, 9)), tmp_path, CPU, 0, prints=False)
    work(profiler, 1, {})
    profiler.close()
    facts = json.loads((tmp_path / "profile/rank-00000-phases.json").read_text())
    assert facts["steps"] == [1, 1]


def test_other_ranks_leave_a_trace_where_they_are_asked(tmp_path):
    for all_ranks in (False, True):
        profiler = Profiler(ProfileConfig((1, 1), all_ranks), tmp_path, CPU, 1, prints=False)
        work(profiler, 1, {})
        profiler.close()
        assert (tmp_path / "profile/rank-00001.json").exists() == all_ranks


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ProfileConfig((3,)), "give [first, last], as in [10,12]"),
        (ProfileConfig((5, 4)), "the last not before it"),
        (ProfileConfig((0, 4)), "the first must be at least 1"),
        (ProfileConfig((), True), "profile.steps names no step"),
    ],
)
def test_steps_that_are_none_are_refused(config, words):
    assert any(words in problem for problem in config.problems())
    assert ProfileConfig().problems() == ProfileConfig((10, 12)).problems() == []
