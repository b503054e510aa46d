"""Metrics that need tokens: margins, gates, co-activation, of hand-made routings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from model.config import ModelConfig
from model.moe.balance import LayerStats
from model.routers.config import TopPConfig
from ops.router import RouteSpec, route
from train.observe.routing import (
    RouterTables,
    concentration,
    correlation,
    entropy_ratio,
    mean_details,
    router_similarity,
    routing_details,
    routing_metrics,
    tile_padding,
    tile_rows_of,
)


def routing_of(ids: list[list[int]], num_experts: int = 4, logits: torch.Tensor | None = None):
    spec = RouteSpec(num_experts, "given", max_experts=len(ids[0]), normalize_weights=False)
    logits = torch.zeros(len(ids), num_experts) if logits is None else logits
    return route(logits, spec, given_ids=torch.tensor(ids))


def test_experts_chosen_together_always_or_independently_show():
    always = mean_details(routing_details((routing_of([[0, 1], [2, 3]] * 8),)))
    # 0-1 and 2-3: twice; the others never
    assert always["moe/co_activation"] == pytest.approx((2 * 1 + 4 * 1) / 6)
    both = routing_of([[a, b] for a in (0, 1) for b in (2, 3)])
    independent = mean_details(routing_details((both,)))
    # only 0-1 and 2-3 never meet
    assert independent["moe/co_activation"] == pytest.approx((4 * 0 + 2 * 1) / 6)


def test_gates_margins_and_log_z_follow_their_definition():
    logits = torch.randn(101, 4, generator=torch.Generator().manual_seed(0))
    routing = route(logits, RouteSpec(4, "top_k", top_k=2, max_experts=2))
    found = mean_details(routing_details((routing,)))
    ranked = logits.softmax(-1).sort(descending=True).values
    assert found["moe/gate_sum"] == pytest.approx(1.0)
    assert found["moe/gate_top1_share"] == pytest.approx(
        float((ranked[:, 0] / ranked[:, :2].sum(1)).mean()), rel=1e-5
    )
    assert found["moe/margin_p50"] == pytest.approx(
        float((ranked[:, 1] - ranked[:, 2]).median()), rel=1e-4
    )
    assert found["moe/log_z_max"] == pytest.approx(float(logits.logsumexp(-1).max()), rel=1e-6)


def test_layers_without_assignments_are_left_out():
    assert routing_details((routing_of([[-1, -1], [-1, -1]]),)) == [] == routing_details(())
    assert mean_details([]) == {}


def test_concentration_is_0_when_even_1_when_all_go_to_the_same_and_0_when_all_are_visited():
    counts = torch.tensor([[8.0, 8, 8, 8], [16, 16, 0, 0], [8, 8, 8, 8], [20, 4, 4, 4]])
    found = concentration(counts, torch.tensor([2.0, 2.0, 4.0, 1.0]))
    assert found.tolist() == pytest.approx([0, 1, 0, (20 / 32 - 1 / 4) / (3 / 4)])


def test_load_entropy_and_correlation_follow_their_definition():
    counts = torch.tensor([[5.0, 5, 5, 5], [20, 0, 0, 0]], dtype=torch.float64)
    assert entropy_ratio(counts).tolist() == pytest.approx([1, 0])
    bias = torch.tensor([[1.0, 2, 3, 4], [-3, 1, 1, 1]], dtype=torch.float64)
    assert correlation(bias, counts).tolist() == pytest.approx([0, -1])


def test_router_similarity_is_the_mean_cosine_of_pairs_of_experts():
    # four experts and a null expert
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    router = SimpleNamespace(spec=SimpleNamespace(num_experts=4), weight=weight)
    rows = torch.nn.functional.normalize(weight[:4], dim=1)
    cosines = [float(rows[i] @ rows[j]) for i in range(4) for j in range(4) if i != j]
    assert router_similarity([router]).tolist() == pytest.approx(
        [sum(cosines) / len(cosines)], rel=1e-4
    )
    assert router_similarity([SimpleNamespace(spec=router.spec, weight=torch.empty(0))]) is None


def test_tile_padding_is_the_share_of_rows_without_an_assignment():
    layers = [
        SimpleNamespace(counts=torch.tensor([counts]))
        for counts in ([1, 64, 65, 0], [128, 0, 0, 0])
    ]
    assert tile_padding(tile_rows_of(layers, 64)) == {
        "perf/tile_padding": pytest.approx(1 - 258 / (64 + 64 + 128 + 128))
    }
    assert tile_padding(tile_rows_of((), 64)) == {}


def test_what_the_controllers_hold_is_reported_as_it_stands():
    """Two layers by hand: 4 tokens over 2 experts and 1 null expert, budget 1.5, two ranks of one
    expert each.
    """
    config = ModelConfig(
        vocab_size=8,
        hidden_size=4,
        num_layers=2,
        num_heads=1,
        num_kv_heads=1,
        intermediate_size=4,
        num_experts=2,
        expert_intermediate_size=3,
        max_seq_len=8,
        num_shared_experts=1,
    )
    routers = [TopPConfig(budget=1.5, num_null_experts=1).build(config) for _ in range(2)]
    for i, router in enumerate(routers):
        router.balance_bias[:2] = torch.tensor([1.0, -1.0]) * (i + 1)
        router.router_inputs.share.fill_(0.5 + 0.5 * i)
        router.router_inputs.value.fill_(0.25 + 0.5 * i)
        router.controller_state.theta.fill_(0.1 * i)
        router.controller_state.hold.fill_(3.0 * (1 - i))
        router.controller_state.collapsed.fill_(1.0 - i)
    counts = torch.tensor([[3, 1], [1, 4]])
    stats = LayerStats(
        counts,
        torch.tensor([[1, 2, 1], [0, 3, 1]]),
        torch.zeros(2, 8, dtype=torch.int64),
        torch.tensor([4, 0]),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, 2),
        torch.zeros(2, 2, 0),
    )
    shares = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    tables = RouterTables.of(routers, routers[0])
    found = routing_metrics(stats, tables, routers[0], config, shares, detailed=True)
    by_hand = {
        "null_fraction": (4 / 8, 0.0),
        "theta": (0.0, 0.1),
        "mode_share": (0.5, 1.0),
        "top_p": (0.25, 0.75),
        "bias_range": (2.0, 4.0),
        "bias_rms": (1.0, 2.0),
        "bias_load_correlation": (1.0, -1.0),
        "rank_load": (3 / 2, 4 / 2.5),
        "experts_per_token": (4 / 4, 5 / 4),
        "budget_error": (1 / 1.5 - 1, 1.25 / 1.5 - 1),
        "experts_per_token_std": ((2 / 4) ** 0.5, (7 / 4 - 25 / 16) ** 0.5),
        "max_vio": (0.5, 0.6),
        "min_vio": (0.5, 0.6),
    }
    for name, (first, second) in by_hand.items():
        assert [found[f"moe/{name}/layer_0"], found[f"moe/{name}/layer_1"]] == pytest.approx(
            [first, second]
        ), name
        assert found[f"moe/{name}"] == pytest.approx((first + second) / 2), name
        assert found[f"moe/{name}/max"] == pytest.approx(max(first, second)), name
    assert found["moe/layers_in_fallback"] == 1 and found["moe/layers_collapsed"] == 1
    assert found["moe/expert_flops_per_token"] == pytest.approx(6 * 4 * 3 * (1 + 1.25))
