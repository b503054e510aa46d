"""How long a run is, in tokens, passes over the data, and shares of it, becomes steps."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from launch.config.build import ConfigError
from launch.config.length import count, steps_for, with_length
from train.config.training import OptimConfig, TrainConfig
from train.engine.schedule import Schedule

TRAIN = {"num_steps": 300, "seq_len": 10, "micro_batch_size": 1, "global_batch_size": 4}


def made(*overrides: str, rows: int | None = None, **train):
    optim = {"lr": 1.0, "warmup_steps": 20, "warmup_fraction": None}
    lengths = {"num_tokens": None, "num_epochs": None}
    config = OmegaConf.create({"train": {**TRAIN, **lengths, **train}, "optim": optim})
    for override in overrides:
        key, _, value = override.partition("=")
        OmegaConf.update(config, key, OmegaConf.create(f"x: {value}").x)
    return with_length(config, overrides, rows)


@pytest.mark.parametrize(
    ("typed", "number"),
    [
        ("10B", 10**10), ("1.5T", 1_500_000_000_000), ("300m", 3 * 10**8), ("20k", 20_000),
        ("2e9", 2 * 10**9), (1e9, 10**9), ("1_000", 1000), (7, 7),
        (1.5, 1.5), ("ten", "ten"), (None, None),
    ],
)  # fmt: skip
def test_counts_are_read_as_people_write_them(typed, number):
    assert count(typed) == number and type(count(typed)) is type(number)


def test_tokens_are_the_steps_that_they_take():
    assert made("train.num_tokens=4000").train.num_steps == 100
    # the last step is whole
    assert made("train.num_tokens=4001").train.num_steps == 101
    assert made("train.num_tokens=4k").train.num_tokens == 4000
    # of an experiment's as well
    assert made(num_tokens=400).train.num_steps == 10


def test_what_is_typed_beats_what_a_preset_says():
    config = made("train.num_steps=7", num_tokens=4000)
    assert (config.train.num_steps, config.train.num_tokens) == (7, None)
    config = made("train.num_tokens=400", num_epochs=3.0)
    assert (config.train.num_steps, config.train.num_epochs) == (10, None)
    assert made("train.global_batch_size=8", num_tokens=4000).train.num_steps == 50


def test_saying_it_twice_is_refused():
    with pytest.raises(ConfigError, match=r"train.num_steps=7 and train.num_tokens=80 say"):
        made("train.num_steps=7", "train.num_tokens=80")
    with pytest.raises(ConfigError, match=r"optim.warmup_steps=2 and optim.warmup_fraction=0.1"):
        made("optim.warmup_steps=2", "optim.warmup_fraction=0.1")


def test_epochs_are_the_rows_that_the_data_have():
    assert made("train.num_epochs=2.5", rows=101).train.num_steps == 26
    assert made("train.num_epochs=2.5").train.num_steps == 300  # not prepared: not known


def test_the_warm_up_is_a_share_of_the_steps():
    config = made("train.num_tokens=4000", "optim.warmup_fraction=0.05")
    assert config.optim.warmup_steps == 5
    assert made("optim.warmup_fraction=0").optim.warmup_steps == 0


@pytest.mark.parametrize("rampup", [(4, 4, 100), (8, 2, 37), (4, 12, 10_000), (2, 2, 1)])
def test_a_growing_batch_is_counted_as_the_schedule_does(rampup):
    train = TrainConfig(5, 10, 1, 16, batch_size_rampup=rampup)
    schedule = Schedule([{"lr": 1.0, "weight_decay": 0.0}], OptimConfig(1.0), train, 2)
    for rows in (1, 3, 99, 100, 101, 500, 2003):
        steps = steps_for(rows, 16, list(rampup))
        assert schedule.num_samples(steps) >= rows > schedule.num_samples(steps - 1)
    assert steps_for(17, 16) == 2


def test_a_batch_that_grows_over_tokens_grows_over_their_rows():
    ramp = {"batch_size_rampup": [4, 4], "global_batch_size": 16}
    config = made("train.batch_size_rampup_tokens=1K", **ramp)
    length = config.train.seq_len
    assert list(config.train.batch_size_rampup) == [4, 4, -(-1000 // length)]
    assert config.train.batch_size_rampup_tokens == 1000

    # What was saved has both; the command line decides which of them is meant.
    saved = {"batch_size_rampup_tokens": 1000, "global_batch_size": 16}
    again = made("train.batch_size_rampup_tokens=2000", **ramp)
    assert list(again.train.batch_size_rampup) == [4, 4, -(-2000 // length)]
    other = made("train.batch_size_rampup=[4,4,77]", **saved)
    assert list(other.train.batch_size_rampup) == [4, 4, 77]
    assert other.train.batch_size_rampup_tokens is None
    with pytest.raises(ConfigError, match=r"says over how many samples.*drop them"):
        made("train.batch_size_rampup=[4,4,77]", "train.batch_size_rampup_tokens=9")
    alone = TrainConfig(1, 1, 1, 1, batch_size_rampup_tokens=5)
    assert "but no batch grows" in alone.problems()[0]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (TrainConfig(1, 1, 1, 1, num_tokens=0), "train.num_tokens is 0; it must be positive"),
        (TrainConfig(1, 1, 1, 1, num_epochs=-1.0), "train.num_epochs is -1.0"),
        (OptimConfig(1.0, warmup_fraction=1.0), "optim.warmup_fraction is 1.0"),
    ],
)
def test_what_is_no_length_is_refused(record, words):
    assert any(words in problem for problem in record.problems())


@pytest.mark.parametrize(
    "train", [{"global_batch_size": "x"}, {"seq_len": None}, {"num_tokens": "x"}]
)
def test_what_is_no_number_is_left_to_its_record(train):
    assert made(**{"num_tokens": 80, **train}).train.num_steps == 300
