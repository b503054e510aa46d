"""Settings that a checkpoint's buffers hold give way to those a resumed run asks for; without a
change nothing moves.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from common import tiny_config

from model.config import BalanceConfig, BudgetConfig, FailSafeConfig
from model.moe.balance import histogram_bins, pack_stats, unpack_stats
from model.moe.budget import start_routers, update_routers
from model.moe.restart import RoutingFacts, adopt_state, state_of
from model.routers.base import RoutingRequest
from model.routers.config import (
    ExpertChoiceConfig,
    NullExpertsConfig,
    ReLUConfig,
    RouterConfig,
    ThresholdConfig,
    TopKConfig,
    TopPConfig,
)

E, T = 16, 1024
SHARES = torch.full((1, E, 2), 0.5, dtype=torch.float64)
NONE, QUANTILE = BalanceConfig(), BalanceConfig(bias_update="quantile")
BUDGET = BudgetConfig(warm_start_steps=0, blend_steps=0)
OFF = FailSafeConfig()
KINDS = {
    "top_k": (TopKConfig, {"top_k": 2}, NONE),
    "expert_choice": (ExpertChoiceConfig, {"top_k": 2}, NONE),
    "threshold": (ThresholdConfig, {"budget": 2.0}, NONE),
    "top_p": (TopPConfig, {"budget": 2.0}, QUANTILE),
    "relu": (ReLUConfig, {"budget": 2.0}, NONE),
    "null_experts": (
        NullExpertsConfig,
        {"budget": 2.0, "top_k": 4, "num_null_experts": 8},
        QUANTILE,
    ),
}


class Layer:
    """One layer's router whose logits are its input, with its settings."""

    def __init__(
        self,
        kind: type[RouterConfig],
        options: dict,
        balance: BalanceConfig = NONE,
        budget: BudgetConfig = BUDGET,
        fail_safe: FailSafeConfig = OFF,
        shares: torch.Tensor | None = None,
    ):
        columns = E + options.get("num_null_experts", 0)
        config = tiny_config(
            num_experts=E, hidden_size=columns, num_heads=1, num_kv_heads=1, head_dim=4
        )
        self.router = kind(**options).build(config)
        torch.nn.init.eye_(self.router.weight)
        self.balance, self.budget, self.fail_safe, self.shares = balance, budget, fail_safe, shares
        self.bins = histogram_bins(balance, self.router)
        self.router.prepare_histogram(self.bins)
        start_routers([self.router], budget, fail_safe)
        self.updates = 0

    @property
    def facts(self) -> RoutingFacts:
        facts = RoutingFacts.of(self.router, self.balance, self.budget, self.fail_safe, self.shares)
        assert facts is not None
        return facts

    def step(self, number: int = 1) -> float:
        """Steps on logits of their own; returns the mean number of experts in the last."""
        mean = 0.0
        for _ in range(number):
            generator = torch.Generator().manual_seed(self.updates)
            x = torch.randn(T, self.router.spec.num_columns, generator=generator)
            routing = self.router(x, RoutingRequest(num_bins=self.bins))
            packed = pack_stats(routing, self.router.router_inputs.limit < self.router.max_top_k)
            stats = unpack_stats(packed.unsqueeze(0), E, self.router.max_top_k)
            update_routers(
                [self.router], stats, self.balance, self.budget, self.fail_safe, self.shares
            )
            self.updates += 1
            mean = float(stats.experts_per_token)
        return mean

    def resumed_from(self, other: Layer, knows: bool = True) -> bool:
        """Load the other's state as a checkpoint would; returns whether it starts anew."""
        fresh = state_of([self.router])
        self.router.load_state_dict(other.router.state_dict(), strict=False)
        self.updates = other.updates
        return adopt_state(
            [self.router], fresh, other.facts if knows else None, self.facts, self.updates
        )


def changed(kind: str, steps: int = 30, **options) -> tuple[Layer, Layer]:
    """A layer after some steps, and one that goes on from it with other options of the router."""
    cls, given, balance = KINDS[kind]
    before = Layer(cls, given, balance)
    before.step(steps)
    after = Layer(cls, given | options, balance)
    after.resumed_from(before)
    return before, after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [3, 8, 40])
def test_nothing_moves_where_no_setting_has_changed(kind, steps):
    cls, options, balance = KINDS[kind]
    settings = (
        balance,
        BudgetConfig(warm_start_steps=5, blend_steps=10),
        FailSafeConfig(collapse_share=0.9, rank_overload=1.01, spike_zscore=6.0, overload_steps=3),
        SHARES,
    )
    layer, again = Layer(cls, options, *settings), Layer(cls, options, *settings)
    layer.step(steps)
    layer.router.controller_state.overload.fill_(2.0)
    layer.router.router_inputs.limit.sub_(1)
    assert not again.resumed_from(layer)
    assert all(
        torch.equal(b, dict(layer.router.named_buffers())[n])
        for n, b in again.router.named_buffers()
    )


@pytest.mark.parametrize("kind", ["threshold", "top_p", "null_experts"])
@pytest.mark.parametrize("budget", [1.5, 2.3])
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 11])
def test_plain_top_k_goes_on_in_turn_under_a_broken_budget(kind, budget, steps):
    """In warm start and blend k is 1 and 2 in turn for a budget of 1.5; a resumed run began with
    the first again, so that its losses were others than those of an undisturbed one.
    """
    cls, options, balance = KINDS[kind]
    settings = (balance, BudgetConfig(warm_start_steps=5, blend_steps=4))
    layer, again = (Layer(cls, options | {"budget": budget}, *settings) for _ in range(2))
    layer.step(steps)
    assert not again.resumed_from(layer)
    assert all(
        torch.equal(b, dict(layer.router.named_buffers())[n])
        for n, b in again.router.named_buffers()
    )
    assert again.step() == layer.step()


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_tokens_visit_the_new_top_k(top_k, knows):
    before = Layer(TopKConfig, {"top_k": 2})
    before.step(3)
    after = Layer(TopKConfig, {"top_k": top_k, "normalize_weights": False})
    after.resumed_from(before, knows)
    assert after.step() == top_k and after.router.router_inputs.fallback_k == top_k


@pytest.mark.parametrize("kind", ["threshold", "top_p", "relu", "expert_choice"])
@pytest.mark.parametrize("most", [2, 14])
def test_the_new_most_experts_of_a_token_act(kind, most):
    _, after = changed(kind, max_experts=most)
    assert after.router.router_inputs.limit == most
    routing = after.router.train()(
        torch.randn(T, E, generator=torch.Generator().manual_seed(1)) + 3, RoutingRequest()
    )
    seen = int((routing.expert_ids >= 0).sum(1).max())
    assert seen == most if kind in ("threshold", "relu") else seen <= most


@pytest.mark.parametrize("kind", ["threshold", "top_p", "null_experts"])
@pytest.mark.parametrize("budget", [1.3, 3.0])
def test_a_new_budget_is_met(kind, budget):
    """Three experts a token are beyond the old budget's most (max_experts follows the budget)."""
    before, after = changed(kind, budget=budget, **({"top_k": 6} if kind == "null_experts" else {}))
    assert after.router.controller_state.theta == before.router.controller_state.theta
    # else the guard would take it for a failure
    assert after.router.controller_state.armed == after.router.controller_state.bad == 0
    means = [after.step() for _ in range(120)]
    assert sum(means[-40:]) / 40 == pytest.approx(budget, rel=0.05)
    assert after.router.controller_state.hold == 0


def test_expert_choice_takes_the_new_top_k():
    _, after = changed("expert_choice", top_k=4)
    assert after.step(5) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("top_k", "threshold"),
        ("threshold", "top_k"),
        ("top_k", "expert_choice"),
        ("relu", "top_p"),
        ("top_p", "top_k"),
    ],
)
def test_state_of_another_kind_of_router_starts_anew(old, new):
    """Cuts are no bias, and theta means something else in every law."""
    before, after = Layer(*KINDS[old]), Layer(*KINDS[new], BudgetConfig())
    before.step(20)
    fresh = state_of([after.router])[0]
    assert after.resumed_from(before)
    assert all(torch.equal(buffer, fresh[name]) for name, buffer in after.router.named_buffers())


def test_scores_of_another_function_have_another_bias():
    _, after = changed("threshold", score_function="softmax")
    assert not after.router.balance_bias.any()


@pytest.mark.parametrize("still_on", [True, False])
def test_a_limit_lowered_for_an_overloaded_rank_stays_while_the_rule_is_on(still_on):
    overload = FailSafeConfig(rank_overload=1.5)
    before = Layer(TopPConfig, {"budget": 2.0}, QUANTILE, BUDGET, overload, SHARES)
    before.router.router_inputs.limit.fill_(3.0)
    before.router.controller_state.overload.fill_(7.0)
    after = Layer(
        TopPConfig, {"budget": 2.0}, QUANTILE, BUDGET, overload if still_on else OFF, SHARES
    )
    after.resumed_from(before)
    assert after.router.router_inputs.limit == (3 if still_on else 8)
    assert after.router.controller_state.overload == (7 if still_on else 0)
    # nobody to compare with
    one_rank = Layer(TopPConfig, {"budget": 2.0}, QUANTILE, BUDGET, overload, None)
    one_rank.resumed_from(before)
    assert one_rank.router.router_inputs.limit == 8


@pytest.mark.parametrize("still_on", [True, False])
def test_a_collapsed_layer_is_released_when_the_rule_is_switched_off(still_on):
    before = Layer(TopKConfig, {"top_k": 2}, NONE, BUDGET, FailSafeConfig(collapse_share=0.9))
    state, inputs = before.router.controller_state, before.router.router_inputs
    state.collapsed.fill_(1.0)
    state.hold.fill_(150.0)
    inputs.fallback_k.fill_(1.0)
    inputs.share.fill_(0.0)
    after = Layer(TopKConfig, {"top_k": 2}, NONE, BUDGET, before.fail_safe if still_on else OFF)
    after.resumed_from(before)
    assert after.step() == (1 if still_on else 2)


@pytest.mark.parametrize(
    ("done", "old", "new"), [(10, 30, 50), (10, 30, 5), (20, 10, 40), (20, 30, 0)]
)
def test_the_warm_start_ends_where_a_run_with_the_new_setting_would_end_it(done, old, new):
    before = Layer(*KINDS["threshold"], BudgetConfig(warm_start_steps=old, blend_steps=5))
    before.step(done)
    after = Layer(*KINDS["threshold"], BudgetConfig(warm_start_steps=new, blend_steps=5))
    after.resumed_from(before)
    assert after.router.controller_state.hold == max(0, new - done)
    after.step(max(0, new - done - 1))
    assert after.router.router_inputs.share == 0
    after.step()
    assert after.router.router_inputs.share > 0


@pytest.mark.parametrize(("old", "new", "left"), [(200, 50, 0), (200, 190, 140), (200, 300, 250)])
def test_a_fallback_ends_by_the_new_length(old, new, left):
    before = Layer(*KINDS["threshold"], dataclasses.replace(BUDGET, hold_steps=old))
    before.router.controller_state.hold.fill_(150.0)
    before.updates = 400
    after = Layer(*KINDS["threshold"], dataclasses.replace(BUDGET, hold_steps=new))
    after.resumed_from(before)
    assert after.router.controller_state.hold == left


@pytest.mark.parametrize(("old", "new"), [(256, 64), (64, 256), (256, 256)])
def test_cuts_go_on_with_another_number_of_bins(old, new):
    balance = dataclasses.replace(QUANTILE, histogram_bins=old)
    before = Layer(TopKConfig, {"top_k": 2}, balance)
    before.step(20)
    after = Layer(TopKConfig, {"top_k": 2}, dataclasses.replace(balance, histogram_bins=new))
    after.resumed_from(before)
    bias = after.router.balance_bias.clone()
    after.step()
    assert (after.router.balance_bias - bias).abs().max() < 0.02


def test_quantiles_that_are_switched_on_begin_with_the_bins_of_a_new_run():
    before = Layer(TopKConfig, {"top_k": 2})
    before.step(3)
    after, new = (
        Layer(TopKConfig, {"top_k": 2}, QUANTILE),
        Layer(TopKConfig, {"top_k": 2}, QUANTILE),
    )
    after.resumed_from(before)
    assert torch.equal(after.router.histogram_range, new.router.histogram_range)
    new.updates = after.updates
    after.step()
    new.step()
    assert torch.equal(after.router.balance_bias, new.router.balance_bias)


def test_a_bias_stands_still_when_its_update_is_switched_off():
    """As at the end of a long training: the bias that was learned stays in force."""
    before = Layer(
        TopKConfig, {"top_k": 2}, BalanceConfig(bias_update="sign", bias_update_rate=0.01)
    )
    before.step(20)
    after = Layer(TopKConfig, {"top_k": 2})
    after.resumed_from(before)
    after.step(3)
    assert (
        torch.equal(after.router.balance_bias, before.router.balance_bias)
        and after.router.balance_bias.any()
    )
