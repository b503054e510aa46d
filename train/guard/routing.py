"""What moves the routers once a step: selection bias, budget, fallbacks, what alarms ask for."""

from __future__ import annotations

import torch
import torch.distributed as dist

from model.config import BalanceConfig, BudgetConfig, FailSafeConfig
from model.moe.balance import LayerStats, unpack_stats
from model.moe.budget import hold_plain_top_k, update_routers
from model.parallel.groups import ParallelGroups
from model.routers.base import Router


class RoutingControl:
    """The controllers of all MoE layers; does nothing in a dense model.

    Args:
        routers: of the model, one per MoE layer.
        rank_shares: see model.moe.balance.rank_shares; None where no ranks share the experts.
        actions: what alarms asked for before this process (`obey`).
    """

    def __init__(
        self,
        routers: list[Router],
        groups: ParallelGroups,
        budget: BudgetConfig,
        fail_safe: FailSafeConfig,
        rank_shares: torch.Tensor | None,
        actions: frozenset[str] = frozenset(),
    ):
        self._routers, self._groups, self._rank_shares = routers, groups, rank_shares
        self._budget, self._fail_safe = budget, fail_safe
        self._actions = actions

    def reduce(self, statistics: torch.Tensor) -> LayerStats | None:
        """The step's statistics over all ranks, by one all-reduce of integers, so that every rank
        computes the same bits from them. None in a dense model. Collective.

        Args:
            statistics: `ModelOutput.stats` summed over the micro-batches of this rank; changed in
                place.
        """
        if not self._routers:
            return None
        if self._groups.stage_size > 1:
            dist.all_reduce(statistics, group=self._groups.stage)
        first = self._routers[0]
        return unpack_stats(statistics, first.spec.num_experts, first.max_top_k)

    def update(self, layers: LayerStats, balance: BalanceConfig) -> None:
        """Move bias, budget and fallbacks of every layer by one step that updated the weights, with
        the balance settings of that step.
        """
        update_routers(
            self._routers,
            layers,
            balance,
            self._budget,
            self._fail_safe,
            self._rank_shares,
            "freeze_bias" in self._actions,
        )
        if "top_k" in self._actions:
            hold_plain_top_k(self._routers, self._budget)

    def obey(self, actions: frozenset[str]) -> None:
        """From the next update on: freeze_bias leaves the selection bias as it is, top_k holds
        adaptive routers at plain top-k. Others are not about routing.
        """
        self._actions = actions
