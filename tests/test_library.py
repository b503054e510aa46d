"""Ops and routers from outside: the examples of docs/library.md run, and what a loop leaves out is
said.
"""

from __future__ import annotations

import importlib
import logging
import re
from pathlib import Path

import pytest
import torch

from model.config import BalanceConfig, BudgetConfig, FailSafeConfig
from model.moe.balance import pack_stats, unpack_stats
from model.moe.budget import start_routers, update_routers
from model.routers.base import STEPS_UNMOVED, RoutingRequest
from model.routing import ROUTERS, RouterControl, make_router

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/library.md").read_text()
EXAMPLES = {
    re.sub(r"\W+", "_", title).lower(): code
    for title, code in re.findall(r"^## (.+?)$.*?```python\n(.*?)```", PAGE, re.M | re.S)
}
PUBLIC = (
    "ops.router",
    "ops.permute",
    "ops.grouped_mlp",
    "ops.all_to_all",
    "ops.sparse_attention",
    "model.routing",
)
KNOBS = {
    "top_k": {"top_k": 2},
    "top_p": {"budget": 2.0},
    "threshold": {"budget": 2.0},
    "relu": {"budget": 2.0},
    "expert_choice": {"top_k": 2},
    "null_experts": {"budget": 2.0, "num_null_experts": 8},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs_as_it_stands(name):
    torch.manual_seed(0)
    exec(compile(EXAMPLES[name], name, "exec"), {"__name__": "notebook"})


def test_every_example_is_short_and_every_op_has_one():
    assert all(len(code.strip().splitlines()) <= 15 for code in EXAMPLES.values())
    text = "\n".join(EXAMPLES.values())
    for package in PUBLIC:
        assert f"from {package} import" in text, package
        assert f"`{package}" in PAGE


def test_examples_say_what_they_print(capsys):
    torch.manual_seed(0)
    for name in ("rows_in_expert_order", "one_token_at_a_time", "sparse_attention"):
        exec(compile(EXAMPLES[name], name, "exec"), {"__name__": "notebook"})
    printed = capsys.readouterr().out
    assert printed.count("True") == 3 and "False" not in printed
    exec(
        compile(EXAMPLES["a_router_in_a_loop_of_one_s_own"], "loop", "exec"),
        {"__name__": "notebook"},
    )
    assert float(capsys.readouterr().out) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("package", PUBLIC)
def test_what_is_exported_exists_and_is_documented(package):
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for name in module.__all__:
        value = getattr(module, name)
        assert not callable(value) or value.__doc__, f"{package}.{name} has no docstring"


def test_every_router_can_be_made_by_its_name_for_one_process():
    assert set(KNOBS) == set(ROUTERS)
    for kind, knobs in KNOBS.items():
        router = make_router(kind, 16, 8, num_shared_experts=1, **knobs)
        assert router.weight.isfinite().all() and 0.01 < float(router.weight.detach().std()) < 0.04
        again = make_router(kind, 16, 8, num_shared_experts=1, **knobs)
        assert torch.equal(router.weight, again.weight)
        assert router(torch.randn(10, 16)).expert_ids.shape[0] == 10


def test_a_router_that_cannot_be_is_refused_with_every_reason():
    with pytest.raises(ValueError, match="unknown router 'topk'; choose one of top_k, top_p"):
        make_router("topk", 16, 8)
    with pytest.raises(ValueError, match=r"router\.top_k is 9"):
        make_router("top_k", 16, 8, top_k=9)
    with pytest.raises(TypeError, match="budget"):
        make_router("threshold", 16, 8)


@pytest.mark.parametrize("kind", KNOBS)
def test_a_loop_with_control_moves_every_kind_and_tells_nothing(kind, caplog):
    routers = [
        make_router(kind, 16, 8, num_shared_experts=1, seed=i, init_std=0.3, **KNOBS[kind])
        for i in range(2)
    ]
    control = RouterControl(routers, budget=BudgetConfig(warm_start_steps=2))
    optimizer = torch.optim.SGD([r.weight for r in routers], lr=1e-3)
    gen = torch.Generator().manual_seed(0)
    for _ in range(STEPS_UNMOVED + 10):
        for _ in range(2):
            for layer in range(2):
                routing = control.route(torch.randn(64, 16, generator=gen), layer)
                (routing.weights.sum() + routing.z_sum).backward()
        optimizer.step()
        stats = control.step()
        assert stats.tokens.tolist() == [128, 128]
    assert not caplog.records
    if routers[0].has_quantile_bias:
        assert all(r.balance_bias.any() for r in routers)


def trained(
    router, steps: int, request: RoutingRequest | None = None, each=lambda routing: None
) -> None:
    optimizer = torch.optim.SGD(router.parameters(), lr=1e-3)
    for _ in range(steps):
        routing = router(torch.randn(64, 16), request)
        (routing.weights.sum() + routing.z_sum).backward()
        optimizer.step()
        each(routing)


def test_a_loop_without_start_or_update_is_told_once_what_it_lacks(caplog):
    router = make_router("threshold", 16, 8, budget=2.0)
    with caplog.at_level(logging.WARNING, "loadstone"):
        trained(router, STEPS_UNMOVED + 30)
    starts, updates = (
        sum(f"{name}" in r.getMessage() for r in caplog.records)
        for name in ("start_routers", "update_routers")
    )
    assert (starts, updates) == (1, 1) and len(caplog.records) == 2
    assert "cuts stand still" in caplog.text and "RouterControl" in caplog.text


def test_a_loop_with_all_three_calls_a_loaded_router_and_evaluation_are_told_nothing(caplog):
    router = make_router("threshold", 16, 8, budget=2.0)
    start_routers([router], BudgetConfig(), FailSafeConfig())
    router.prepare_histogram(64)

    def update(routing):
        stats = unpack_stats(
            pack_stats(routing, torch.tensor(False)).unsqueeze(0), 8, router.max_top_k
        )
        update_routers([router], stats, BalanceConfig(), BudgetConfig(), FailSafeConfig())

    trained(router, STEPS_UNMOVED + 30, RoutingRequest(num_bins=64), update)
    other = make_router("threshold", 16, 8, budget=2.0)
    other.load_state_dict(router.state_dict())
    trained(other, 3)
    fresh = make_router("threshold", 16, 8, budget=2.0).eval()
    trained(fresh, STEPS_UNMOVED + 30)
    # nothing of it moves
    trained(make_router("top_k", 16, 8, top_k=2), STEPS_UNMOVED + 30)
    for _ in range(STEPS_UNMOVED + 30):  # accumulation is no step
        fresh.train()(torch.randn(4, 16))
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "ThresholdRouter is trained without its warm start"
    ]


def test_a_step_without_routing_and_statistics_of_other_routers_are_refused():
    control = RouterControl([make_router("threshold", 16, 8, budget=2.0) for _ in range(2)])
    control.route(torch.randn(8, 16), layer=1)
    with pytest.raises(RuntimeError, match=r"layers \[0\] have routed nothing"):
        control.step()
    router = make_router("threshold", 16, 8, budget=2.0)
    with pytest.raises(ValueError, match="are not those of 8 experts"):
        unpack_stats(torch.zeros(2, 100, dtype=torch.int64), 8, router.max_top_k)
    with pytest.raises(ValueError, match="2 layers with 0 histogram bins"):
        size = 8 + router.max_top_k + 1 + 8 + 5
        control.step(torch.zeros(2, size, dtype=torch.int64))
    with pytest.raises(ValueError, match="got TopKRouter, TopPRouter"):
        RouterControl(
            [make_router("top_k", 16, 8, top_k=2), make_router("top_p", 16, 8, budget=2.0)]
        )
    with pytest.raises(ValueError, match="got none"):
        RouterControl([])
