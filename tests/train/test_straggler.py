"""A rank is called slow when it is so three times in a row, and only then."""

from __future__ import annotations

import torch

from train.timing.stragglers import StragglerWatch


def test_a_rank_slow_three_times_in_a_row_is_a_straggler():
    watch = StragglerWatch(1.5, torch.device("cpu"))
    assert watch.judge([1.0, 1.0, 2.0, 1.1]) == (2.0, None)
    assert watch.judge([1.0, 1.0, 1.6, 1.0]) == (1.6, None)
    assert watch.judge([1.0, 1.0, 1.6, 1.0]) == (1.6, 2)


def test_ranks_of_a_stage_are_compared_with_each_other_alone():
    watch = StragglerWatch(1.5, torch.device("cpu"), stage_size=3)
    for _ in range(5):
        skew, straggler = watch.judge([1.0, 1.1, 1.0, 4.0, 4.0, 4.2])
        assert skew < 1.2 and straggler is None
    found = [watch.judge([1.0, 1.0, 2.0, 4.0, 4.0, 4.4]) for _ in range(3)]
    assert found[-1] == (2.0, 2)


def test_one_slow_step_or_another_rank_is_no_straggler():
    watch = StragglerWatch(1.5, torch.device("cpu"))
    assert watch.judge([1.0, 3.0])[1] is None
    assert watch.judge([3.0, 1.0])[1] is None
    assert watch.judge([1.0, 1.2])[1] is None
    assert watch.judge([3.0, 1.0])[1] is None
    for _ in range(5):
        # noise of steps that take no time
        assert watch.judge([0.003, 0.001])[1] is None


def test_waiting_is_not_own_work():
    watch = StragglerWatch(1.5, torch.device("cpu"))
    with watch.own_work(True):
        pass
    with watch.own_work(False):
        watch.seconds += 0
    watch.seconds += 5.0
    watch.waited(4.0)
    assert 1.0 <= watch.seconds < 1.5
