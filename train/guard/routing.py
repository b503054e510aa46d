"""What moves the routers once a step: selection bias, budget, fallbacks, what alarms ask for."""

from __future__ import annotations

import torch
import torch.distributed as dist

from model.config import BalanceConfig, BudgetConfig, FailSafeConfig
from model.moe.balance import LayerStats, unpack_stats
from model.moe.budget import hold_plain_top_k, update_routers
from model.parallel.groups import ParallelGroups
from model.parallel.part import LayerRows
from model.routers.base import Router


class RoutingControl:
    """The controllers of all MoE layers; does nothing in a dense model.

    Args:
        routers: of the MoE layers here; kind: what they and those of other stages have in common,
            None for a dense model; rows: which layers they are.
        rank_shares: see model.moe.balance.rank_shares; None where no ranks share the experts.
        actions: what alarms asked for before this process (`obey`).
    """

    def __init__(
        self,
        routers: list[Router],
        kind: Router | None,
        rows: LayerRows,
        groups: ParallelGroups,
        budget: BudgetConfig,
        fail_safe: FailSafeConfig,
        rank_shares: torch.Tensor | None,
        actions: frozenset[str] = frozenset(),
    ):
        self._routers, self._kind, self._rows = routers, kind, rows
        self._groups, self._rank_shares = groups, rank_shares
        self._budget, self._fail_safe = budget, fail_safe
        self._actions = actions

    def reduce(self, statistics: torch.Tensor) -> LayerStats | None:
        """The step's statistics of all layers over all ranks, by one all-reduce of integers, so
        that every rank computes the same bits from them. None in a dense model. Collective.

        Args:
            statistics: `ModelOutput.stats` summed over the micro-batches of this rank; may be
                changed in place.
        """
        if self._kind is None:
            return None
        whole = self._rows.placed(statistics)
        if self._groups.stage_size * self._groups.pipeline_size > 1:
            dist.all_reduce(whole)
        return unpack_stats(whole, self._kind.spec.num_experts, self._kind.max_top_k)

    def update(self, layers: LayerStats, balance: BalanceConfig) -> None:
        """Move bias, budget and fallbacks of the layers here by one step that updated the weights,
        with the balance settings of that step. Collective over the pipeline group where
        budget.scope is "model".
        """
        assert self._kind is not None
        rows, shares = self._rows, self._rank_shares
        if self._routers:
            update_routers(
                self._routers,
                LayerStats(*map(rows.taken, layers)),
                balance,
                self._budget,
                self._fail_safe,
                None if shares is None else rows.taken(shares),
                "freeze_bias" in self._actions,
                self._of_all_layers,
            )
        elif self._kind.budget is not None and self._budget.scope == "model":
            self._of_all_layers(torch.zeros(0, device=layers.counts.device))
        if "top_k" in self._actions:
            hold_plain_top_k(self._routers, self._budget)

    def _of_all_layers(self, own: torch.Tensor) -> torch.Tensor:
        """[own layers] -> [all layers], the same on all stages."""
        whole = self._rows.placed(own)
        if self._groups.pipeline_size > 1:
            dist.all_reduce(whole, group=self._groups.pipeline)
        return whole

    def obey(self, actions: frozenset[str]) -> None:
        """From the next update on: freeze_bias leaves the selection bias as it is, top_k holds
        adaptive routers at plain top-k. Others are not about routing.
        """
        self._actions = actions
