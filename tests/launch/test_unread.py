"""A setting that was typed and that nothing reads is told."""

from __future__ import annotations

import pytest

from launch.command.arguments import setting
from launch.config.overrides import plain
from launch.config.parse import parse
from launch.config.unread import unread
from launch.saved.defaults import complete
from tests.composing import composed

DENSE = "model.num_experts=0"


def told(*typed: str) -> list[str]:
    overrides = [setting(word) for word in typed]
    return unread(overrides, parse(plain(complete(composed(*overrides))), 1))


@pytest.mark.parametrize(
    "typed",
    [
        *("router.top_k=3", "router=top_p", "balance=quantile", "balance.z_loss_coeff=0.1"),
        *("budget.kp=1", "experts.backend=torch", "dispatcher=local", "model.top_k=3"),
        *("model.num_shared_experts=2", "model.expert_intermediate_size=64"),
    ],
)
def test_a_dense_model_routes_no_token(typed):
    name = typed.split("=")[0]
    (problem,) = told(DENSE, typed)
    assert problem.startswith(f"nothing reads {name}: model.num_experts is 0")
    if not name.startswith("budget"):
        assert told(typed) == []


def test_a_budget_is_read_where_a_router_holds_it():
    (problem,) = told("budget.kp=1")
    assert problem.startswith("nothing reads budget.kp: router=top_k holds no budget")
    assert told("router=threshold", "budget.kp=1") == []


@pytest.mark.parametrize(
    "typed", ["balance=none", "model.num_shared_experts=0", "model.top_k=0", "router.bias=false"]
)
def test_what_asks_for_nothing_is_no_mistake(typed):
    assert told(DENSE, typed) == []


def test_every_problem_is_told_at_once():
    assert len(told(DENSE, "router.top_k=3", "balance=quantile", "seed=3")) == 2
