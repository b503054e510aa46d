"""train.micro_batch_size=auto, tried: a size whose allocations really fail is left for the next,
and the run is the one that this number by hand makes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parent))
from commandline import ROOT, TINY, launch, losses, write_text

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
# Of a row of 512 tokens logits over 8,192 are 16 MiB, and their gradient as much again: four rows
# do not fit 100 MiB, and one does.
WIDE = (
    "model.vocab_size=8192",
    "model.max_seq_len=512",
    "train.seq_len=512",
    "train.num_steps=3",
    "train.global_batch_size=4",
    "train.eval_max_sequences=2",
)
SPARE_MIB = "100"
PATIENCE = 1800
"""Seconds, on a machine that others use: each trial is a start of Python for every rank."""


@pytest.mark.parametrize(
    ("layout", "rank", "sizes"),
    [
        pytest.param((), -1, (4, 2, 1), id="inline"),
        pytest.param(
            ("launch=torchrun", "launch.num_devices=2", "deepspeed=zero2"), 1, (4, 2, 1), id="ranks"
        ),
    ],
)
def test_what_runs_out_of_memory_is_left_for_the_next_smaller_size(tmp_path, layout, rank, sizes):
    common = (*TINY, *WIDE, *write_text(tmp_path), *layout)
    if layout:
        common += ("train.global_batch_size=8",)
    faults = tmp_path / "faults"
    faults.mkdir()
    # Once: the memory of the second trial and of the run is the machine's.
    env = {
        "PYTHONPATH": str(ROOT / "tests" / "faults" / "site"),
        "LOADSTONE_FAULT": f"scarce@{rank}:1:forward",
        "LOADSTONE_FAULT_DIR": str(faults),
        "LOADSTONE_SPARE_MIB": SPARE_MIB,
    }
    run = tmp_path / "run"
    auto = (*common, "train.micro_batch_size=auto", f"run_dir={run}")
    begun = launch("train", *auto, env=env, timeout=PATIENCE)
    assert len(list(faults.iterdir())) == 1
    assert f"train.micro_batch_size=auto is {sizes[0]}: by the plan" in begun.stdout
    assert f"train.micro_batch_size=auto: {sizes[0]} runs out of memory" in begun.stdout
    assert f"{sizes[1]} it is" in begun.stdout
    assert OmegaConf.load(run / "config.yaml").train.micro_batch_size == sizes[1]
    assert not list((run / "checkpoints").glob("step-00000002"))

    # A number from here on: the run is that of the number, and goes on with it.
    by_hand = (f"train.micro_batch_size={sizes[1]}", f"run_dir={tmp_path / 'by_hand'}")
    launch("train", *common, *by_hand, timeout=PATIENCE)
    assert losses(run) == losses(tmp_path / "by_hand") and len(losses(run)) == 3
    on = launch("train", f"resume={run}", "train.num_steps=4", timeout=PATIENCE)
    assert "auto" not in on.stdout and 4 in losses(run)
