"""train.micro_batch_size=auto is a number before anything starts: the largest that fits by the
plan.
"""

from __future__ import annotations

import dataclasses

import pytest

from launch.config.build import ConfigError
from launch.config.overrides import plain
from launch.config.parse import parse
from launch.job.memory import Machine, planned_memory
from launch.layouts import micro_batch
from launch.layouts.micro_batch import is_asked, with_micro_batch
from tests.composing import composed
from train.files.sizes import GIB


def config_of(*overrides: str):
    found = composed("train.micro_batch_size=auto", *overrides)
    assert is_asked(found)
    return found


def planned(config, size: int, ranks: int = 1) -> int:
    run = parse(
        {**plain(config), "train": {**plain(config)["train"], "micro_batch_size": size}}, ranks
    )
    return planned_memory(run, ranks).total


@pytest.mark.parametrize("fits", [1, 4, 12, 48])
def test_it_is_the_largest_divisor_that_fits(monkeypatch, fits):
    """48 rows: beside powers of two 3, 6, 12, 24 and 48."""
    config = config_of("train.global_batch_size=48")
    room = int(planned(config, fits) / (1 - micro_batch.LEFT_OUT)) + 2
    monkeypatch.setattr(micro_batch, "this_machine", lambda: Machine((), room))
    chosen, found = with_micro_batch(config)
    said = found.said
    assert chosen.train.micro_batch_size == fits and not is_asked(chosen)
    assert found.sizes == tuple(n for n in (48, 24, 16, 12, 8, 6, 4, 3, 2, 1) if n <= fits)
    assert f"train.micro_batch_size=auto is {fits}: by the plan" in said
    assert f"{room / GIB:.1f} GiB (control groups counted)" in said
    assert ("would need" in said) == (fits < 48)
    assert parse(plain(chosen), 1).train.micro_batch_size == fits


def test_ranks_of_a_node_share_its_memory_and_devices_are_each_their_own(monkeypatch):
    many = ("launch=deepspeed", "launch.num_devices=2", "train.global_batch_size=32")
    config = config_of(*many)
    room = int(2 * planned(config, 4, 2) / (1 - micro_batch.LEFT_OUT)) + 4
    monkeypatch.setattr(micro_batch, "this_machine", lambda: Machine((), room))
    assert with_micro_batch(config)[0].train.micro_batch_size == 4

    chosen, found = with_micro_batch(config_of(*many), "H100")
    assert chosen.train.micro_batch_size == 16 and "GiB of H100" in found.said


def test_a_ramp_of_the_batch_is_divided_too():
    """Of 32 rows 32 and 16 fit, but a ramp from 8 by 8 wants 8 at most."""
    config = config_of("train.global_batch_size=32", "train.batch_size_rampup=[8,8,100]")
    assert with_micro_batch(config, "H100")[0].train.micro_batch_size == 8


def test_what_does_not_fit_or_cannot_be_seen_is_refused(monkeypatch):
    monkeypatch.setattr(micro_batch, "this_machine", lambda: Machine((), 2**20))
    with pytest.raises(ConfigError, match=r"not even one row fits"):
        with_micro_batch(config_of())
    with pytest.raises(ConfigError, match=r"the ranks run on others"):
        with_micro_batch(config_of("launch=slurm"))
    several = ("launch.num_nodes=2", "launch.node_rank=0", "launch.master_addr=127.0.0.1")
    several = ("launch=torchrun", *several, "launch.master_port=29500")
    with pytest.raises(ConfigError, match=r"the ranks run on others"):
        with_micro_batch(config_of(*several))
    with pytest.raises(ConfigError, match=r"train\.num_steps is 0"):
        with_micro_batch(config_of("train.num_steps=0"))
    with pytest.raises(ConfigError, match=r"here give a number"):
        parse(plain(config_of()), 1)


def test_a_device_leaves_room(monkeypatch):
    found = micro_batch.device_of("H100")
    assert found is not None
    exact = dataclasses.replace(found, memory=planned(config_of(), 8))
    monkeypatch.setattr(micro_batch, "device_of", lambda name: exact)
    assert with_micro_batch(config_of(), "H100")[0].train.micro_batch_size < 8


def test_a_device_of_another_name_is_none():
    from ops.device import memory_gib

    assert memory_gib("NVIDIA H100 80GB HBM3") == 80 and memory_gib("NVIDIA GH200") == 141
    assert memory_gib("H1000") is None and memory_gib("A1000") is None
