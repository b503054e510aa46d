"""train.micro_batch_size=auto is tried before the run begins: what a trial is, and what follows of
its end. The trials of tests/end_to_end/test_micro_batch.py really run.
"""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.command.messages import failure_of
from launch.config.build import ConfigError
from launch.config.overrides import plain
from launch.config.parse import parse, world_size
from launch.job.judge import Judge
from launch.layouts import trial
from launch.layouts.trial import Trial, described, largest_that_runs, settings_of_trial
from tests.composing import composed
from train.config.launching import WatchdogConfig

LACKS = Trial(1, "out_of_memory", ("RuntimeError: can't allocate memory",))
FITS = Trial(0, None, ())


def config_of(*overrides: str):
    return composed("train.micro_batch_size=8", *overrides)


def chosen_of(config, sizes, ends, say=lambda line: None):
    """What is chosen where trials end as `ends` says, and the folders that they had."""
    folders: list[Path] = []

    def attempt(config, size, folder):
        assert folder.is_dir() and not any(other.exists() for other in folders)
        folders.append(folder)
        return ends[size]

    config = largest_that_runs(config, sizes, attempt, say)
    return config, folders


def test_the_first_size_that_does_not_run_out_of_memory_is_chosen_and_said():
    said: list[str] = []
    ends = {32: LACKS, 16: LACKS, 8: FITS}
    config, folders = chosen_of(config_of(), (32, 16, 8, 4), ends, said.append)
    assert config.train.micro_batch_size == 8 and len(folders) == 3
    assert not any(folder.exists() for folder in folders)
    assert [line.split(":")[0] for line in said] == ["train.micro_batch_size=auto"] * 3
    assert "32 runs out of memory (RuntimeError: can't allocate memory)" in said[0]
    assert "8 it is" in said[2]


def test_where_nothing_fits_or_a_trial_fails_otherwise_nothing_begins(capsys):
    with pytest.raises(ConfigError, match=r"2, 1 ran out of memory.*use more ranks"):
        chosen_of(config_of(), (2, 1), {2: LACKS, 1: LACKS})
    other = Trial(65, "non_finite", ("error: the loss is NaN",))
    with pytest.raises(SystemExit) as ended:
        chosen_of(config_of(), (2, 1), {2: other, 1: FITS})
    told = capsys.readouterr().err
    assert ended.value.code == 65 and "code 65 (non_finite)" in told
    assert "the loss is NaN" in told
    # A signal is none of our exit codes.
    with pytest.raises(SystemExit) as ended:
        chosen_of(config_of(), (2, 1), {2: Trial(-11, None, ()), 1: FITS})
    assert ended.value.code == 70


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.num_epochs=2", "train.batch_size_rampup=[8,8,100]", "data=chat"),
        ("router=threshold", "balance=none", "optim.warmup_steps=20", "checkpoint.save_interval=1"),
        ("launch=deepspeed", "launch.num_devices=2", "deepspeed=zero3", "launch.max_restarts=3"),
        ("launch=torchrun", "launch.num_devices=4", "parallel.pipeline_parallel_size=4"),
    ],
    ids=["default", "chat", "adaptive", "zero3", "stages"],
)
def test_a_trial_is_the_run_but_for_its_length_its_rows_and_what_it_keeps(tmp_path, overrides):
    if "data=chat" in overrides:
        overrides += ("data.sources.0.path=json", "data.sources.0.data_files=/chats.jsonl")
    config = config_of("train.global_batch_size=64", *overrides)
    settings = settings_of_trial(config, 4, tmp_path)
    ranks = world_size(config)
    run = parse(plain(config), ranks)
    found = parse(plain(settings), world_size(settings))
    assert world_size(settings) == ranks
    for part in ("model", "router", "attention", "optim", "parallel", "deepspeed", "experts"):
        assert getattr(found, part) == getattr(run, part), part
    assert found.launch == dataclasses.replace(run.launch, max_restarts=0)
    assert found.train.micro_batch_size == 4 and found.train.seq_len == run.train.seq_len
    rows = run.parallel.rows_size(ranks)
    stages = run.parallel.pipeline_parallel_size
    assert found.gradient_accumulation_steps(rows) == max(2, stages)
    assert found.train.stop_after_step == 2 and not found.train.eval_interval
    assert found.checkpoint.save_interval == 0 and not found.alarms
    assert found.tracker.wandb.mode == "disabled" and found.resume is None
    assert config.train.micro_batch_size == 8  # the run's own settings are left alone

    trial._write_rows(tmp_path, found)
    drawn = np.load(tmp_path / "rows.npy", allow_pickle=False)
    assert found.data.sources[0].named_files == (str(tmp_path / "rows.npy"),)
    # No document ends within them: all are longer than a row.
    assert drawn.shape[1] > found.train.seq_len
    assert drawn.min() >= 0 and drawn.max() < found.data.tokenizer.end_of_document_id


def test_a_student_is_tried_on_its_own_rows(tmp_path):
    config = config_of("objective=distil", "objective.cache=/words")
    assert plain(settings_of_trial(config, 4, tmp_path))["data"] == plain(config)["data"]


def test_a_run_that_goes_on_is_tried_without_what_it_began_with(tmp_path):
    config = config_of("init.run=/gone", "resume=/run")
    assert plain(settings_of_trial(config, 4, tmp_path))["init"] == {}


def test_the_plan_says_what_will_be_tried():
    run = parse(plain(config_of()), 1)
    line = described(run, (8, 4, 2, 1))
    assert "tries 8 first, then 4, 2, 1 where it runs out of memory: 2 steps of rows of 256" in line
    assert "then" not in described(run, (1,))


OUT_OF_MEMORY = {
    "a device": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "the CPU's allocator": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "numpy and Python": MemoryError(),
    "C++": RuntimeError("std::bad_alloc"),
    "the system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "the driver": RuntimeError("CUDA error: out of memory"),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_a_failed_allocation_is_known_whoever_says_it(error):
    assert failure_of(error) == "out_of_memory"


def test_other_failures_are_none_of_memory():
    assert failure_of(RuntimeError("gloo: Connection closed by peer")) == "communication"
    assert failure_of(RuntimeError("a shape is wrong")) == "failed"


@pytest.mark.parametrize("by_the_kernel", [True, False])
def test_a_rank_that_the_kernel_ended_for_memory_ran_out_of_memory(by_the_kernel):
    judge = Judge(1, WatchdogConfig(), 0.0)
    judge.report(0, "host", 1.0, {"exit_code": -9, "out_of_memory": by_the_kernel})
    judge.verdict(1.0)
    verdict = judge.verdict(100.0)
    assert verdict is not None
    assert verdict.kind == ("out_of_memory" if by_the_kernel else "killed")
    assert ("the kernel ran out of memory" in verdict.message) == by_the_kernel
