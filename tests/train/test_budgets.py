"""Tables of budgets: what a switch restores, that it allocates nothing, what a file may hold, and
how sure a loss is.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
from common import batch, build, take, tiny_config

from infer.budget import capture, use
from infer.config import EngineConfig, SamplingConfig
from infer.engine import Engine
from infer.request import Request
from model.config import BalanceConfig, BudgetConfig
from model.request import ForwardRequest
from model.routers.config import NullExpertsConfig, ReLUConfig, ThresholdConfig, TopPConfig
from train.trained.budgets import (
    BudgetTable,
    load_table,
    measured_rows,
    ratio_interval,
    save_table,
    table_path,
)
from train.trained.calibrate import calibrate_budget

KINDS = {
    "threshold": (ThresholdConfig, {}),
    "top_p": (TopPConfig, {}),
    "relu": (ReLUConfig, {}),
    "null_experts": (NullExpertsConfig, dict(num_null_experts=8, top_k=4)),
}


class Rows:
    """Stands for train.data.loader.Batch: 12 packed rows."""

    def __init__(self, step: int):
        self.step = step

    def inputs(self, device: torch.device):
        return take(batch(self.step, 0, 12), 0, 12)


def model_of(kind: str = "threshold"):
    record, options = KINDS[kind]
    return build(tiny_config(), BalanceConfig(), router=record, budget=2.0, **options).eval()


def routed(model) -> list[torch.Tensor]:
    """Checksums of the routing, and the experts themselves, of text not calibrated on."""
    with torch.no_grad():
        output = model(Rows(99).inputs(torch.device("cpu")), ForwardRequest(keep_routing=True))
    return [tensor for r in output.routings for tensor in (r.expert_ids, r.weights)]


@functools.cache
def calibrated(kind: str, budget: float):
    """What a calibration leaves in the routers, and the routing right after it."""
    model = model_of(kind)
    text = (Rows(step) for step in range(24))
    calibrate_budget(model, text, budget, BalanceConfig(), BudgetConfig(), torch.device("cpu"))
    return capture(model.routers()), routed(model)


@pytest.mark.parametrize("kind", KINDS)
def test_table_restores_calibrated_routing(kind, tmp_path):
    states, expected = {}, {}
    for budget in (1.3, 3.0):
        states[budget], expected[budget] = calibrated(kind, budget)
    assert not all(map(torch.equal, expected[1.3], expected[3.0]))

    save_table(tmp_path, "step-1", BudgetTable((), states, None))
    table, fresh = load_table(tmp_path, "step-1"), model_of(kind)
    for budget in (1.3, 3.0, 1.3):
        assert table.use(fresh, budget)
        assert all(map(torch.equal, routed(fresh), expected[budget])), budget
    assert not table.use(fresh, 2.5)


def test_budget_switch_allocates_nothing():
    model = model_of()
    (low, _), (high, _) = calibrated("threshold", 1.3), calibrated("threshold", 3.0)
    places = [buffer.data_ptr() for buffer in model.buffers()]
    use(model.routers(), low)
    assert [buffer.data_ptr() for buffer in model.buffers()] == places
    assert all(
        torch.equal(a.balance_bias, b.balance_bias)
        for a, b in zip(capture(model.routers()), low, strict=True)
    )
    assert not torch.equal(low[0].balance_bias, high[0].balance_bias)


def test_generation_spends_what_the_budget_says():
    model = model_of()
    states = {budget: calibrated("threshold", budget)[0] for budget in (1.3, 3.0)}
    engine = Engine(model, EngineConfig(max_slots=8))
    spent = {}
    for budget, state in states.items():
        use(model.routers(), state)
        engine.use_context(str(budget))
        prompts = take(batch(5, 0, 12), 0, 12).input_ids.tolist()
        settings = SamplingConfig(max_new_tokens=20, temperature=1.0, top_p=1.0)
        found = list(engine.run(Request(str(i), p, settings) for i, p in enumerate(prompts)))
        spent[budget] = sum(c.experts_per_token for c in found) / len(found)
    assert spent == pytest.approx({1.3: 1.3, 3.0: 3.0}, rel=0.25)


def test_a_table_of_another_model_is_refused():
    other = build(tiny_config(num_experts=4), BalanceConfig(), router=ThresholdConfig, budget=2.0)
    with pytest.raises(ValueError, match="it is another model's"):
        use(other.routers(), capture(model_of().routers()))


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"rows": [1], "states": {}}'])
def test_a_damaged_table_is_named(tmp_path, text):
    path = table_path(tmp_path, "step-1")
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"step-1\.json"):
        load_table(tmp_path, "step-1")


def test_there_may_be_no_table(tmp_path):
    assert load_table(tmp_path, "step-1") is None


def test_intervals_cover_the_truth():
    """Rows of different lengths whose losses go together, as those of documents do. 95% intervals
    cover in 95% of 1,000 cases, give or take 1.4% (two standard deviations).
    """
    gen = torch.Generator().manual_seed(0)
    covered = paired = 0
    for _ in range(1000):
        counts = torch.randint(20, 200, (60,), generator=gen).double()
        ease = torch.randn(60, generator=gen).double()
        losses = (4 + 0.3 * ease) * counts
        others = losses + (0.02 + 0.05 * torch.randn(60, generator=gen).double()) * counts
        _, low, high = ratio_interval(losses, counts)
        covered += low <= 4 <= high
        _, low, high = ratio_interval(others - losses, counts)
        paired += low <= 0.02 <= high
        assert high - low < 0.06
    assert 0.92 < covered / 1000 < 0.97 and 0.92 < paired / 1000 < 0.97


def test_rows_of_a_table_are_compared_with_the_largest_budget():
    counts = torch.tensor([10.0, 20.0], dtype=torch.float64)
    found = {
        3.0: (3.01, torch.tensor([40.0, 80.0], dtype=torch.float64), counts, 2.9),
        1.0: (1.0, torch.tensor([41.0, 82.0], dtype=torch.float64), counts, 1.0),
    }
    low, high = measured_rows(found, lambda experts: 100 * experts)
    assert (low.budget, low.val_loss, low.difference) == (1.0, 4.1, pytest.approx(0.1))
    assert (high.val_loss, high.difference, high.flops_per_token) == (4.0, 0.0, 290.0)
