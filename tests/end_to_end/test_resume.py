"""Resuming changes nothing: bit for bit on the same layout, to fp32 rounding on another."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commandline import TINY, launch, losses, ranks, write_text

pytestmark = [pytest.mark.slow]
# A large eps keeps Adam from blowing rounding up into sign flips, so that other layouts can be compared tightly.
SMOOTH = ("optim.eps=0.1", "optim.lr=0.05", "balance.bias_update_rate=0.01")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An uninterrupted run of 20 steps and one that stopped after 10, both with two expert-parallel ranks."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*TINY, *SMOOTH, *write_text(folder), *ranks(2, 2)]
    launch("train", *common, f"run_dir={folder / 'full'}")
    launch("train", *common, f"run_dir={folder / 'half'}", "train.stop_after_step=10")
    return folder


def resume(runs: Path, name: str, *overrides: str) -> dict[int, float]:
    shutil.copytree(runs / "half", runs / name)
    launch("train", f"resume={runs / name}", "train.stop_after_step=null", *overrides)
    return losses(runs / name)


def test_same_layout_resumes_bit_for_bit(runs):
    assert len(losses(runs / "half")) == 10
    assert resume(runs, "same") == losses(runs / "full")


@pytest.mark.parametrize(("world", "expert", "zero"), [(1, 1, 1), (4, 4, 3), (2, 1, 2), (4, 2, 0)])
def test_other_layout_resumes_to_rounding(runs, world, expert, zero):
    full = losses(runs / "full")
    resumed = resume(runs, f"{world}-{expert}-{zero}", *ranks(world, expert), f"deepspeed=zero{zero}")
    assert resumed.keys() == full.keys()
    assert max(abs(resumed[step] - full[step]) / full[step] for step in full) < 1e-5


def test_four_ranks_resume_on_two_and_then_one(runs):
    full = losses(runs / "full")
    folder = runs / "chain"
    shutil.copytree(runs / "half", folder)
    for world, expert, stop in ((4, 2, 13), (2, 2, 16), (1, 1, "null")):
        launch("train", f"resume={folder}", f"train.stop_after_step={stop}", *ranks(world, expert))
    resumed = losses(folder)
    assert resumed.keys() == full.keys()
    assert max(abs(resumed[step] - full[step]) / full[step] for step in full) < 1e-5
