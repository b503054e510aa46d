"""Resuming changes nothing: bit for bit on the same layout, to fp32 rounding on another."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.pairwise import some_daily

sys.path.insert(0, str(Path(__file__).parent))
from commandline import TINY, full_and_half, launch, losses, ranks, train_on

pytestmark = [pytest.mark.slow]
# A large eps keeps Adam from blowing rounding up into sign flips, so that other layouts can be
# compared tightly.
SMOOTH = (
    "optim.eps=0.1",
    "optim.lr=0.05",
    "balance.bias_update=sign",
    "balance.bias_update_rate=0.01",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An uninterrupted run of 20 steps and one that stopped after 10, both with two expert-parallel
    ranks.
    """
    folder = tmp_path_factory.mktemp("runs")
    full_and_half(folder, *SMOOTH)
    return folder


def resume(runs: Path, name: str, number: int, *overrides: str) -> dict[int, float]:
    """Losses of a copy of runs/half that went on, on so many ranks."""
    shutil.copytree(runs / "half", runs / name)
    train_on(number, f"resume={runs / name}", *overrides)
    return losses(runs / name)


def test_same_layout_resumes_bit_for_bit(runs):
    """Under a supervisor, though the run began without one."""
    assert len(losses(runs / "half")) == 10
    shutil.copytree(runs / "half", runs / "same")
    launch("train", f"resume={runs / 'same'}", *ranks(2, 2))
    assert losses(runs / "same") == losses(runs / "full")


@pytest.mark.parametrize(
    ("world", "expert", "zero"), some_daily([(4, 4, 3), (1, 1, 1), (2, 1, 2), (2, 2, 0)])
)
def test_other_layout_resumes_to_rounding(runs, world, expert, zero):
    full = losses(runs / "full")
    resumed = resume(
        runs,
        f"{world}-{expert}-{zero}",
        world,
        f"parallel.expert_parallel_size={expert}",
        f"deepspeed=zero{zero}",
    )
    assert resumed.keys() == full.keys()
    assert max(abs(resumed[step] - full[step]) / full[step] for step in full) < 1e-5


def test_resuming_refuses_what_would_change_tensors_or_data(runs):
    for override in (
        "seed=1",
        "train.seq_len=16",
        "model.hidden_size=32",
        "data.validation_fraction=0.2",
        "model=quickstart",
    ):
        result = launch("train", f"resume={runs / 'half'}", *ranks(2, 2), override, check=False)
        assert result.returncode == 2
        assert "cannot change" in result.stderr or "keeps the model" in result.stderr
        assert "Traceback" not in result.stderr


def test_a_used_run_directory_is_refused_without_resume(runs):
    result = launch("train", *TINY, f"run_dir={runs / 'half'}", check=False)
    assert result.returncode == 2 and f"resume={runs / 'half'}" in result.stderr


def test_changed_data_files_are_refused_and_touched_ones_are_not(runs):
    text = runs / "text.txt"
    original = text.read_text()
    text.write_text(original)  # another time, the same tokens
    assert resume(runs, "touched", 2, "train.stop_after_step=11") == {
        step: loss for step, loss in losses(runs / "full").items() if step <= 11
    }
    text.write_text(original.replace("fox", "cat"))
    result = launch("train", f"resume={runs / 'touched'}", *ranks(1, 1), check=False)
    text.write_text(original)
    assert result.returncode == 2 and "data files have changed" in result.stderr


def test_four_ranks_resume_on_two_and_then_one(runs):
    full = losses(runs / "full")
    folder = runs / "chain"
    shutil.copytree(runs / "half", folder)
    for world, expert, stop in ((4, 2, 13), (2, 2, 16), (1, 1, "null")):
        train_on(
            world,
            f"resume={folder}",
            f"train.stop_after_step={stop}",
            f"parallel.expert_parallel_size={expert}",
        )
    resumed = losses(folder)
    assert resumed.keys() == full.keys()
    assert max(abs(resumed[step] - full[step]) / full[step] for step in full) < 1e-5
