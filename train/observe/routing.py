"""The numbers people watch about routing, from the integer statistics of an interval and the
routers' own state.

Names: moe/<metric> is the mean over MoE layers, moe/<metric>/max the largest,
moe/<metric>/layer_<l> that of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from model.config import ModelConfig
from model.moe.balance import LayerStats, balance_metrics, busiest_experts, rank_loads
from model.routers.base import Router
from model.routers.state import ControllerState, RouterInputs
from ops.router import Reason, RouterOutput
from train.observe.catalogue.names import BY_LAYER, SMALL_IS_BAD

FAIL_SAFES = ("nonfinite", "empty", "overridden", "frozen", "overloaded")
"""What no healthy layer needs. "overridden" is the warm start, too. Not the overflow of a capacity
or a tile, which was asked for: what it costs is moe/dropped."""


class RouterTables(NamedTuple):
    """What routers hold, [L, ...] fp64, a row for each MoE layer."""

    control: torch.Tensor
    """[L, 4] model.routers.state.RouterInputs."""
    controller: torch.Tensor
    """[L, 7] model.routers.state.ControllerState."""
    bias: torch.Tensor
    """[L, E] of the selection of experts."""
    similarity: torch.Tensor | None
    """[L] router_similarity."""

    @staticmethod
    def of(routers: list[Router], kind: Router) -> RouterTables:
        """kind: what these have in common with those of other stages, where there may be none."""
        num_experts = kind.spec.num_experts

        def rows(buffers: list[torch.Tensor], width: int) -> torch.Tensor:
            found = torch.stack(buffers) if buffers else torch.zeros(0, width)
            return found.double()

        return RouterTables(
            rows([r.control for r in routers], kind.control.numel()),
            rows([r.controller for r in routers], kind.controller.numel()),
            rows([r.balance_bias[:num_experts] for r in routers], num_experts),
            router_similarity(routers) if num_experts > 1 else None,
        )


def routing_metrics(
    stats: LayerStats,
    tables: RouterTables,
    first: Router,
    model: ModelConfig,
    shares: torch.Tensor | None,
    detailed: bool = False,
) -> dict[str, float]:
    """Scalars of an interval. stats: on the host, over all ranks and steps of the interval, one row
    per MoE layer. tables: on the host, of all layers; first: any of the routers.
    detailed: write every metric for every layer."""
    tokens = stats.tokens.double().clamp_min(1)
    counts = stats.counts.double()
    mean = counts.mean(1).clamp_min(1e-9)
    k = torch.arange(stats.k_histogram.shape[1], dtype=torch.float64)
    experts = counts.sum(1) / tokens
    by_layer: dict[str, torch.Tensor] = {
        "max_vio": counts.max(1).values / mean - 1,
        "min_vio": 1 - counts.min(1).values / mean,
        "experts_per_token": experts,
        "experts_per_token_std": (
            (stats.k_histogram * k.square()).sum(1) / tokens - experts.square()
        )
        .clamp_min(0)
        .sqrt(),
        "router_entropy": stats.entropy / tokens / math.log(max(2, first.spec.num_columns)),
        "load_entropy_ratio": entropy_ratio(counts),
        "dead_fraction": (counts < 0.05 * mean.unsqueeze(1)).double().mean(1),
        "concentration": concentration(counts, experts),
    }
    if tables.similarity is not None:
        by_layer["router_similarity"] = tables.similarity
    if shares is not None:
        load = rank_loads(counts, shares)
        by_layer["rank_load"] = load.max(1).values / load.mean(1).clamp_min(1e-9)
    if first.spec.num_null_experts:
        by_layer["null_fraction"] = stats.null_count / (stats.null_count + counts.sum(1)).clamp_min(
            1
        )
    inputs = RouterInputs.of(tables.control)
    state = ControllerState.of(tables.controller)
    bias = tables.bias
    if first.budget is not None:
        by_layer["budget_error"] = experts / first.target - 1
        by_layer["theta"] = state.theta
        by_layer["mode_share"] = inputs.share
        if first.law == "top_p":
            by_layer["top_p"] = inputs.value
    if bool((bias != 0).any()):
        by_layer["bias_range"] = bias.max(1).values - bias.min(1).values
        by_layer["bias_rms"] = (bias - bias.mean(1, keepdim=True)).square().mean(1).sqrt()
        by_layer["bias_load_correlation"] = correlation(bias, counts)
    found: dict[str, float] = balance_metrics(stats.counts, model.moe_layers)
    found |= spread_over_layers(by_layer, model.moe_layers, detailed)
    all_tokens = float(tokens.sum())
    for reason in Reason:
        found[f"moe/fallback/{str(reason.name).lower()}"] = (
            float(stats.reasons[:, reason.bit].sum()) / all_tokens
        )
    # Without min_experts a token may choose no expert, which is no fallback then.
    found["moe/empty"] = found["moe/fallback/empty"]
    if first.spec.min_experts == 0:
        found["moe/fallback/empty"] = 0.0
    found["moe/fallback_rate"] = sum(found[f"moe/fallback/{name}"] for name in FAIL_SAFES)
    found["moe/layers_in_fallback"] = int((state.hold > 0).sum())
    found["moe/layers_collapsed"] = int((state.collapsed > 0).sum())
    found["moe/expert_flops_per_token"] = (
        6.0 * model.hidden_size * model.expert_intermediate_size * float(experts.sum())
    )
    return found


def spread_over_layers(
    by_layer: Mapping[str, torch.Tensor], layers: Sequence[int], detailed: bool
) -> dict[str, float]:
    """[L] values by metric -> scalars: mean, largest, some smallest, and single layers where asked
    for.
    """
    found = {}
    for name, values in by_layer.items():
        found[f"moe/{name}"] = float(values.mean())
        found[f"moe/{name}/max"] = float(values.max())
        if name in SMALL_IS_BAD:
            found[f"moe/{name}/min"] = float(values.min())
        if detailed or name in BY_LAYER:
            found |= {
                f"moe/{name}/layer_{layer}": float(v)
                for layer, v in zip(layers, values, strict=True)
            }
    return found


def entropy_ratio(counts: torch.Tensor) -> torch.Tensor:
    """[L, E] -> [L]: entropy of the load over ln E, 1 is even."""
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    return -(share * share.clamp_min(1e-30).log()).sum(1) / math.log(max(2, counts.shape[1]))


def concentration(counts: torch.Tensor, experts_per_token: torch.Tensor) -> torch.Tensor:
    """[L, E], [L] -> [L]: (s - k/E) / (1 - k/E), s the share of the assignments of the busiest k
    experts, k the rounded mean of experts per token: 0 is even, 1 when every token goes to the same
    ones; 0 where all experts are visited anyway.
    """
    num_experts = counts.shape[1]
    k, most, total = busiest_experts(counts, experts_per_token)
    share = most / total.clamp_min(1)
    even = k / num_experts
    return torch.where(k < num_experts, (share - even) / (1 - even).clamp_min(1e-9), 0.0).clamp_min(
        0
    )


def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[L, E], [L, E] -> [L]: over the experts; 0 where one of them is constant."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    size = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(size > 0, (a * b).sum(1) / size.clamp_min(1e-30), 0.0)


@torch.no_grad()
def router_similarity(routers: list[Router]) -> torch.Tensor | None:
    """[L]: mean cosine of pairs of experts' rows of the router; None where ZeRO-3 keeps only parts
    of them here.
    """
    found = []
    for router in routers:
        num_experts = router.spec.num_experts
        if router.weight.dim() != 2 or len(router.weight) < num_experts or num_experts < 2:
            return None
        rows = torch.nn.functional.normalize(router.weight[:num_experts].float(), dim=1)
        found.append((rows.sum(0).square().sum() - num_experts) / (num_experts * (num_experts - 1)))
    return torch.stack(found).double() if found else torch.zeros(0, dtype=torch.float64)


def routing_tables(stats: LayerStats) -> dict[str, Any]:
    """What routing.jsonl keeps per MoE layer: assignments by expert, tokens by number of experts,
    tokens by reason.
    """
    return {
        "counts": stats.counts.tolist(),
        "k_histogram": stats.k_histogram.tolist(),
        "reasons": stats.reasons.tolist(),
    }


def tile_rows_of(routings: Sequence[RouterOutput], rows: int) -> list[tuple[int, int]]:
    """Of every layer, how many rows belong to an assignment, and how many stand in tiles of `rows`
    that have some.
    """
    counts = [routing.counts.sum(0) for routing in routings]
    return [(int(c.sum()), int((-(-c // rows) * rows).sum())) for c in counts]


def tile_padding(layers: Sequence[tuple[int, int]]) -> dict[str, float]:
    """perf/tile_padding: share of the rows in tiles that belong to no assignment, from what
    tile_rows_of gave for all layers; {} without any.
    """
    if not layers:
        return {}
    assigned, filled = (sum(column) for column in zip(*layers, strict=True))
    return {"perf/tile_padding": 1 - assigned / max(filled, 1)}


def mean_details(layers: Sequence[dict[str, float]]) -> dict[str, float]:
    """moe/<name>, the mean over layers of what routing_details gave for each."""
    names = layers[0] if layers else ()
    return {f"moe/{name}": sum(layer[name] for layer in layers) / len(layers) for name in names}


@torch.no_grad()
def routing_details(routings: tuple[RouterOutput, ...]) -> list[dict[str, float]]:
    """What needs tokens instead of sums: of one rank's last micro-batch, so a sample, for each MoE
    layer that some token visits.

    margin_p05, margin_p50: quantiles over tokens of the key of the last selected minus that of the
        first not selected.
    log_z_p99, log_z_max: of the log-sum-exp of the logits.
    gate_sum, gate_top1_share, gate_rms: of the gates of a token.
    co_activation: mean over pairs of experts of |P(both) / (P(one) P(other)) - 1|: 0 where experts
        are chosen independently.
    """
    found: list[dict[str, float]] = []
    for routing in routings:
        visiting = (routing.expert_ids >= 0).any(1)
        if not bool(visiting.any()):
            continue
        weights, margin, log_z = (
            routing.weights[visiting].float(),
            routing.margin[visiting],
            routing.log_z[visiting].float(),
        )
        num_experts = routing.counts.shape[1]
        chosen = torch.zeros(len(visiting), num_experts + 1, device=weights.device)
        chosen.scatter_(
            1, torch.where(routing.expert_ids < 0, num_experts, routing.expert_ids).long(), 1.0
        )
        chosen = chosen[visiting, :num_experts]
        alone = chosen.mean(0)
        together, expected = chosen.T @ chosen / len(chosen), torch.outer(alone, alone)
        pairs = ~torch.eye(num_experts, dtype=torch.bool, device=weights.device) & (expected > 0)
        sums = weights.sum(1)
        quantiles = (
            margin.float().quantile(torch.tensor([0.05, 0.5], device=margin.device)).tolist()
        )
        values = {
            "margin_p05": quantiles[0],
            "margin_p50": quantiles[1],
            "log_z_p99": float(log_z.quantile(0.99)),
            "log_z_max": float(log_z.max()),
            "gate_sum": float(sums.mean()),
            "gate_top1_share": float((weights.max(1).values / sums.clamp_min(1e-20)).mean()),
            "gate_rms": float(weights[routing.expert_ids[visiting] >= 0].square().mean().sqrt()),
            "co_activation": 0.0,
        }
        if bool(pairs.any()):
            values["co_activation"] = float(
                (together / expected.clamp_min(1e-20) - 1).abs()[pairs].mean()
            )
        found.append(values)
    return found
