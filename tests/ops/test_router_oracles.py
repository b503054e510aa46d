"""The router against outsiders: the routers of Megatron-core and DeepSpeed on the same logits agree
with ops.router.route in experts, gates, losses and every gradient. What their conventions do
otherwise stands beside each comparison.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ops.router import RouterOutput, RouteSpec, route
from ops.testing import assert_close

NUM_TOKENS = 101
SCALE = 2.5
# E, K
SHAPES = [(8, 1), (8, 2), (8, 8), (64, 1), (64, 2), (64, 8), (256, 1), (256, 2), (256, 8)]
SEVERAL = [(num_experts, top_k) for num_experts, top_k in SHAPES if top_k > 1]
# E, K, groups, top
GROUPS = [(8, 2, 4, 2), (8, 2, 2, 1), (64, 1, 8, 1), (64, 8, 8, 4), (64, 8, 16, 8), (256, 8, 8, 4)]
BACKENDS = (None, "reference")  # None: the fused op where it can be built


# Imported late: together they take ten seconds, which collecting the tests should not.
def megatron() -> ModuleType:
    return importlib.import_module("megatron.core.transformer.moe.moe_utils")


def deepspeed(module: str) -> ModuleType:
    return importlib.import_module(f"deepspeed.moe.{module}")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_logits(num_experts: int, num_tokens: int = NUM_TOKENS) -> Tensor:
    return (1.5 * normal(num_tokens, num_experts, seed=num_experts)).requires_grad_()


def draw_bias(num_experts: int) -> Tensor:
    return 0.2 * normal(num_experts, seed=1)


def spec_of(num_experts: int, top_k: int, **settings) -> RouteSpec:
    return RouteSpec(num_experts, top_k=top_k, max_experts=top_k, **settings)


def route_apart(logits: Tensor, spec: RouteSpec, **options) -> RouterOutput:
    """route, on logits whose last selected expert is clearly ahead of the next: rounding must not
    decide.
    """
    out = route(logits, spec, **options)
    if spec.top_k < spec.num_experts:
        assert out.margin.min() > 1e-6, "a near-tie: draw other logits"
    return out


def spread(gates: Tensor, expert_ids: Tensor, num_experts: int) -> Tensor:
    """[T, K] gates at their experts -> [T, E]."""
    return gates.new_zeros(len(gates), num_experts).scatter(1, expert_ids.long(), gates)


def balance_loss(counts: Tensor, score_sums: Tensor, num_tokens: int) -> Tensor:
    """E * sum_e f_e * P_e with f the shares of all assignments and P the mean score; summed over
    segments.
    """
    fractions = counts / counts.sum(-1, keepdim=True)
    return (fractions * score_sums / num_tokens).sum() * counts.shape[-1]


def assert_same(
    ours: dict[str, Tensor], oracle: dict[str, Tensor], ours_logits: Tensor, oracle_logits: Tensor
) -> None:
    """Values, the gradient of each with respect to the logits, and the gradient of their sum (of
    [T, E] times a probe).
    """
    assert ours.keys() == oracle.keys()

    def scalars(terms: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {
            name: (term * normal(*term.shape, seed=2)).sum() if term.dim() else term
            for name, term in terms.items()
        }
        # Means over tokens times the number of tokens: as large as the gates' part, so that an
        # error in either shows.
        return found | {
            "sum": sum(found[name] * (1 if terms[name].dim() else NUM_TOKENS) for name in terms)
        }

    for name in ours:
        assert_close(name, ours[name], oracle[name])
    expected = scalars(oracle)
    for name, term in scalars(ours).items():
        (grad,) = torch.autograd.grad(term, ours_logits, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(expected[name], oracle_logits, retain_graph=True)
        if expected_grad.abs().max() > 1e-6:
            assert_close(f"gradient of {name}", grad, expected_grad)
        else:
            # the balance loss is constant where every token takes all experts: what is left is
            # rounding
            assert name in ("balance", "sum") and grad.abs().max() < 1e-6


def terms_of(out: RouterOutput, num_experts: int) -> dict[str, Tensor]:
    num_tokens = len(out.weights)
    return {
        "gates": spread(out.weights, out.expert_ids, num_experts),
        "balance": balance_loss(out.counts, out.score_sums, num_tokens),
        "z": out.z_sum / num_tokens,
    }


# Megatron-core 0.16: moe_utils.topk_routing_with_score_function, switch_load_balancing_loss_func,
# z_loss_func.


def megatron_terms(
    logits: Tensor, top_k: int, function: str, **settings
) -> tuple[dict[str, Tensor], Tensor]:
    """Gates [T, E], both losses, and the routing map. The constant factors are the same as ours:
    Megatron's balance loss is E / (K T^2) * sum_e counts_e * sum_t p_te, and its z-loss a mean over
    tokens.

    Megatron takes the counts of its loss from a top-k of its own, without bias and groups; ours are
    those of the experts that work. The loss function itself takes any counts, so it gets the
    routing map's here.
    """
    gates, routing_map = megatron().topk_routing_with_score_function(
        logits, top_k, score_function=function, **settings
    )
    _, scores = megatron().compute_routing_scores_for_aux_loss(logits, top_k, function)
    balance = megatron().switch_load_balancing_loss_func(
        scores, routing_map.sum(0), len(logits), top_k, logits.shape[1], 1.0
    )
    return {
        "gates": gates,
        "balance": balance,
        "z": megatron().z_loss_func(logits, 1.0),
    }, routing_map


def assert_megatron_agrees(spec: RouteSpec, bias: Tensor | None = None, **settings) -> None:
    logits = draw_logits(spec.num_experts)
    expected, routing_map = megatron_terms(
        logits, spec.top_k, spec.score_function, expert_bias=bias, **settings
    )
    for backend in BACKENDS:
        own = logits.detach().clone().requires_grad_()
        out = route_apart(own, spec, bias=bias, backend=backend)
        assert torch.equal(
            spread(torch.ones_like(out.weights), out.expert_ids, spec.num_experts).bool(),
            routing_map,
        )
        assert torch.equal(out.counts[0], routing_map.sum(0))
        assert_same(terms_of(out, spec.num_experts), expected, own, logits)


@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_softmax_before_top_k_is_megatrons(num_experts, top_k):
    assert_megatron_agrees(
        spec_of(num_experts, top_k, normalize_weights=False), use_pre_softmax=True
    )


# With one expert a softmax over the selected is the constant 1, which ours refuses
# (RouteSpec.problems).
@pytest.mark.parametrize(("num_experts", "top_k"), SEVERAL)
def test_softmax_over_the_selected_is_megatrons(num_experts, top_k):
    assert_megatron_agrees(spec_of(num_experts, top_k), use_pre_softmax=False)


# Megatron divides sigmoids by their sum + 1e-20, which in fp32 is the sum; with one expert it
# leaves them as they are.
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_sigmoid_with_bias_and_scaling_is_megatrons(num_experts, top_k, biased, scale):
    spec = spec_of(
        num_experts,
        top_k,
        score_function="sigmoid",
        normalize_weights=top_k > 1,
        scaling_factor=scale,
    )
    assert_megatron_agrees(spec, draw_bias(num_experts) if biased else None, scaling_factor=scale)


@pytest.mark.parametrize(("num_experts", "top_k", "num_groups", "top_groups"), GROUPS)
@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_group_limited_routing_is_megatrons(num_experts, top_k, num_groups, top_groups, function):
    """With softmax after top-k Megatron adds up logits, not scores, to find the best groups:
    another rule wherever a group counts more than one expert, so softmax stands before top-k here.
    """
    sigmoid = function == "sigmoid"
    spec = spec_of(
        num_experts,
        top_k,
        score_function=function,
        num_groups=num_groups,
        top_groups=top_groups,
        normalize_weights=sigmoid and top_k > 1,
        scaling_factor=SCALE,
    )
    assert_megatron_agrees(
        spec,
        draw_bias(num_experts) if sigmoid else None,
        use_pre_softmax=True,
        num_groups=num_groups,
        group_topk=top_groups,
        scaling_factor=SCALE,
    )


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "top_k"), SEVERAL)
def test_losses_per_sequence_are_megatrons(num_experts, top_k, function):
    """Megatron's router keeps tokens as [S, B], turns sequences into more experts, and divides by
    B; ours keeps sequences side by side, as segments. Its arithmetic from
    TopKRouter._apply_seq_aux_loss, around its own loss function.
    """
    batch, length = 4, 25
    logits = draw_logits(num_experts, batch * length)
    sequences_first = logits.view(batch, length, -1).transpose(0, 1).reshape(batch * length, -1)
    routing_map, scores = megatron().compute_routing_scores_for_aux_loss(
        sequences_first, top_k, function
    )
    expected = {
        "balance": megatron().switch_load_balancing_loss_func(
            scores.reshape(length, -1),
            routing_map.reshape(length, -1).sum(0),
            length,
            top_k,
            num_experts,
            1.0,
        )
        / batch
    }
    for backend in BACKENDS:
        own = logits.detach().clone().requires_grad_()
        out = route_apart(
            own,
            spec_of(num_experts, top_k, score_function=function),
            num_segments=batch,
            backend=backend,
        )
        assert_same(
            {"balance": balance_loss(out.counts, out.score_sums, length) / batch},
            expected,
            own,
            logits,
        )


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "top_k"), SEVERAL)
def test_losses_leave_out_padding_as_megatrons_do(num_experts, top_k, function):
    """Megatron's mask is True at padding, ours at tokens. (Megatron still sends padding to experts;
    ours does not.)
    """
    logits, token_mask = draw_logits(num_experts), normal(NUM_TOKENS, seed=3) > -0.5
    num_valid = int(token_mask.sum())
    routing_map, scores = megatron().compute_routing_scores_for_aux_loss(
        logits, top_k, function, padding_mask=~token_mask
    )
    expected = {
        "balance": megatron().switch_load_balancing_loss_func(
            scores, routing_map.sum(0), num_valid, top_k, num_experts, 1.0
        ),
        "z": megatron().z_loss_func(logits, 1.0, padding_mask=~token_mask),
    }
    for backend in BACKENDS:
        own = logits.detach().clone().requires_grad_()
        out = route(
            own,
            spec_of(num_experts, top_k, score_function=function),
            token_mask=token_mask,
            backend=backend,
        )
        assert_same(
            {
                "balance": balance_loss(out.counts, out.score_sums, num_valid),
                "z": out.z_sum / num_valid,
            },
            expected,
            own,
            logits,
        )


@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_rows_stand_in_the_order_of_megatrons_permutation(num_experts, top_k):
    logits = draw_logits(num_experts).detach()
    expected, routing_map = megatron_terms(logits, top_k, "softmax", use_pre_softmax=True)
    _, row_gates, row_tokens = megatron().permute(logits, routing_map, expected["gates"])
    for backend in BACKENDS:
        out = route_apart(
            logits, spec_of(num_experts, top_k, normalize_weights=False), backend=backend
        )
        assert torch.equal(out.slots.long() // top_k, row_tokens)
        assert_close("gates of the rows", out.weights.flatten()[out.slots.long()], row_gates)


# DeepSpeed 0.19, AutoEP: ep_router.TokenChoiceTopKRouter. It has no losses. It divides by the sum +
# 1e-20: the sum, in fp32.


def assert_autoep_agrees(
    spec: RouteSpec, bias: Tensor | None = None, group_score: str = "top2_sum"
) -> None:
    grouped = spec.num_groups > 1
    router = deepspeed("ep_router").TokenChoiceTopKRouter(
        1,
        spec.num_experts,
        spec.num_groups if grouped else None,
        spec.top_groups if grouped else None,
        spec.top_k,
        spec.score_function,
        spec.normalize_weights,
        spec.scaling_factor,
        gate_bias=False,
        group_score_func=group_score,
    )
    router.gate = torch.nn.Identity()  # the input is the logits
    logits = draw_logits(spec.num_experts)
    gates, expert_ids, counts = router(logits, bias)
    for backend in BACKENDS:
        own = logits.detach().clone().requires_grad_()
        out = route_apart(own, spec, bias=bias, backend=backend)
        # its order is free
        assert torch.equal(out.expert_ids.sort(dim=1).values.long(), expert_ids.sort(dim=1).values)
        assert torch.equal(out.counts[0], counts.long())
        assert_same(
            {"gates": spread(out.weights, out.expert_ids, spec.num_experts)},
            {"gates": spread(gates, expert_ids, spec.num_experts)},
            own,
            logits,
        )


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
def test_biased_top_k_is_that_of_deepspeeds_autoep(num_experts, top_k, normalize, function):
    spec = spec_of(
        num_experts,
        top_k,
        score_function=function,
        normalize_weights=normalize and top_k > 1,
        scaling_factor=SCALE,
    )
    assert_autoep_agrees(spec)
    assert_autoep_agrees(spec, draw_bias(num_experts))


# A group counts its best two experts, or its best, in AutoEP; ours counts top_k / top_groups, so
# only those cases compare.
@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "top_k", "num_groups", "top_groups"), GROUPS)
def test_group_limited_routing_is_that_of_deepspeeds_autoep(
    num_experts, top_k, num_groups, top_groups, function
):
    spec = spec_of(
        num_experts,
        top_k,
        score_function=function,
        normalize_weights=top_k > 1,
        scaling_factor=SCALE,
        num_groups=num_groups,
        top_groups=top_groups,
    )
    assert_autoep_agrees(
        spec, draw_bias(num_experts), "top2_sum" if top_k == 2 * top_groups else "max"
    )


# transformers 5: the routers of DeepSeek-V3 (a group counts its best two biased scores) and
# DeepSeek-V2 (its best one), whatever top_k and top_groups are.

TRANSFORMERS_GROUPS = [(16, 6, 4, 2), (64, 6, 8, 3), (64, 8, 8, 4), (64, 4, 8, 4), (256, 8, 8, 4)]


def assert_deepseek_agrees(version: str, settings: dict, spec: RouteSpec, bias: Tensor | None):
    """The rows of the router's weight are unit vectors, so its input is the logits."""
    configuration, modeling = (
        importlib.import_module(f"transformers.models.deepseek_{version}.{kind}_deepseek_{version}")
        for kind in ("configuration", "modeling")
    )
    name = f"Deepseek{version.upper()}"
    config = getattr(configuration, f"{name}Config")(
        hidden_size=spec.num_experts,
        num_attention_heads=1,
        n_routed_experts=spec.num_experts,
        num_experts_per_tok=spec.top_k,
        n_group=spec.num_groups,
        topk_group=spec.top_groups,
        routed_scaling_factor=SCALE,
        **settings,
    )
    router = getattr(modeling, f"{name}TopkRouter")(config)
    torch.nn.init.eye_(router.weight)
    if bias is not None:
        router.e_score_correction_bias.copy_(bias)
    logits = draw_logits(spec.num_experts)
    _, gates, expert_ids = router(logits)
    for backend in BACKENDS:
        own = logits.detach().clone().requires_grad_()
        out = route_apart(own, spec, bias=bias, backend=backend)
        # its order is free
        assert torch.equal(out.expert_ids.sort(dim=1).values.long(), expert_ids.sort(dim=1).values)
        assert_same(
            {"gates": spread(out.weights, out.expert_ids, spec.num_experts)},
            {"gates": spread(gates, expert_ids, spec.num_experts)},
            own,
            logits,
        )


@pytest.mark.parametrize(("num_experts", "top_k", "num_groups", "top_groups"), TRANSFORMERS_GROUPS)
@pytest.mark.parametrize("level", [0.0, -3.0], ids=["keys", "keys below zero"])
def test_groups_ranked_by_two_biased_keys_are_deepseek_v3s(
    num_experts, top_k, num_groups, top_groups, level
):
    spec = spec_of(
        num_experts,
        top_k,
        score_function="sigmoid",
        num_groups=num_groups,
        top_groups=top_groups,
        group_keys=2,
        scaling_factor=SCALE,
    )
    bias = draw_bias(num_experts) + level
    assert_deepseek_agrees("v3", {"norm_topk_prob": True}, spec, bias)


@pytest.mark.parametrize(("num_experts", "top_k", "num_groups", "top_groups"), TRANSFORMERS_GROUPS)
def test_groups_ranked_by_their_best_key_are_deepseek_v2s(
    num_experts, top_k, num_groups, top_groups
):
    spec = spec_of(
        num_experts,
        top_k,
        num_groups=num_groups,
        top_groups=top_groups,
        group_keys=1,
        normalize_weights=False,
        scaling_factor=SCALE,
    )
    settings = {"topk_method": "group_limited_greedy", "norm_topk_prob": False}
    assert_deepseek_agrees("v2", settings, spec, None)


# DeepSpeed 0.19, sharded_moe: gates with capacity off (drop_tokens=False), in the sparse form.


def assert_sharded_moe_agrees(
    spec: RouteSpec, gate: str, *arguments, balance_slots: int, **options
) -> None:
    """Gates return l_aux, capacity, E, ids, locations, gates (each [K, T]), counts. l_aux is E *
    sum_e f_e * P_e, as ours, over the first `balance_slots` choices: all of them (topkgating
    divides by K), but only the first in top2gating.
    """
    logits = draw_logits(spec.num_experts)
    loss, _, _, expert_ids, locations, gates, counts = getattr(deepspeed("sharded_moe"), gate)(
        logits, *arguments, drop_tokens=False, sparse_routes=True, **options
    )
    expected = {"gates": spread(gates.t(), expert_ids.t(), spec.num_experts), "balance": loss}
    for backend in BACKENDS:
        own = logits.detach().clone().requires_grad_()
        out = route_apart(own, spec, backend=backend)
        assert torch.equal(out.expert_ids, expert_ids.t())  # both in rank order
        assert torch.equal(out.counts[0], counts)
        # top2gating places second choices behind all first ones; the others by token
        if balance_slots == spec.top_k:
            rows = out.inverse - out.offsets[out.expert_ids.long()]
            assert torch.equal(rows, locations.t())
        balance_counts = torch.bincount(
            out.expert_ids[:, :balance_slots].flatten(), minlength=spec.num_experts
        )
        assert_same(
            {
                "gates": spread(out.weights, out.expert_ids, spec.num_experts),
                "balance": balance_loss(balance_counts, out.score_sums, NUM_TOKENS),
            },
            expected,
            own,
            logits,
        )


# topkgating and top2gating keep the divisor above fp32's epsilon, which no sum of selected scores
# here comes near.
@pytest.mark.parametrize(("num_experts", "top_k"), SEVERAL)
def test_top_k_with_its_loss_and_rows_is_deepspeeds_topkgating(num_experts, top_k):
    assert_sharded_moe_agrees(
        spec_of(num_experts, top_k), "topkgating", top_k, 1.0, 0, balance_slots=top_k
    )


@pytest.mark.parametrize("num_experts", [8, 64, 256])
def test_two_experts_with_their_loss_are_deepspeeds_top2gating(num_experts):
    assert_sharded_moe_agrees(
        spec_of(num_experts, 2),
        "top2gating",
        1.0,
        0,
        balance_slots=1,
        top2_2nd_expert_sampling=False,
    )


@pytest.mark.parametrize("num_experts", [8, 64, 256])
def test_one_expert_with_its_loss_is_deepspeeds_top1gating(num_experts):
    assert_sharded_moe_agrees(
        spec_of(num_experts, 1, normalize_weights=False),
        "top1gating",
        1.0,
        0,
        balance_slots=1,
        use_rts=False,
    )
