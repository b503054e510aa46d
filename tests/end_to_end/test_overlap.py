"""Runs whose passes are made by turns: what they log and audit is to the last bit what they do with
one pass after the other.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commandline import TINY, checksums, measured, train_on, write_text

SETTINGS = (
    *TINY,
    "parallel=ep2",
    "balance.aux_loss_scope=global_batch",
    "train.micro_batch_size=1",
    "train.num_steps=4",
    "train.eval_interval=2",
    "tracker.metrics=detailed",
    "audit.sample_one_in=4",
)
CONTROLLED = ("router=top_p", "router.budget=2", "balance.bias_update=quantile")
BY_TURNS = "parallel.overlap_experts=true"
BY_THE_CLOCK = ("perf/", "time/", "comm/exposed")


def check_equal(one: Path, other: Path) -> None:
    found, expected = measured(one), measured(other)
    assert set(found) == set(expected)
    for step, values in expected.items():
        assert set(found[step]) == set(values)
        for name, value in values.items():
            if not name.startswith(BY_THE_CLOCK):
                assert found[step][name] == value, (step, name)
    assert checksums(one) == checksums(other)


@pytest.mark.slow
def test_passes_by_turns_change_no_bit(tmp_path):
    data = write_text(tmp_path)
    train_on(2, *SETTINGS, *CONTROLLED, *data, f"run_dir={tmp_path / 'in_turn'}")
    train_on(2, *SETTINGS, *CONTROLLED, BY_TURNS, *data, f"run_dir={tmp_path / 'by_turns'}")
    check_equal(tmp_path / "by_turns", tmp_path / "in_turn")


@pytest.mark.nightly
@pytest.mark.parametrize(
    "more",
    [
        (*CONTROLLED, "model.recompute=block", "deepspeed=zero2", "dispatcher.num_chunks=2"),
        (*CONTROLLED, "optim=muon", "model.num_mtp_layers=1", "train.mtp_coeff=0.3"),
        ("objective=self_distil", "objective.top_k=[1]"),
        ("train.precision=bf16", "train.master_dtype=bf16"),
    ],
)
def test_neither_do_they_with_other_parts(tmp_path, more):
    data = write_text(tmp_path)
    train_on(2, *SETTINGS, *more, *data, f"run_dir={tmp_path / 'in_turn'}")
    train_on(2, *SETTINGS, *more, BY_TURNS, *data, f"run_dir={tmp_path / 'by_turns'}")
    check_equal(tmp_path / "by_turns", tmp_path / "in_turn")
