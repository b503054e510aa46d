"""A placement made from a run's own measurements moves and lends experts, and the loss does not
notice.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commandline import full_and_half, last_json, launch, losses, ranks, train_on

from model.placement.record import Placement

pytestmark = [pytest.mark.slow]
SMOOTH = ("optim.eps=0.1", "optim.lr=0.05", "model.num_experts=8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two ranks for 20 steps, and stopped after 10."""
    folder = tmp_path_factory.mktemp("runs")
    full_and_half(folder, *SMOOTH)
    return folder


@functools.cache
def held_out(run: Path) -> float:
    return last_json(launch("evaluate", f"run={run}", "checkpoint=latest"))["val_loss"]


@pytest.mark.parametrize(
    ("lent", "more"), [(0, ()), (1, ("dispatcher.num_chunks=2",)), (2, ("deepspeed=zero3",))]
)
def test_a_run_resumes_with_a_placement_and_keeps_its_loss(runs, lent, more):
    folder = runs / f"placed-{lent}"
    shutil.copytree(runs / "half", folder)
    planned = last_json(launch("place", f"run={folder}", f"replicas_per_rank={lent}"))
    placement = Placement.load(Path(planned["output"]))
    moved = any(layer.experts != tuple(range(8)) for layer in placement.layers)
    assert moved and all(len(r) == lent for layer in placement.layers for r in layer.replicas)
    train_on(2, f"resume={folder}", f"parallel.placement={planned['output']}", *more)
    full, resumed = losses(runs / "full"), losses(folder)
    assert resumed.keys() == full.keys()
    assert max(abs(resumed[step] - full[step]) / full[step] for step in full) < 1e-5
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(r["moe/dropped"] == 0 for r in records if "moe/dropped" in r)
    assert records[-1]["step"] == 20 and any(r.get("comm/bytes", 0) > 0 for r in records)
    # The checkpoint knows experts by their global ids: without the placement, and on one rank, it
    # is the same model.
    assert held_out(folder) == pytest.approx(held_out(runs / "full"), rel=1e-5)


def test_a_placement_for_other_sizes_is_refused(runs):
    path = runs / "other.json"
    planned = last_json(
        launch("place", f"run={runs / 'half'}", "expert_parallel_size=4", f"output={path}")
    )
    assert planned["expert_parallel_size"] == 4
    result = launch(
        "train", f"resume={runs / 'half'}", f"parallel.placement={path}", *ranks(2, 2), check=False
    )
    assert (
        result.returncode == 2
        and "parallel.expert_parallel_size" in result.stderr
        and "Traceback" not in result.stderr
    )
