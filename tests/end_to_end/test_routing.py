"""Adaptive routing from the command line: trained with expert parallelism, resumed, audited, served
at another budget.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commandline import full_and_half, last_json, launch, losses, train_on

pytestmark = [pytest.mark.slow]
ROUTER = (
    "router=threshold",
    "router.max_experts=4",
    "budget.warm_start_steps=4",
    "budget.blend_steps=4",
    "budget.guard_steps=100",
    "model.num_experts=8",
    "audit.sample_one_in=4",
    "fail_safe.spike_zscore=6",
    "train.global_batch_size=16",
    "train.micro_batch_size=4",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An uninterrupted run of 20 steps and one that stopped after 10, both with two expert-parallel
    ranks.
    """
    folder = tmp_path_factory.mktemp("routing")
    full_and_half(folder, *ROUTER)
    return folder


def metrics(run: Path) -> list[dict]:
    return [
        r
        for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "train/loss" in r
    ]


def test_controllers_cuts_and_audit_resume_bit_for_bit(runs):
    shutil.copytree(runs / "half", runs / "resumed")
    train_on(2, f"resume={runs / 'resumed'}")
    assert losses(runs / "resumed") == losses(runs / "full")
    for resumed, full in zip(metrics(runs / "resumed"), metrics(runs / "full"), strict=True):
        assert {k: v for k, v in resumed.items() if k.startswith("moe/")} == {
            k: v for k, v in full.items() if k.startswith("moe/")
        }, full["step"]
    for name in ("routing.jsonl", *(f"audit/records-{rank:05d}.bin" for rank in range(2))):
        assert (runs / "resumed" / name).read_bytes() == (runs / "full" / name).read_bytes(), name
    result = last_json(launch("audit", f"run={runs / 'full'}", f"compare={runs / 'resumed'}"))
    assert result["compare"] == {"common_steps": 20, "step": None, "layer": None}


def test_the_metrics_name_budget_balance_and_fallbacks(runs):
    last = metrics(runs / "full")[-1]
    for name in (
        "moe/experts_per_token",
        "moe/experts_per_token/layer_1",
        "moe/budget_error",
        "moe/budget_error/max",
        "moe/max_vio",
        "moe/max_vio/layer_1",
        "moe/load_gini",
        "moe/router_entropy",
        "moe/rank_load",
        "moe/fallback/empty",
        "moe/fallback/nonfinite",
        "moe/expert_flops_per_token",
        "moe/mode_share",
        "moe/margin_p50",
        "moe/log_z_p99",
        "moe/gate_sum",
        "moe/co_activation",
    ):
        assert name in last, name
    assert last["moe/mode_share"] == 1.0 and last["moe/fallback/nonfinite"] == 0.0
    table = json.loads((runs / "full" / "routing.jsonl").read_text().splitlines()[-1])
    for counts, by_number in zip(table["counts"], table["k_histogram"], strict=True):
        assert (
            sum(counts) == sum(k * n for k, n in enumerate(by_number)) and sum(by_number) == 16 * 32
        )


def test_one_checkpoint_serves_several_budgets(runs):
    found = {}
    for budget in (1.25, 2.0, 3.0):
        result = launch("evaluate", f"run={runs / 'full'}", f"router.budget={budget}")
        found[budget] = last_json(result)["experts_per_token"]
        assert f"calibrated to {budget:g} experts per token" in result.stdout
    for budget, measured in found.items():
        # another text than the calibration's
        assert measured == pytest.approx(budget, rel=0.1)
    text = launch(
        "generate",
        f"run={runs / 'full'}",
        "prompt=the quick",
        "router.budget=1.5",
        "max_new_tokens=5",
    ).stdout
    assert "the quick" in text


def test_a_table_of_budgets_is_measured_once_and_then_used(runs):
    run = runs / "full"
    prompt = ("generate", f"run={run}", "prompt=the quick", "max_new_tokens=8", "temperature=0")
    calibrated = last_json(launch(*prompt, "router.budget=1.25"))["text"]
    result = launch("evaluate", f"run={run}", "router.budget=[1.25,3]", "save_budgets=true")
    low, high = last_json(result)["budgets"]
    single = last_json(launch("evaluate", f"run={run}", "router.budget=1.25"))
    assert low["val_loss"] == pytest.approx(single["val_loss"], rel=1e-5)
    assert low["experts_per_token"] == pytest.approx(single["experts_per_token"], rel=1e-5)
    assert low["low"] < low["val_loss"] < low["high"] and high["difference"] == 0
    assert low["flops_per_token"] < high["flops_per_token"]

    # The table is used: what it holds for a budget is what generation computes with.
    path = Path(last_json(result)["saved"])
    assert last_json(launch(*prompt, "router.budget=1.25"))["text"] == calibrated
    table = json.loads(path.read_text())
    table["states"]["1.25"][0][0].append(0.0)
    path.write_text(json.dumps(table))
    damaged = launch(*prompt, "router.budget=1.25", check=False)
    assert damaged.returncode == 2 and "it is another model's" in damaged.stderr
    path.unlink()


def test_a_budget_that_does_not_fit_is_refused_with_the_reason(runs):
    for command in ("evaluate", "generate"):
        extra = ["prompt=the"] if command == "generate" else []
        result = launch(command, f"run={runs / 'full'}", "router.budget=9", *extra, check=False)
        assert (
            result.returncode == 2 and "router.budget is 9; this router can choose" in result.stderr
        ), result.stderr


def test_the_audit_says_which_tokens_went_where(runs):
    result = launch("audit", f"run={runs / 'full'}", "limit=5")
    summary = last_json(result)
    assert summary["records"] > 50 and "layer" in result.stdout
