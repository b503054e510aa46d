"""Routers: what every router promises, and what each mode adds."""

from __future__ import annotations

import math

import pytest
import torch
from common import tiny_config

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
from model.routers.state import ControllerState, RouterInputs, RouterState
from ops.router import Reason, RouterOutput
from ops.sparse_attention.noise import token_hash, uniform

NUM_EXPERTS, HIDDEN_SIZE = 8, 16
BOTH = pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])

# Record and its knobs by name; every router runs through the tests that take `router`.
ROUTERS = {
    "softmax": (TopKConfig, dict(top_k=2)),
    "softmax_raw": (TopKConfig, dict(top_k=3, normalize_weights=False)),
    "sigmoid": (TopKConfig, dict(top_k=2, score_function="sigmoid", scaling_factor=2.5)),
    "sqrt_softplus": (TopKConfig, dict(top_k=2, score_function="sqrt_softplus")),
    "switch": (TopKConfig, dict(top_k=1, normalize_weights=False)),
    "all_experts": (TopKConfig, dict(top_k=NUM_EXPERTS)),
    "group_limited": (TopKConfig, dict(top_k=2, num_groups=4, top_groups=2)),
    "top_p": (TopPConfig, dict(budget=2.0)),
    "threshold": (ThresholdConfig, dict(budget=2.0)),
    "relu": (ReLUConfig, dict(budget=2.0)),
    "expert_choice": (ExpertChoiceConfig, dict(top_k=2, min_experts=1)),
    "null_experts": (NullExpertsConfig, dict(top_k=4, num_null_experts=4, budget=2.0)),
}


def make(kind: type[RouterConfig], config=None, **options) -> Router:
    router = kind(**options).build(config or tiny_config())
    torch.nn.init.normal_(router.weight, 0.0, 0.5, generator=torch.Generator().manual_seed(0))
    if kind is ThresholdConfig:
        router.balance_bias.fill_(-0.8)
    return router


def top_k_router(**options) -> Router:
    return make(TopKConfig, **options)


@pytest.fixture(params=ROUTERS)
def router(request):
    kind, options = ROUTERS[request.param]
    return make(kind, **options)


def tokens(count: int = 50, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def masked(router: Router, hidden: torch.Tensor, mask: torch.Tensor) -> RouterOutput:
    return router(hidden, RoutingRequest(token_mask=mask))


def test_tokens_of_several_budgets_are_routed_as_by_a_router_of_each(router):
    """Every law reads biases and controls its own way; one row is in plain top-k."""
    router.eval()
    gen = torch.Generator().manual_seed(3)
    states = []
    for share in (1.0, 1.0, 0.0):
        bias = router.balance_bias + 0.2 * torch.randn(router.spec.num_columns, generator=gen)
        states.append(RouterState(bias, router.control.clone()))
        states[-1].control[0] += 0.05
        states[-1].control[1] = share
    states[1] = states[1]._replace(balance_bias=torch.zeros_like(router.balance_bias))
    table = RouterState(*(torch.stack(part) for part in zip(*states, strict=True)))
    hidden, row_of = tokens(), (torch.arange(50) % 3).int()
    mixed = router(hidden, RoutingRequest(budgets=table, row_of=row_of))
    for row, state in enumerate(states):
        router.balance_bias.copy_(state.balance_bias)
        router.control.copy_(state.control)
        alone, own = router(hidden), row_of == row
        assert torch.equal(mixed.expert_ids[own], alone.expert_ids[own]), row
        torch.testing.assert_close(mixed.weights[own], alone.weights[own])
        assert torch.equal(mixed.reasons[own], alone.reasons[own]), row


def plain_scores(router: Router, hidden: torch.Tensor) -> torch.Tensor:
    logits = hidden @ router.weight.T
    if router.spec.score_function == "softmax":
        return logits.exp() / logits.exp().sum(-1, keepdim=True)
    if router.spec.score_function == "sqrt_softplus":
        return (1 + logits.exp()).log().sqrt()
    return (
        logits.clamp_min(0) if router.spec.score_function == "relu" else 1 / (1 + (-logits).exp())
    )


# --- every router ---------------------------------------------------------------------------------


def test_ids_are_in_range_and_differ_within_a_token(router):
    routing = router(tokens())
    assert routing.expert_ids.shape == routing.weights.shape == (50, router.max_top_k)
    for ids in routing.expert_ids.tolist():
        used = [i for i in ids if i != -1]
        assert len(set(used)) == len(used) and all(0 <= i < NUM_EXPERTS for i in used)
        assert used or router.spec.num_null_experts or router.spec.min_experts == 0


def test_unused_slots_have_zero_weight_and_used_slots_a_positive_one(router):
    mask = torch.arange(50) % 3 != 0
    routing = masked(router, tokens(), mask)
    assert (routing.weights[routing.expert_ids < 0] == 0).all()
    # ReLU's may be zero
    fallback = (routing.reasons & int(Reason.EMPTY) > 0).unsqueeze(1)
    assert (routing.weights[(routing.expert_ids >= 0) & ~fallback] > 0).all()


def test_masked_tokens_visit_no_expert_and_leave_the_others_alone(router):
    mask = torch.arange(50) % 3 != 0
    routing, unmasked = masked(router, tokens(), mask), router(tokens())
    assert (routing.expert_ids[~mask] == -1).all() and (routing.weights[~mask] == 0).all()
    if router.spec.mode != "expert_choice":  # where tokens compete
        assert torch.equal(routing.expert_ids[mask], unmasked.expert_ids[mask])
        assert torch.equal(routing.weights[mask], unmasked.weights[mask])


def test_gradients_of_gates_reach_the_router_and_its_input(router):
    probe = torch.randn(50, router.max_top_k, generator=torch.Generator().manual_seed(2))
    hidden = tokens().requires_grad_()
    routing = router(hidden)
    (routing.weights * probe).sum().backward()
    # A single normalised gate is 1 whatever the logits are, and a gate of zero has no slope.
    alone = (routing.expert_ids >= 0).sum(1) <= (1 if router.spec.normalize_weights else 0)
    reached = (hidden.grad.norm(dim=1) > 0) | alone | (routing.weights.sum(1) == 0)
    assert (router.weight.grad.norm(dim=1) > 0).all() and reached.all() and (~alone).any()


def test_masked_tokens_give_no_gradient(router):
    mask = torch.arange(50) % 2 == 0
    hidden = tokens().requires_grad_()
    probe = torch.randn(50, router.max_top_k, generator=torch.Generator().manual_seed(2))
    routing = masked(router, hidden, mask)
    (
        (routing.weights * probe).sum()
        + routing.score_sums.sum()
        + routing.z_sum
        + routing.entropy_sum
    ).backward()
    assert (hidden.grad[~mask] == 0).all() and (hidden.grad[mask].norm(dim=1) > 0).any()


def test_gates_and_sums_follow_their_definition(router):
    hidden = tokens()
    routing, scores = router(hidden), plain_scores(router, hidden)
    used = routing.expert_ids >= 0
    gates = torch.where(used, scores.gather(1, routing.expert_ids.clamp_min(0).long()), 0.0)
    if router.spec.normalize_weights:
        gates = gates / gates.sum(-1, keepdim=True).clamp_min(1e-20)
    torch.testing.assert_close(routing.weights, router.spec.scaling_factor * gates)
    log_z = (hidden @ router.weight.T).exp().sum(-1).log()
    torch.testing.assert_close(routing.log_z, log_z)
    torch.testing.assert_close(routing.z_sum, log_z.square().sum())
    assert routing.counts.sum(0).tolist() == [
        int((routing.expert_ids == e).sum()) for e in range(NUM_EXPERTS)
    ]


def test_no_tokens_are_routed_to_nothing(router):
    routing = masked(router, tokens(0), torch.empty(0, dtype=torch.bool))
    assert routing.expert_ids.shape == routing.weights.shape == (0, router.max_top_k)
    assert routing.log_z.shape == (0,) and routing.counts.sum() == 0 and routing.z_sum == 0
    (routing.weights.sum() + routing.score_sums.sum()).backward()
    assert (router.weight.grad == 0).all()


def test_state_and_gates_stay_fp32_whatever_the_model_uses(router):
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    router, hidden = router.to(torch.bfloat16), tokens().to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    for name, buffer in router.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, before[name]), name
    routing = router(hidden)
    assert {t.dtype for t in (routing.weights, routing.score_sums, routing.log_z)} == {
        torch.float32
    }


def test_given_ids_reproduce_the_routing_bit_for_bit(router):
    hidden = tokens()
    routing = router(hidden)
    again = router(hidden, RoutingRequest(given_ids=routing.expert_ids))
    for name in (
        "weights",
        "expert_ids",
        "counts",
        "score_sums",
        "slots",
        "inverse",
        "offsets",
        "k_histogram",
    ):
        assert torch.equal(getattr(again, name), getattr(routing, name)), name


def test_a_lowered_limit_caps_the_experts_of_a_token(router):
    router.router_inputs.limit.fill_(1.0)
    routing = router(tokens())
    assert int((routing.expert_ids >= 0).sum(1).max()) <= 1


def test_the_frozen_router_chooses_by_its_snapshot_and_weighs_by_its_weight(router):
    hidden = tokens()
    router.keep_snapshots()
    before = router(hidden, RoutingRequest(snapshot=True))
    with torch.no_grad():
        router.weight.copy_(
            torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(5))
        )
    frozen, moved = router(hidden, RoutingRequest(frozen=True)), router(hidden)
    assert torch.equal(frozen.expert_ids, before.expert_ids) and not torch.equal(
        moved.expert_ids, before.expert_ids
    )
    scores = plain_scores(router, hidden).gather(1, frozen.expert_ids.clamp_min(0).long())
    gates = torch.where(frozen.expert_ids >= 0, scores, 0.0)
    if router.spec.normalize_weights:
        gates = gates / gates.sum(-1, keepdim=True).clamp_min(1e-20)
    torch.testing.assert_close(frozen.weights, router.spec.scaling_factor * gates)
    visiting = int((frozen.expert_ids >= 0).any(1).sum())
    assert int(frozen.reason_counts[int(Reason.FROZEN).bit_length() - 1]) == visiting


@pytest.mark.parametrize(
    "name", ["softmax", "sigmoid", "top_p", "threshold", "relu", "null_experts"]
)
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_no_expert_exceeds_its_capacity_and_the_rest_spills(name, factor):
    kind, options = ROUTERS[name]
    free, held = make(kind, **options), make(kind, **options, capacity_factor=factor)
    hidden = tokens(64) + 1.0  # lopsided
    routing, capacity = held(hidden), math.ceil(factor * held.target * 64 / NUM_EXPERTS)
    loads = routing.counts.sum(0)
    assert int(loads.max()) <= capacity
    wanted = free(hidden).counts.sum(0)
    spilled = int(routing.reason_counts[int(Reason.OVERFLOW).bit_length() - 1])
    assert (spilled > 0) == (int(wanted.max()) > capacity)
    if factor >= 1.5 and name == "softmax":  # room for all: nothing is dropped
        assert int(loads.sum()) == int(wanted.sum())
    moved, dropped = routing.overflow.tolist()
    assert dropped == int(wanted.sum()) - int(loads.sum())
    assert moved == int((routing.expert_ids != free(hidden).expert_ids).sum()) - dropped
    for ids in routing.expert_ids.tolist():
        used = [i for i in ids if i != -1]
        assert len(set(used)) == len(used)


@pytest.mark.parametrize("tile", [1, 4, 16, 1000])
@pytest.mark.parametrize("name", ["softmax", "top_p", "threshold", "null_experts"])
def test_token_rounding_makes_counts_multiples_of_the_tile(name, tile):
    kind, options = ROUTERS[name]
    free, rounded = make(kind, **options), make(kind, **options)
    rounded.token_rounding = tile
    hidden = tokens(64) + 1.0
    plain, routing = free(hidden), rounded(hidden)
    before, after = plain.counts.sum(0), routing.counts.sum(0)
    assert bool((after % tile == 0).all()) and int((after - before).abs().max()) <= tile
    moved, dropped = routing.overflow.tolist()
    assert dropped == int(before.sum() - after.sum()) and moved >= 0
    assert moved + dropped == int((routing.expert_ids != plain.expert_ids).sum())
    touched = (routing.expert_ids != plain.expert_ids).any(1)
    assert int(routing.reason_counts[Reason.OVERFLOW.bit]) == int(touched.sum())
    for ids in routing.expert_ids.tolist():
        used = [i for i in ids if i != -1]
        assert len(set(used)) == len(used)
    rounded.eval()
    assert torch.equal(rounded(hidden).expert_ids, plain.expert_ids)


# --- top-k ----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("scaling_factor", [1.0, 2.5])
def test_normalised_gates_sum_to_the_scaling_factor(score_function, scaling_factor):
    router = top_k_router(top_k=3, score_function=score_function, scaling_factor=scaling_factor)
    torch.testing.assert_close(router(tokens()).weights.sum(-1), torch.full((50,), scaling_factor))


@BOTH
@pytest.mark.parametrize("normalize_weights", [True, False])
def test_the_highest_scores_win_and_become_the_gates(score_function, normalize_weights):
    router = top_k_router(
        top_k=3,
        score_function=score_function,
        normalize_weights=normalize_weights,
        scaling_factor=1.5,
    )
    hidden = tokens()
    routing = router(hidden)
    for t, scores in enumerate(plain_scores(router, hidden).tolist()):
        chosen = sorted(range(NUM_EXPERTS), key=lambda e: -scores[e])[:3]
        total = sum(scores[e] for e in chosen) if normalize_weights else 1.0
        assert routing.expert_ids[t].tolist() == chosen
        assert routing.weights[t].tolist() == pytest.approx(
            [1.5 * scores[e] / total for e in chosen], rel=1e-5
        )


@BOTH
def test_ties_go_to_the_lower_expert_id(score_function):
    router = top_k_router(top_k=3, score_function=score_function)
    with torch.no_grad():
        router.weight.zero_()
        assert (router(tokens()).expert_ids == torch.arange(3)).all()
        # three equal winners, as the input is positive; small, or sigmoid saturates
        router.weight[[6, 2, 5]] = 0.01
        hidden = tokens().abs()
        assert (router(hidden).expert_ids == torch.tensor([2, 5, 6])).all()
        router.weight[4] = 0.02
        assert (router(hidden).expert_ids[:, 0] == 4).all()
        many = TopKConfig(top_k=8).build(tiny_config(num_experts=128))
        torch.nn.init.zeros_(many.weight)
        assert (many(tokens()).expert_ids == torch.arange(8)).all()


@BOTH
def test_the_bias_changes_the_selection_but_never_the_gates(score_function):
    router, hidden = (
        top_k_router(top_k=2, score_function=score_function, scaling_factor=2.0),
        tokens(),
    )
    before = router(hidden)
    router.balance_bias[5], router.balance_bias[0] = 10.0, -10.0
    after = router(hidden)
    assert (after.expert_ids[:, 0] == 5).all() and not (after.expert_ids == 0).any()
    assert not torch.equal(after.expert_ids, before.expert_ids)
    assert torch.equal(after.score_sums, before.score_sums) and torch.equal(
        after.log_z, before.log_z
    )
    chosen = plain_scores(router, hidden).gather(1, after.expert_ids.long())
    torch.testing.assert_close(after.weights, 2.0 * chosen / chosen.sum(-1, keepdim=True))


def test_a_common_shift_of_the_bias_changes_nothing():
    router, hidden = top_k_router(top_k=2), tokens()
    before = router(hidden)
    router.balance_bias += 0.5
    assert torch.equal(router(hidden).expert_ids, before.expert_ids)


def test_the_bias_is_saved_but_not_trained():
    router = top_k_router(top_k=2)
    assert "balance_bias" in router.state_dict() and not router.balance_bias.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(top_k=NUM_EXPERTS + 1),
            "router.top_k is 9; it must be between 1 and model.num_experts 8",
        ),
        (dict(top_k=0, normalize_weights=False), "router.top_k is 0"),
        (dict(top_k=2, score_function="tanh"), "router.score_function is 'tanh'"),
        (dict(top_k=2, scaling_factor=0.0), "router.scaling_factor is 0.0"),
        (
            dict(top_k=2, num_groups=3, top_groups=2),
            "router.num_groups 3 must divide model.num_experts 8",
        ),
        (dict(top_k=2, num_groups=2, top_groups=3), "router.top_groups 3"),
        (dict(top_k=2, capacity_factor=0.0), "router.capacity_factor is 0.0"),
    ],
)
def test_contradictory_settings_are_refused(options, message):
    (problem,) = TopKConfig(**options).problems(tiny_config())
    assert message in problem


@pytest.mark.parametrize("kind", [TopKConfig, ExpertChoiceConfig])
def test_gates_that_are_always_one_are_no_way_to_learn_and_one_to_compute(kind):
    settings = (
        kind(top_k=1, normalize_weights=True)
        if kind is TopKConfig
        else kind(top_k=1, max_experts=1, normalize_weights=True)
    )
    assert not settings.problems(tiny_config())
    (problem,) = settings.training_problems(tiny_config())
    assert "makes every gate 1" in problem
    assert not ROUTERS["switch"][0](**ROUTERS["switch"][1]).training_problems(tiny_config())


def test_training_by_gates_that_are_always_one_is_said_once(caplog):
    router = top_k_router(top_k=1)
    for _ in range(2):
        router(tokens())
    (said,) = caplog.records
    assert "gates are all 1" in said.message
    caplog.clear()
    top_k_router(top_k=1).eval()(tokens())
    assert not caplog.records


RANKING = [name for name in ROUTERS if name not in ("relu", "null_experts", "expert_choice")]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", RANKING)
def test_a_router_at_another_top_k_is_the_same_router_configured_with_it(name, top_k):
    """What launch.evaluate router.top_k=K computes, what self-distillation taught the budget K, and
    the gates of the definition, are one thing.
    """
    kind, options = ROUTERS[name]
    config, settings = tiny_config(), kind(**options)
    router = make(kind, **options).eval()
    other = make(TopKConfig, **settings.fixed(config, top_k).arguments).eval()
    other.balance_bias.copy_(router.balance_bias)
    hidden = tokens()
    routing = other(hidden)
    if top_k <= router.max_top_k:  # a lower budget is a matter of the slots that there are
        lower = router(hidden, RoutingRequest(plain_k=top_k))
        assert torch.equal(routing.expert_ids, lower.expert_ids[:, :top_k])
        assert torch.equal(routing.weights, lower.weights[:, :top_k])
        assert (lower.expert_ids[:, top_k:] == -1).all()

    gates = plain_scores(router, hidden).gather(1, routing.expert_ids.long())
    if router.spec.normalize_weights:
        gates = gates / gates.sum(1, keepdim=True)
    assert torch.allclose(routing.weights, gates * router.spec.scaling_factor, atol=1e-6)


def test_groups_go_on_being_ranked_by_as_many_keys_when_tokens_visit_fewer_experts():
    settings = TopKConfig(top_k=4, num_groups=4, top_groups=2)
    assert settings.spec(tiny_config()).keys_of_a_group == 2
    assert settings.fixed(tiny_config(), 2).spec(tiny_config()).keys_of_a_group == 2


@pytest.mark.parametrize(
    ("name", "message"), [("relu", "no scores to rank by"), ("null_experts", "4 null experts")]
)
def test_a_router_whose_scores_rank_no_experts_alone_has_no_other_top_k(name, message):
    kind, options = ROUTERS[name]
    with pytest.raises(ValueError, match=message):
        kind(**options).fixed(tiny_config(), 2)


def test_every_contradiction_is_named_at_once():
    found = "; ".join(
        TopKConfig(top_k=9, score_function="x", scaling_factor=-1).problems(tiny_config())
    )
    for part in ("top_k is 9", "score_function is 'x'", "scaling_factor is -1"):
        assert part in found


# --- routers with a budget ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (TopPConfig, dict(budget=0.0), "router.budget 0"),
        (TopPConfig, dict(budget=9.0), "router.budget 9"),
        (TopPConfig, dict(budget=2.0, max_experts=1), "above router.max_experts 1"),
        (TopPConfig, dict(budget=2.0, initial_top_p=1.5), "router.initial_top_p is 1.5"),
        (TopPConfig, dict(budget=2.0, score_function="relu"), "mode top_p needs scores"),
        (TopPConfig, dict(budget=2.0, budget_unit="watts"), "router.budget_unit is 'watts'"),
        (TopPConfig, dict(budget=2.0, min_experts=9, max_experts=8), "router.min_experts is 9"),
        (ThresholdConfig, dict(budget=2.0, score_function="relu"), "belongs to router=relu"),
        (
            NullExpertsConfig,
            dict(num_null_experts=2, top_k=5, budget=2.5),
            "3 of router.top_k 5 are experts at least",
        ),
        (NullExpertsConfig, dict(num_null_experts=4, top_k=10, budget=9.0), "between 0.1 and 8"),
        (
            NullExpertsConfig,
            dict(top_k=4, num_null_experts=0, budget=2.0),
            "router.num_null_experts is 0",
        ),
        (
            NullExpertsConfig,
            dict(top_k=2, num_null_experts=4, budget=3.0),
            "must be between 0.1 and 2",
        ),
        (ExpertChoiceConfig, dict(top_k=9), "router.top_k is 9"),
    ],
)
def test_contradictory_budgets_are_refused(kind, options, message):
    assert any(message in problem for problem in kind(**options).problems(tiny_config()))


def test_no_expert_at_all_needs_a_shared_one():
    for kind in (ThresholdConfig, ReLUConfig):
        settings = kind(budget=2.0, min_experts=0)
        assert not settings.problems(tiny_config(num_shared_experts=1))
        (problem,) = settings.problems(tiny_config(num_shared_experts=0))
        assert "model.num_shared_experts" in problem


def test_a_budget_in_flops_is_the_same_budget_in_experts():
    config = tiny_config()
    one = 6 * config.hidden_size * config.expert_intermediate_size * len(config.moe_layers)
    router = make(TopPConfig, config, budget=2.5 * one, budget_unit="flops")
    assert router.budget == pytest.approx(2.5)
    assert not TopPConfig(budget=2.5 * one, budget_unit="flops").problems(config)


def test_top_p_grows_with_p():
    router, means = make(TopPConfig, budget=2.0, max_experts=8), []
    for p in (0.1, 0.4, 0.7, 0.99):
        router.router_inputs.value.fill_(p)
        means.append(float((router(tokens(400)).expert_ids >= 0).sum()) / 400)
    assert means == sorted(means) and means[0] < 1.2 and means[-1] > 5


def test_warm_start_is_plain_top_k_whatever_the_mode():
    plain = top_k_router(top_k=2, normalize_weights=False)
    for kind in (TopPConfig, ReLUConfig):
        router = make(kind, budget=2.0)
        router.router_inputs.share.fill_(0.0)
        if kind is TopPConfig:
            assert torch.equal(router(tokens()).expert_ids[:, :2], plain(tokens()).expert_ids)
        assert ((router(tokens()).expert_ids >= 0).sum(1) == 2).all()


def test_expert_choice_fills_every_expert_evenly_in_training_and_uses_its_cuts_outside():
    router = make(ExpertChoiceConfig, top_k=2, max_experts=8)
    assert router(tokens(64)).counts.sum(0).tolist() == [16] * NUM_EXPERTS
    router.eval()
    router.balance_bias.fill_(-0.3)
    routing = router(tokens(64))
    chosen = torch.zeros(64, NUM_EXPERTS + 1, dtype=torch.bool).scatter_(
        1, torch.where(routing.expert_ids < 0, NUM_EXPERTS, routing.expert_ids).long(), True
    )[:, :NUM_EXPERTS]
    assert torch.equal(chosen, plain_scores(router, tokens(64)) > 0.3)
    # A token's experts do not depend on the tokens after it.
    assert torch.equal(router(tokens(64)[:10]).expert_ids, routing.expert_ids[:10])


def test_null_experts_take_ranks_and_leave_no_slot():
    router = make(NullExpertsConfig, top_k=4, num_null_experts=4, budget=2.0)
    routing = router(tokens(200))
    used = (routing.expert_ids >= 0).sum(1)
    assert int(used.sum()) + int(routing.null_count) == 4 * 200 and used.max() > used.min()
    router.router_inputs.value.fill_(50.0)  # their logits: every rank goes to a null expert
    assert int((router(tokens(200)).expert_ids >= 0).sum()) == 0
    router.router_inputs.value.fill_(-50.0)
    assert ((router(tokens(200)).expert_ids >= 0).sum(1) == 4).all()


def test_checkpoints_keep_the_names_and_the_order_of_the_controllers_columns():
    """Every checkpoint holds the buffers `control` and `controller`; code names their columns."""
    router = make(ThresholdConfig, budget=2.0)
    assert {"control", "controller"} <= set(router.state_dict())
    assert router.control.shape == (4,) and router.controller.shape == (7,)
    for i, field in enumerate(router.router_inputs):
        field.fill_(float(i))
    for i, field in enumerate(router.controller_state):
        field.fill_(float(10 + i))
    assert router.state_dict()["control"].tolist() == [0, 1, 2, 3]
    assert router.state_dict()["controller"].tolist() == [10, 11, 12, 13, 14, 15, 16]
    assert RouterInputs._fields == ("value", "share", "fallback_k", "limit")
    assert ControllerState._fields == (
        "theta",
        "error",
        "armed",
        "bad",
        "hold",
        "overload",
        "collapsed",
    )
    layers = RouterInputs.of(torch.stack([router.control, 2 * router.control]))
    assert layers.share.tolist() == [1, 2] and layers.limit.tolist() == [3, 6]


# --- random routing in the first steps --------------------------------------------------------


def warming(kind=TopKConfig, options=None, step: int | None = 0, steps: int = 10) -> Router:
    router = make(kind, **(options or {"top_k": 2})).train()
    router.random_steps, router.layer_idx, router.step = steps, 3, step
    return router


def routed(router: Router, hidden: torch.Tensor, ids: torch.Tensor) -> RouterOutput:
    return router(hidden, RoutingRequest(token_ids=ids))


def test_in_the_first_steps_logits_are_mixed_with_draws_of_their_own_mean_and_spread():
    """As the formula says, with deviates of the same hashes by torch's own normal distribution."""
    hidden, ids = tokens(40), torch.arange(40) * 7 + 1
    router = warming(step=2)
    logits = hidden @ router.weight.detach().T
    uniforms = uniform(token_hash(2, ids).unsqueeze(1), 3 * NUM_EXPERTS + torch.arange(NUM_EXPERTS))
    drawn = torch.distributions.Normal(0.0, 1.0).icdf(uniforms)
    mean = logits.mean(1, keepdim=True)
    spread = (logits - mean).square().mean(1, keepdim=True).sqrt()
    expected = 0.3 * logits + 0.7 * (mean + spread * drawn)
    torch.testing.assert_close(router._warmed(logits, ids), expected, atol=1e-4, rtol=1e-4)
    found = routed(router, hidden, ids)
    order = expected.topk(2).indices
    assert torch.equal(found.expert_ids.long().sort(1).values, order.sort(1).values)
    gates = expected.gather(1, found.expert_ids.long()).softmax(-1)
    torch.testing.assert_close(found.weights, gates, atol=1e-4, rtol=1e-4)


def test_the_draws_belong_to_a_token_a_step_and_a_layer():
    hidden, ids = tokens(40), torch.arange(40)
    whole = routed(warming(), hidden, ids)
    parts = [routed(warming(), hidden[a:b], ids[a:b]) for a, b in ((0, 13), (13, 40))]
    assert torch.equal(torch.cat([p.expert_ids for p in parts]), whole.expert_ids)
    assert torch.equal(torch.cat([p.weights for p in parts]), whole.weights)
    other_layer = warming()
    other_layer.layer_idx = 4
    for other in (warming(step=1), other_layer):
        assert not torch.equal(routed(other, hidden, ids).expert_ids, whole.expert_ids)


@pytest.mark.parametrize("name", ROUTERS)
def test_past_the_first_steps_and_outside_of_training_routing_is_as_ever(name):
    kind, options = ROUTERS[name]
    hidden, ids = tokens(40), torch.arange(40)
    expected = routed(make(kind, **options).train(), hidden, ids)
    for step in (None, 9, 30):
        found = routed(warming(kind, options, step), hidden, ids)
        assert torch.equal(found.expert_ids, expected.expert_ids), step
        assert torch.equal(found.weights, expected.weights), step
    plain = routed(make(kind, **options).eval(), hidden, ids)
    assert torch.equal(routed(warming(kind, options).eval(), hidden, ids).weights, plain.weights)
    warm = routed(warming(kind, options, 0, 1000), hidden, ids)
    assert name == "all_experts" or not torch.equal(warm.expert_ids, expected.expert_ids)


def test_a_router_that_would_flood_one_expert_is_even_at_first_and_still_learns():
    hidden, ids = tokens(2000), torch.arange(2000)
    hidden[:, 0] = 4.0
    router = warming(steps=1000)
    with torch.no_grad():
        router.weight[0, 0] += 5.0
    own = warming(step=None)
    own.load_state_dict(router.state_dict())
    assert float(routed(own, hidden, ids).counts.sum(0).max()) == 2000
    counts = routed(router, hidden, ids).counts.sum(0).float()
    assert float(counts.max() / counts.mean()) < 1.15, counts
    warm = routed(router, hidden, ids)
    warm.weights[:, 0].sum().backward()
    assert router.weight.grad is not None and bool(router.weight.grad.any())
