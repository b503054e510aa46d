"""Another budget for a trained model: every router that has one finds it on text, in this
process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
from common import batch, build, take, tiny_config

from model.config import BalanceConfig, BudgetConfig
from model.request import TokenBatch
from model.routers.config import NullExpertsConfig, ReLUConfig, ThresholdConfig, TopPConfig
from train.trained.calibrate import TOLERANCE, calibrate_budget


class Rows:
    """Stands for train.data.loader.Batch: 12 packed rows."""

    def __init__(self, step: int):
        self.step = step

    def inputs(self, device: torch.device) -> TokenBatch:
        return take(batch(self.step, 0, 12), 0, 12)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ThresholdConfig, {}),
        (TopPConfig, {}),
        (ReLUConfig, {}),
        (NullExpertsConfig, dict(num_null_experts=8, top_k=4)),
    ],
)
@pytest.mark.parametrize("budget", [1.3, 3.0])
def test_a_router_finds_another_budget(kind, options, budget):
    model = build(tiny_config(), BalanceConfig(), router=kind, budget=2.0, **options)
    before = [parameter.clone() for parameter in model.parameters()]
    batches = (Rows(step) for step in range(48))
    mean = calibrate_budget(
        model, batches, budget, BalanceConfig(), BudgetConfig(), torch.device("cpu")
    )
    assert mean == pytest.approx(budget, rel=TOLERANCE)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
