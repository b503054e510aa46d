"""Routers outside of the trainer: make one, route with it, move its controllers
(docs/library.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from model.config import BalanceConfig, BudgetConfig, FailSafeConfig, ModelConfig
from model.init import materialize, matrices_on_meta
from model.moe.balance import LayerStats, histogram_bins, pack_stats, unpack_stats
from model.moe.budget import start_routers, update_routers
from model.routers.base import Router, RoutingRequest
from model.routers.config import ROUTERS
from model.routers.expert_choice import ExpertChoiceRouter
from model.routers.relu import ReLURouter
from model.routers.state import RouterInputs
from model.routers.threshold import ThresholdRouter
from model.routers.top_k import NullExpertsRouter, TopKRouter
from model.routers.top_p import TopPRouter
from ops.router import Reason, RouterOutput

__all__ = [
    "ROUTERS",
    "ExpertChoiceRouter",
    "LayerStats",
    "NullExpertsRouter",
    "ReLURouter",
    "Reason",
    "Router",
    "RouterControl",
    "RouterOutput",
    "RoutingRequest",
    "ThresholdRouter",
    "TopKRouter",
    "TopPRouter",
    "make_router",
]


def make_router(
    kind: str,
    hidden_size: int,
    num_experts: int,
    *,
    num_shared_experts: int = 0,
    expert_intermediate_size: int = 1,
    init_std: float = 0.02,
    seed: int = 0,
    **knobs: Any,
) -> Router:
    """A router of one layer with initial weights, for one process.

    Args:
        kind: a key of ROUTERS; knobs: fields of its record, as in conf/router (top_k=2,
            budget=1.5).
        num_shared_experts: where there is one, a token may be left without a routed expert.
        expert_intermediate_size: width of an expert, for budgets in FLOPs (budget_unit="flops").
        init_std: the weights are Normal(0, init_std), drawn from the seed.

    Raises:
        ValueError: an unknown kind, or every contradiction of the knobs at once.
        TypeError: a knob that the record does not have, or that is missing.
    """
    if kind not in ROUTERS:
        raise ValueError(f"unknown router {kind!r}; choose one of {', '.join(ROUTERS)}")
    config = ModelConfig(
        vocab_size=1,
        hidden_size=hidden_size,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        intermediate_size=1,
        num_experts=num_experts,
        max_seq_len=1,
        expert_intermediate_size=expert_intermediate_size,
        num_shared_experts=num_shared_experts,
        init_std=init_std,
    )
    settings = ROUTERS[kind](**knobs)
    problems = settings.problems(config)
    if settings.arguments.get("hash_layers"):
        problems.append(
            "router.hash_layers is a setting of a model's first layers, which know the tokens; a "
            "router by itself has no table, set it to 0"
        )
    if problems:
        raise ValueError("; ".join(problems))
    with matrices_on_meta():
        router = settings.build(config)
    materialize(router, seed, config)
    return router


class RouterControl:
    """Everything that a training loop owes its routers, in three calls: made before the first step
    (and before a checkpoint is loaded), `route` for every micro-batch of every layer, `step` once
    per optimiser step.

    What is left out raises or is said: `step` without a `route` of every layer, statistics of other
    routers, cuts without a histogram. Call `route` outside of activation checkpointing, which would
    count twice.

    Args:
        routers: of the MoE layers, in their order and of one kind.
        balance, budget, fail_safe: as in the config. Of balance the bias alone: its losses are
            built from what `route` returns (ops/router/README.md, Gates and statistics).
        group: ranks whose tokens are balanced together; None: this process alone.

    Raises:
        ValueError: no routers, or of several kinds.
    """

    def __init__(
        self,
        routers: Sequence[Router],
        balance: BalanceConfig | None = None,
        budget: BudgetConfig | None = None,
        fail_safe: FailSafeConfig | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        self.routers = list(routers)
        if not self.routers or len({(type(r), r.spec) for r in self.routers}) > 1:
            kinds = ", ".join(sorted({type(r).__name__ for r in self.routers})) or "none"
            raise ValueError(
                "routers must be at least one, all of one kind and with the same settings; "
                f"got {kinds}"
            )
        self.balance = balance or BalanceConfig()
        self.budget, self.fail_safe = budget or BudgetConfig(), fail_safe or FailSafeConfig()
        self.group = group
        self.num_bins = histogram_bins(self.balance, self.routers[0])
        self._counted: list[torch.Tensor | None] = [None] * len(self.routers)
        for router in self.routers:
            router.prepare_histogram(self.num_bins)
        start_routers(self.routers, self.budget, self.fail_safe)

    def route(
        self, hidden: torch.Tensor, layer: int = 0, token_mask: torch.Tensor | None = None
    ) -> RouterOutput:
        """hidden [T, hidden_size] -> the routing of `layer` (its place in `routers`); counted if
        the router is in training.

        token_mask: [T] bool, False for padding.
        """
        router = self.routers[layer]
        bins = self.num_bins if router.training else 0
        routing: RouterOutput = router(hidden, RoutingRequest(token_mask=token_mask, num_bins=bins))
        if router.training:
            limit = RouterInputs.of(router.inputs_in_force()).limit
            stats = pack_stats(routing, limit < router.max_top_k)
            before = self._counted[layer]
            self._counted[layer] = stats if before is None else before + stats
        return routing

    def step(self, stats: torch.Tensor | None = None) -> LayerStats:
        """Move bias, cuts, budget and fallbacks by one optimiser step, and forget what was counted.

        Collective over the group.

        stats: [layers, size] int64 where the layers count by themselves (ModelOutput.stats, summed
            over the step's micro-batches); None: what `route` has counted.

        Returns:
            LayerStats of the step, over all ranks: counts, experts_per_token, reasons.

        Raises:
            RuntimeError: a layer has routed nothing since the last step.
            ValueError: the statistics are not those of these routers.
        """
        first = self.routers[0]
        if stats is None:
            silent = [i for i, counted in enumerate(self._counted) if counted is None]
            if silent:
                raise RuntimeError(
                    f"layers {silent} have routed nothing in training since the last step: "
                    "call RouterControl.route for every layer, or give step() the stats of "
                    "the model"
                )
            stats = torch.stack([counted for counted in self._counted if counted is not None])
        self._counted = [None] * len(self.routers)
        if self.group is not None:
            stats = stats.clone()
            dist.all_reduce(stats, group=self.group)
        found = unpack_stats(stats, first.spec.num_experts, first.max_top_k)
        if len(found.counts) != len(self.routers) or found.histogram.shape[2] != self.num_bins:
            raise ValueError(
                f"stats are of {len(found.counts)} layers with {found.histogram.shape[2]} "
                f"histogram bins; these routers are {len(self.routers)} and need "
                f"{self.num_bins} (balance.histogram_bins of the model and of RouterControl "
                "must be the same)"
            )
        update_routers(self.routers, found, self.balance, self.budget, self.fail_safe)
        return found
