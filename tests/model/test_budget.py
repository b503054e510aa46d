"""The budget controller, quantile balancing and the fallbacks, on routers fed with made-up
logits.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from common import batch, build, take, tiny_config

from model.config import BalanceConfig, BudgetConfig, FailSafeConfig
from model.moe.balance import LayerStats, pack_stats, rank_shares, unpack_stats
from model.moe.budget import start_routers, update_routers
from model.request import ForwardRequest
from model.routers.base import Router, RoutingRequest
from model.routers.config import (
    ExpertChoiceConfig,
    NullExpertsConfig,
    ReLUConfig,
    RouterConfig,
    ThresholdConfig,
    TopKConfig,
    TopPConfig,
)
from model.routers.state import ControllerState
from ops.router import Reason
from tests.pairwise import some_daily

E, T, BINS = 16, 2048, 256
AT_ONCE = BudgetConfig(warm_start_steps=0, blend_steps=0)
NO_FAIL = FailSafeConfig(collapse_share=1.0)
QUANTILE, NONE = BalanceConfig(bias_update="quantile"), BalanceConfig()
BUDGETED = {
    "threshold": (ThresholdConfig, dict(budget=2.0, min_experts=0), NONE),
    "threshold_at_least_one": (ThresholdConfig, dict(budget=2.0, min_experts=1), NONE),
    "top_p": (TopPConfig, dict(budget=2.0), QUANTILE),
    "null_experts": (NullExpertsConfig, dict(top_k=4, num_null_experts=8, budget=2.0), QUANTILE),
    "null_experts_sigmoid": (
        NullExpertsConfig,
        dict(top_k=4, num_null_experts=8, budget=2.0, score_function="sigmoid"),
        NONE,
    ),
    "relu": (ReLUConfig, dict(budget=2.0, min_experts=0), NONE),
}


def identity_router(kind: type[RouterConfig], **options) -> Router:
    """A router whose logits are its input."""
    columns = E + options.get("num_null_experts", 0)
    router = kind(**options).build(
        tiny_config(num_experts=E, hidden_size=columns, num_heads=1, num_kv_heads=1, head_dim=4)
    )
    torch.nn.init.eye_(router.weight)
    router.prepare_histogram(BINS)
    return router


def logits(
    router: Router, step: int, skew: float = 0.0, drift: float = 0.0, scale: float = 1.0
) -> torch.Tensor:
    """Correlated logits whose mean and popularity move with the step."""
    generator = torch.Generator().manual_seed(step)
    columns = router.spec.num_columns
    x = scale * torch.randn(T, columns, generator=generator) + 0.5 * torch.randn(
        T, 1, generator=generator
    )
    x[:, :E] += skew * torch.linspace(1, -1, E) + drift * step / 100 * torch.linspace(-1, 1, E)
    return x + drift * math.sin(step / 30)


def stats_of(router: Router, x: torch.Tensor, mask: torch.Tensor | None = None) -> LayerStats:
    routing = router(x, RoutingRequest(token_mask=mask, num_bins=BINS))
    packed = pack_stats(routing, router.router_inputs.limit < router.max_top_k)
    return unpack_stats(packed.unsqueeze(0), E, router.max_top_k)


def run(
    router: Router,
    steps: int,
    balance: BalanceConfig,
    budget: BudgetConfig = AT_ONCE,
    fail_safe: FailSafeConfig = NO_FAIL,
    first: int = 0,
    **options,
) -> list[LayerStats]:
    history = []
    for step in range(first, first + steps):
        stats = stats_of(router, logits(router, step, **options))
        update_routers([router], stats, balance, budget, fail_safe)
        history.append(stats)
    return history


def max_vio(history: list[LayerStats]) -> float:
    load = sum(s.counts[0] for s in history).double()
    return float(load.max() / load.mean()) - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("budget", some_daily([1.3, 2.0, 3.7], 3))
def test_the_mean_number_of_experts_meets_the_budget_on_drifting_logits(name, budget):
    """Within 1% over 200 steps, after 60 to settle."""
    kind, options, balance = BUDGETED[name]
    router = identity_router(kind, **{**options, "budget": budget})
    run(router, 60, balance, skew=1.0, drift=0.5)
    history = run(router, 200, balance, first=60, skew=1.0, drift=0.5)
    mean = sum(float(s.experts_per_token) for s in history) / 200
    assert mean == pytest.approx(budget, rel=0.01)
    late = [float(s.experts_per_token) for s in history[100:]]
    assert max(abs(k / budget - 1) for k in late) < 0.15


def noise(kind: str, generator: torch.Generator, count: int) -> torch.Tensor:
    """[count] factors of mean 1: lognormal with this relative deviation, or one step in twenty six
    times the mean.
    """
    if kind == "spikes":
        return torch.where(torch.rand(count, generator=generator) < 0.05, 6.0, 0.7 / 0.95)
    sigma = math.sqrt(math.log(1 + float(kind) ** 2))
    return (sigma * torch.randn(count, generator=generator) - sigma**2 / 2).exp()


@pytest.mark.parametrize(
    "kind", some_daily(["0.1", "0.05", "0.2", "1.0", "0.3", "0.4", "spikes"], 3)
)
@pytest.mark.parametrize("router", [ThresholdConfig, TopPConfig])
def test_noise_of_single_steps_does_not_bias_the_mean_number_of_experts(kind, router):
    """The plant of the quantile law: mean experts = budget * exp(-theta) * noise, noise of mean 1.
    The errors' mean goes to 0 over 600 steps, in each of 8 layers with noise of their own and most
    of all together.
    """
    layers = [identity_router(router, budget=1.3, max_experts=16) for _ in range(8)]
    generator, tokens, errors = torch.Generator().manual_seed(0), 100_000, []
    quiet = dataclasses.replace(AT_ONCE, guard_error=1e9)
    for _ in range(600):
        theta = torch.stack([layer.controller_state.theta for layer in layers])
        mean = 1.3 * (-theta).exp() * noise(kind, generator, 8)
        counts = (mean / E * tokens).long().unsqueeze(1).expand(8, E)
        k_histogram = torch.zeros(8, 17, dtype=torch.int64)
        k_histogram[:, 1] = tokens
        zeros = torch.zeros(8, dtype=torch.int64)
        stats = LayerStats(
            counts,
            k_histogram,
            torch.zeros(8, 8, dtype=torch.int64),
            zeros,
            zeros,
            zeros.double(),
            torch.zeros(8, 2, dtype=torch.int64),
            torch.ones(8, E, BINS, dtype=torch.int64),
        )
        update_routers(layers, stats, NONE, quiet, NO_FAIL)
        errors.append(stats.experts_per_token / 1.3 - 1)
    late = torch.stack(errors[100:]).mean(0)
    assert abs(float(late.mean())) < 0.004 and float(late.abs().max()) < 0.02, late


@pytest.mark.parametrize("name", BUDGETED)
def test_the_budget_is_met_again_100_steps_after_the_text_changes(name):
    """Scores three times as flat, other experts popular, from one step to the next."""
    kind, options, balance = BUDGETED[name]
    router = identity_router(kind, **options)
    run(router, 100, balance, skew=1.0)
    run(router, 100, balance, first=100, skew=-2.0, scale=0.3)
    history = run(router, 60, balance, first=200, skew=-2.0, scale=0.3)
    assert sum(float(s.experts_per_token) for s in history) / 60 == pytest.approx(2.0, rel=0.02)
    assert router.controller_state.hold == 0


def test_plain_top_k_spends_a_fractional_budget_in_turn():
    """A warm start or a fallback at 1.3 experts is 1 or 2 of them, 1.3 in the mean."""
    budget = BudgetConfig(warm_start_steps=40, blend_steps=1)
    router = identity_router(TopPConfig, budget=1.3)
    start_routers([router], budget, NO_FAIL)
    ks = [float(s.experts_per_token) for s in run(router, 40, NONE, budget)]
    assert set(ks) == {1.0, 2.0} and sum(ks) / 40 == pytest.approx(1.3, abs=0.026), ks


def test_crossing_the_budget_does_not_arm_the_guard():
    """A layer on its way through the budget is not yet at it: the short patience is for layers that
    were.
    """
    router = identity_router(TopPConfig, budget=2.0)
    x = logits(router, 0)
    for value in (0.9, 0.9, 0.32, 0.05, 0.05):
        router.router_inputs.value.fill_(value)
        update_routers(
            [router],
            stats_of(router, x),
            NONE,
            dataclasses.replace(AT_ONCE, kp=0.0, ki=0.0),
            NO_FAIL,
        )
    assert router.controller_state.armed < AT_ONCE.guard_steps


@pytest.mark.parametrize("kind", [NullExpertsConfig, TopPConfig])
def test_plain_top_k_is_of_the_experts_alone(kind):
    """In warm start and fallbacks null experts take no rank, however high they score."""
    options = dict(top_k=4) if kind is NullExpertsConfig else {}
    router = identity_router(kind, num_null_experts=8, budget=2.0, **options)
    budget = BudgetConfig(warm_start_steps=3, blend_steps=5)
    start_routers([router], budget, NO_FAIL)
    for step in range(5):
        x = logits(router, step)
        x[:, E:] += 5.0
        stats = stats_of(router, x)
        plain = step < 3
        assert (float(stats.experts_per_token) == 2.0) == plain and (
            int(stats.null_count) == 0
        ) == plain, step
        update_routers([router], stats, QUANTILE, budget, NO_FAIL)
        assert float(router.router_inputs.share) == (0.0 if step < 2 else 1.0), (
            "null experts come back at once"
        )


def test_a_shift_of_the_null_logits_from_an_old_checkpoint_fades_and_the_budget_is_found():
    """Earlier versions held the budget by such a shift, with theta the same number."""
    router = identity_router(NullExpertsConfig, top_k=4, num_null_experts=8, budget=2.0)
    router.router_inputs.value.fill_(6.0)
    router.controller_state.theta.fill_(6.0)
    run(router, 100, QUANTILE)
    history = run(router, 50, QUANTILE, first=100)
    assert sum(float(s.experts_per_token) for s in history) / 50 == pytest.approx(2.0, rel=0.02)
    assert 0 < router.router_inputs.value < 1e-4


@pytest.mark.parametrize("name", [*BUDGETED, "top_k", "sigmoid_top_k", "expert_choice"])
def test_the_load_is_even_within_50_steps_of_an_adversarial_skew(name):
    fixed = {
        "top_k": (TopKConfig, dict(top_k=2), QUANTILE),
        "sigmoid_top_k": (TopKConfig, dict(top_k=2, score_function="sigmoid"), QUANTILE),
        "expert_choice": (ExpertChoiceConfig, dict(top_k=2), NONE),
    }
    kind, options, balance = {**BUDGETED, **fixed}[name]
    router = identity_router(kind, **options)
    before = max_vio(run(router, 1, balance, skew=3.0))
    run(router, 49, balance, skew=3.0, first=1)
    after = max_vio(run(router, 10, balance, skew=3.0, first=50))
    at_once = ("expert_choice", "threshold", "threshold_at_least_one", "relu")
    assert after < 0.2 and (before > 1 or name in at_once), (before, after)


def test_cuts_and_controllers_continue_exactly_from_saved_state():
    for kind, options, balance in BUDGETED.values():
        router = identity_router(kind, **options)
        run(router, 30, balance, skew=1.0, drift=1.0)
        other = identity_router(kind, **options)
        other.load_state_dict(copy.deepcopy(router.state_dict()))
        first, second = (
            run(r, 20, balance, first=30, skew=1.0, drift=1.0) for r in (router, other)
        )
        assert all(torch.equal(a.counts, b.counts) for a, b in zip(first, second, strict=True))
        for (name, a), b in zip(router.named_buffers(), other.buffers(), strict=True):
            assert torch.equal(a, b), name


def test_a_step_without_tokens_changes_no_cut_and_no_controller():
    for kind, options, balance in BUDGETED.values():
        router = identity_router(kind, **options)
        run(router, 30, balance)
        before = {name: b.clone() for name, b in router.named_buffers()}
        stats = stats_of(router, logits(router, 31), torch.zeros(T, dtype=torch.bool))
        update_routers([router], stats, balance, AT_ONCE, NO_FAIL)
        for name, b in router.named_buffers():
            if name != "controller":
                assert torch.equal(b, before[name]), name
        assert router.controller_state.theta == ControllerState.of(before["controller"]).theta


def test_padding_moves_nothing():
    for kind, options, balance in BUDGETED.values():
        ends = []
        for filler in (0.0, 7.0):
            router = identity_router(kind, **options)
            for step in range(5):
                x, mask = logits(router, step), torch.arange(T) % 4 != 0
                x[~mask] = filler
                update_routers([router], stats_of(router, x, mask), balance, AT_ONCE, NO_FAIL)
            ends.append(router)
        for (name, a), b in zip(ends[0].named_buffers(), ends[1].buffers(), strict=True):
            assert torch.equal(a, b), name


def test_layers_are_held_one_by_one_or_all_together():
    budget = dataclasses.replace(AT_ONCE, scope="model")
    routers = [identity_router(TopPConfig, budget=2.0) for _ in range(2)]
    means = []
    # the second layer is surer of itself, so that one P means fewer experts there
    for step in range(120):
        both = [stats_of(r, logits(r, step, scale=1.0 + i)) for i, r in enumerate(routers)]
        stats = LayerStats(*(torch.cat(parts) for parts in zip(*both, strict=True)))
        update_routers(routers, stats, NONE, budget, NO_FAIL)
        means.append(stats.experts_per_token)
    late = torch.stack(means[80:]).mean(0)
    assert float(late.mean()) == pytest.approx(2.0, rel=0.01) and float(late[0] - late[1]) > 0.5
    assert float(routers[0].router_inputs.value) == float(routers[1].router_inputs.value)


def test_warm_start_goes_from_top_k_to_the_mode():
    budget = BudgetConfig(warm_start_steps=5, blend_steps=4)
    router = identity_router(TopPConfig, budget=3.0)
    start_routers([router], budget, NO_FAIL)
    shares = []
    for step in range(12):
        stats = stats_of(router, logits(router, step))
        if float(router.router_inputs.share) == 0:
            assert float(stats.experts_per_token) == 3.0 and int(stats.reasons[0, 4]) == T
        update_routers([router], stats, NONE, budget, NO_FAIL)
        shares.append(float(router.router_inputs.share))
    assert shares[:4] == [0.0] * 4 and shares[4:9] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert int(stats_of(router, logits(router, 12)).reasons[0, 4]) == 0


def test_the_guard_brings_plain_top_k_back_and_tries_again():
    budget = dataclasses.replace(
        AT_ONCE, guard_steps=5, hold_steps=10, blend_steps=2, ki=0.0, kp=0.0
    )
    router = identity_router(TopPConfig, budget=2.0, max_experts=16, initial_top_p=0.32)
    history = run(router, 10, NONE, budget)
    assert abs(float(history[-1].experts_per_token) / 2 - 1) < 0.12, (
        "the test wants a start near the budget"
    )
    # flat scores: P now means many more experts
    history = run(router, 30, NONE, budget, first=10, scale=0.2)
    ks = [float(s.experts_per_token) for s in history]
    assert ks[0] > 3 and ks[5:14] == [2.0] * 9, ks
    assert ks[-1] > 3, "after the hold the mode is tried again"


def test_the_guard_also_ends_a_layer_that_never_found_its_budget():
    budget = dataclasses.replace(AT_ONCE, guard_steps=4, hold_steps=10, ki=0.0, kp=0.0)
    router = identity_router(TopPConfig, budget=2.0, max_experts=16, initial_top_p=0.9)
    ks = [float(s.experts_per_token) for s in run(router, 26, NONE, budget)]
    assert all(k > 4 for k in ks[:20]) and ks[20:] == [2.0] * 6, ks


@pytest.mark.parametrize("kind", [TopKConfig, TopPConfig])
def test_a_collapsed_layer_falls_back_to_one_expert_and_freezes_its_bias(kind):
    """To one expert a token, until the hold is over."""
    fail_safe, budget = (
        FailSafeConfig(collapse_share=0.95),
        dataclasses.replace(AT_ONCE, hold_steps=6),
    )
    options = (
        dict(top_k=2, normalize_weights=False)
        if kind is TopKConfig
        else dict(budget=2.0, normalize_weights=False)
    )
    router = identity_router(kind, **options)
    run(router, 3, QUANTILE, budget, fail_safe)
    assert router.controller_state.hold == 0
    x = logits(router, 3)
    x[:, : 2 if kind is TopKConfig else 1] += 50.0  # beyond what a bias can mend
    update_routers([router], stats_of(router, x), QUANTILE, budget, fail_safe)
    assert (
        router.controller_state.collapsed == 1
        and router.router_inputs.fallback_k == 1
        and router.router_inputs.share == 0
    )
    bias = router.balance_bias.clone()
    stats = stats_of(router, x)
    assert float(stats.experts_per_token) == 1.0 and int(stats.reasons[0, 4]) == T
    update_routers([router], stats, QUANTILE, budget, fail_safe)
    assert torch.equal(router.balance_bias, bias)
    history = run(router, 12, QUANTILE, budget, fail_safe, first=5)  # it recovers
    assert router.controller_state.collapsed == 0 and float(history[-1].experts_per_token) > 1.2


def test_an_overloaded_rank_lowers_the_limit_and_counts_its_tokens():
    """By one at a time, and back again when the load is even."""
    fail_safe = FailSafeConfig(collapse_share=1.0, rank_overload=1.3, overload_steps=3)
    router = identity_router(TopKConfig, top_k=4)
    x = logits(router, 0)
    x[:, : E // 2] += 3.0  # the first of two ranks
    for _ in range(3):
        update_routers(
            [router], stats_of(router, x), NONE, AT_ONCE, fail_safe, rank_shares(E, 1, 2, None)
        )
    assert float(router.router_inputs.limit) == 3.0
    stats = stats_of(router, x)
    overloaded, capped = (int(r).bit_length() - 1 for r in (Reason.OVERLOADED, Reason.CAPPED))
    assert float(stats.experts_per_token) == 3.0 and int(stats.reasons[0, overloaded]) == T
    assert int(stats.reasons[0, capped]) == 0
    for _ in range(20):
        update_routers(
            [router],
            stats_of(router, logits(router, 1)),
            NONE,
            AT_ONCE,
            fail_safe,
            rank_shares(E, 1, 2, None),
        )
    assert float(router.router_inputs.limit) == 4.0
    update_routers([router], stats, NONE, AT_ONCE, fail_safe)
    assert float(router.router_inputs.limit) == 4.0


def test_a_row_of_nan_does_not_reach_the_controllers():
    router = identity_router(TopPConfig, budget=2.0)
    x = logits(router, 0)
    x[3] = math.nan
    update_routers([router], stats_of(router, x), QUANTILE, AT_ONCE, NO_FAIL)
    assert all(b.isfinite().all() for b in router.buffers())


# --- in the model ---------------------------------------------------------------------------------


def model_with(kind: type[RouterConfig], **options):
    config = tiny_config(num_layers=2, num_experts=8)
    return build(config, BalanceConfig(), router=kind, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TopKConfig, dict(top_k=2)),
        (TopPConfig, dict(budget=2.0)),
        (ThresholdConfig, dict(budget=2.0)),
        (ReLUConfig, dict(budget=2.0)),
        (NullExpertsConfig, dict(top_k=4, num_null_experts=4, budget=2.0)),
        (ExpertChoiceConfig, dict(top_k=2)),
    ],
)
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_replayed_routing_reproduces_the_loss_and_its_gradients_bit_for_bit(
    kind, options, recompute
):
    config = tiny_config(num_layers=3, num_experts=8, recompute=recompute)
    model, inputs = (
        build(config, BalanceConfig(aux_loss_coeff=0.1), router=kind, **options),
        take(batch(0, 0, 4), 0, 4),
    )
    results = []
    given = None
    for _ in range(2):
        model.zero_grad()
        output = model(inputs, ForwardRequest(keep_routing=True, given_ids=given))
        (output.loss_sum + output.aux_sum + output.z_sum + output.penalty_sum).backward()
        results.append((output, [p.grad.clone() for p in model.parameters()]))
        given = tuple(r.expert_ids for r in output.routings)
    first, second = results
    for name in ("loss_sum", "aux_sum", "z_sum", "counts"):
        assert torch.equal(getattr(first[0], name), getattr(second[0], name)), name
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ThresholdConfig, {}),
        pytest.param(TopPConfig, {}, marks=pytest.mark.nightly),
        pytest.param(ReLUConfig, {}, marks=pytest.mark.nightly),
        (NullExpertsConfig, dict(num_null_experts=8)),
    ],
)
def test_a_model_with_small_batches_meets_a_fractional_budget(kind, options):
    """96 tokens a step, so that a step's mean is off by 10 to 40%: every layer's mean over 200
    steps is within 2%.
    """
    balance = BalanceConfig(bias_update="quantile") if kind is TopPConfig else BalanceConfig()
    model = build(tiny_config(), balance, router=kind, budget=1.3, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    means = []
    for step in range(300):
        output = model(take(batch(step, 0, 6), 0, 6))
        (output.loss_sum / 90).backward()
        optimizer.step()
        optimizer.zero_grad()
        stats = unpack_stats(output.stats, 8, model.routers()[0].max_top_k)
        update_routers(model.routers(), stats, balance, AT_ONCE, NO_FAIL)
        means.append(stats.experts_per_token)
    late = torch.stack(means[100:])
    assert float((late.mean(0) / 1.3 - 1).abs().max()) < 0.02, (late.mean(0), late.std(0))


def test_statistics_of_parts_add_up_to_those_of_the_whole():
    """Any split over ranks and micro-batches gives the controllers the same integers (the entropy
    to its unit).
    """
    model, full = model_with(ThresholdConfig, budget=2.0), batch(0, 0, 6)
    with torch.no_grad():
        whole = model(take(full, 0, 6)).stats
        parts = sum(model(take(full, *span)).stats for span in ((0, 1), (1, 4), (4, 6)))
    num_slots = model.routers()[0].max_top_k
    both = (unpack_stats(stats, 8, num_slots) for stats in (whole, parts))
    for name, a, b in zip(LayerStats._fields, *both, strict=True):
        if name == "entropy":
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(a, b), name


def test_recomputation_counts_once():
    stats = []
    for recompute in ("none", "block"):
        model = build(
            tiny_config(recompute=recompute), BalanceConfig(), router=ThresholdConfig, budget=2.0
        )
        output = model(take(batch(0, 0, 3), 0, 3))
        output.loss_sum.backward()
        stats.append(output.stats)
    assert torch.equal(*stats)
