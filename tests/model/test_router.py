"""Routers: what every router promises, and what top-k adds."""

from __future__ import annotations

import pytest
import torch
from common import tiny_config

from model.parallel import ParallelGroups
from model.routers.top_k import TopKRouter

NUM_EXPERTS, HIDDEN_SIZE = 8, 16
BOTH = pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])

# Arguments by name; every router runs through the tests that take `router`.
ROUTERS = {
    "softmax": dict(top_k=2),
    "softmax_raw": dict(top_k=3, normalize_weights=False),
    "sigmoid": dict(top_k=2, score_function="sigmoid", scaling_factor=2.5),
    "switch": dict(top_k=1, normalize_weights=False),
    "all_experts": dict(top_k=NUM_EXPERTS),
}


def top_k_router(**options) -> TopKRouter:
    router = TopKRouter(tiny_config(), ParallelGroups.single(), 0, **options)
    torch.nn.init.normal_(router.weight, 0.0, 0.5, generator=torch.Generator().manual_seed(0))
    return router


@pytest.fixture(params=ROUTERS)
def router(request):
    return top_k_router(**ROUTERS[request.param])


def tokens(count: int = 50, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def plain_scores(router: TopKRouter, hidden: torch.Tensor) -> torch.Tensor:
    logits = hidden @ router.weight.T
    return logits.exp() / logits.exp().sum(-1, keepdim=True) if router.score_function == "softmax" else \
        1 / (1 + (-logits).exp())


# --- every router ----------------------------------------------------------------------------------------------------

def test_ids_are_in_range_and_differ_within_a_token(router):
    routing = router(tokens())
    assert routing.expert_ids.shape == routing.weights.shape == (50, router.max_top_k)
    for ids in routing.expert_ids.tolist():
        used = [i for i in ids if i != -1]
        assert used and len(set(used)) == len(used) and all(0 <= i < NUM_EXPERTS for i in used)


def test_unused_slots_have_zero_weight_and_used_slots_a_positive_one(router):
    mask = torch.arange(50) % 3 != 0
    routing = router(tokens(), mask)
    assert (routing.weights[routing.expert_ids < 0] == 0).all()
    assert (routing.weights[routing.expert_ids >= 0] > 0).all()


def test_masked_tokens_visit_no_expert_and_leave_the_others_alone(router):
    mask = torch.arange(50) % 3 != 0
    routing, unmasked = router(tokens(), mask), router(tokens())
    assert (routing.expert_ids[~mask] == -1).all() and (routing.weights[~mask] == 0).all()
    assert torch.equal(routing.expert_ids[mask], unmasked.expert_ids[mask])
    assert torch.equal(routing.weights[mask], unmasked.weights[mask])


def test_gradients_of_gates_reach_the_router_and_its_input(router):
    if router.max_top_k == NUM_EXPERTS:  # all gates sum to 1: only their differences carry a gradient
        probe = torch.randn(50, router.max_top_k, generator=torch.Generator().manual_seed(2))
    else:
        probe = torch.arange(1.0, router.max_top_k + 1).expand(50, -1)
    hidden = tokens().requires_grad_()
    (router(hidden).weights * probe).sum().backward()
    assert (router.weight.grad.norm(dim=1) > 0).all() and (hidden.grad.norm(dim=1) > 0).all()


def test_masked_tokens_give_no_gradient(router):
    mask = torch.arange(50) % 2 == 0
    hidden = tokens().requires_grad_()
    probe = torch.randn(50, router.max_top_k, generator=torch.Generator().manual_seed(2))
    (router(hidden, mask).weights * probe).sum().backward()
    assert (hidden.grad[~mask] == 0).all() and (hidden.grad[mask].norm(dim=1) > 0).all()


def test_scores_and_log_z_follow_their_definition(router):
    hidden = tokens()
    routing = router(hidden)
    torch.testing.assert_close(routing.scores, plain_scores(router, hidden))
    torch.testing.assert_close(routing.log_z, (hidden @ router.weight.T).exp().sum(-1).log())


def test_no_tokens_are_routed_to_nothing(router):
    routing = router(tokens(0), torch.empty(0, dtype=torch.bool))
    assert routing.expert_ids.shape == routing.weights.shape == (0, router.max_top_k)
    assert routing.scores.shape == (0, NUM_EXPERTS) and routing.log_z.shape == (0,)
    routing.weights.sum().backward()
    assert (router.weight.grad == 0).all()


def test_gates_are_computed_in_fp32_whatever_the_model_uses(router):
    router, hidden = router.to(torch.bfloat16), tokens().to(torch.bfloat16)
    routing = router(hidden)
    assert {t.dtype for t in (routing.weights, routing.scores, routing.log_z)} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(routing.scores, plain_scores(router.float(), hidden.float()))


# --- top-k -----------------------------------------------------------------------------------------------------------

@BOTH
@pytest.mark.parametrize("scaling_factor", [1.0, 2.5])
def test_normalised_gates_sum_to_the_scaling_factor(score_function, scaling_factor):
    router = top_k_router(top_k=3, score_function=score_function, scaling_factor=scaling_factor)
    torch.testing.assert_close(router(tokens()).weights.sum(-1), torch.full((50,), scaling_factor))


@BOTH
@pytest.mark.parametrize("normalize_weights", [True, False])
def test_the_highest_scores_win_and_become_the_gates(score_function, normalize_weights):
    router = top_k_router(top_k=3, score_function=score_function, normalize_weights=normalize_weights,
                          scaling_factor=1.5)
    hidden = tokens()
    routing = router(hidden)
    for t, scores in enumerate(plain_scores(router, hidden).tolist()):
        chosen = sorted(range(NUM_EXPERTS), key=lambda e: -scores[e])[:3]
        total = sum(scores[e] for e in chosen) if normalize_weights else 1.0
        assert routing.expert_ids[t].tolist() == chosen
        assert routing.weights[t].tolist() == pytest.approx([1.5 * scores[e] / total for e in chosen], rel=1e-5)


@BOTH
def test_ties_go_to_the_lower_expert_id(score_function):
    router = top_k_router(top_k=3, score_function=score_function)
    with torch.no_grad():
        router.weight.zero_()
        assert (router(tokens()).expert_ids == torch.arange(3)).all()
        router.weight[[6, 2, 5]] = 0.01  # three equal winners, as the input is positive; small, or sigmoid saturates
        hidden = tokens().abs()
        assert (router(hidden).expert_ids == torch.tensor([2, 5, 6])).all()
        router.weight[4] = 0.02
        assert (router(hidden).expert_ids[:, 0] == 4).all()
        many = TopKRouter(tiny_config(num_experts=128), ParallelGroups.single(), 0, top_k=8)
        torch.nn.init.zeros_(many.weight)
        assert (many(tokens()).expert_ids == torch.arange(8)).all()


@BOTH
def test_the_bias_changes_the_selection_but_never_the_gates(score_function):
    router, hidden = top_k_router(top_k=2, score_function=score_function, scaling_factor=2.0), tokens()
    before = router(hidden)
    router.balance_bias[5], router.balance_bias[0] = 10.0, -10.0
    after = router(hidden)
    assert (after.expert_ids[:, 0] == 5).all() and not (after.expert_ids == 0).any()
    assert not torch.equal(after.expert_ids, before.expert_ids)
    assert torch.equal(after.scores, before.scores) and torch.equal(after.log_z, before.log_z)
    chosen = before.scores.gather(1, after.expert_ids)
    torch.testing.assert_close(after.weights, 2.0 * chosen / chosen.sum(-1, keepdim=True))


def test_a_common_shift_of_the_bias_changes_nothing():
    router, hidden = top_k_router(top_k=2), tokens()
    before = router(hidden)
    router.balance_bias += 0.5
    assert torch.equal(router(hidden).expert_ids, before.expert_ids)


def test_the_bias_is_saved_but_not_trained():
    router = top_k_router(top_k=2)
    assert "balance_bias" in router.state_dict() and not router.balance_bias.requires_grad


@pytest.mark.parametrize(("options", "message"), [
    (dict(top_k=1), "router.normalize_weights with router.top_k=1"),
    (dict(top_k=NUM_EXPERTS + 1), "router.top_k is 9; it must be between 1 and model.num_experts 8"),
    (dict(top_k=0, normalize_weights=False), "router.top_k is 0"),
    (dict(top_k=2, score_function="tanh"), "router.score_function is 'tanh'"),
    (dict(top_k=2, scaling_factor=0.0), "router.scaling_factor is 0.0"),
])
def test_contradictory_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        top_k_router(**options)
    (problem,) = TopKRouter.problems(tiny_config(), **options)
    assert message in problem


def test_every_contradiction_is_named_at_once():
    with pytest.raises(ValueError, match=r"top_k is 9.*score_function is 'x'.*scaling_factor is -1"):
        top_k_router(top_k=9, score_function="x", scaling_factor=-1)
