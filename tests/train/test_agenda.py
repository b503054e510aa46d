"""What follows a step, by its number and the settings alone."""

from __future__ import annotations

import pytest

from train.agenda import Step, agenda, last_step_of
from train.config.training import CheckpointConfig, TrainConfig


def settings(**changes) -> TrainConfig:
    return TrainConfig(
        **{"num_steps": 25, "seq_len": 8, "micro_batch_size": 1} | changes, global_batch_size=1
    )


def due(name: str, run: TrainConfig, save_interval: int = 0) -> list[int]:
    checkpoint = CheckpointConfig(save_interval=save_interval)
    return [n for n in range(1, 26) if getattr(agenda(n, run, checkpoint), name)]


def test_every_logged_step_is_measured_whether_or_not_it_is_on_the_interval():
    assert due("logs", settings(log_interval=10)) == [10, 20, 25]
    assert due("logs", settings(log_interval=10, stop_after_step=13))[:2] == [10, 13]


def test_what_happens_at_the_end_of_a_run_is_on_no_agenda():
    run = settings(eval_interval=5)
    assert due("evaluates", run) == [5, 10, 15, 20] and due("saves", run, 5) == [5, 10, 15, 20]
    assert due("last", run) == [25]


def test_an_interval_of_zero_is_never():
    run = settings(eval_interval=0, log_interval=100)
    assert due("evaluates", run) == [] and due("saves", run) == [] and due("logs", run) == [25]


@pytest.mark.parametrize(("stop", "last"), [(None, 25), (7, 7), (25, 25), (90, 25)])
def test_a_run_ends_where_it_is_told_to_or_with_its_schedule(stop, last):
    run = settings(stop_after_step=stop, log_interval=100, eval_interval=7)
    assert last_step_of(run) == last
    assert agenda(last, run, CheckpointConfig(save_interval=7)) == Step(last, logs=True, last=True)
    assert not agenda(last - 1, run, CheckpointConfig()).last
