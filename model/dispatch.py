"""Token movement: to the rank and expert order of their experts, and back.

Shape letters: T tokens, K slots per token, A assignments in use, R rows received, D hidden, E experts, L local experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.parallel import ParallelGroups
from ops.all_to_all import all_to_all_rows, exchange_counts
from ops.permute import permute, unpermute
from ops.router import RouterOutput


@dataclass(frozen=True)
class DispatchPlan:
    """Everything `combine` needs to bring rows home.

    slots: [A] int64, assignment of each sent row (RouterOutput.slots).
    weights: [T, K] gates.
    counts: [L] int64, rows per local expert after dispatch.
    send_splits, receive_splits: rows to and from each rank of the expert group.
    by_expert: [R] int64, order that turns received rows (by source rank, then expert) into expert order; None locally.
    """

    slots: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    send_splits: list[int]
    receive_splits: list[int]
    by_expert: torch.Tensor | None


def assignments(routing: RouterOutput) -> torch.Tensor:
    """[A] int64: the assignments in expert order, without the unused tail. One host copy: how many there are."""
    return routing.slots[:int(routing.offsets[-1])].long()


class LocalDispatcher:
    """All experts live on this rank: permute only."""

    def __init__(self, config: ModelConfig, groups: ParallelGroups):
        if groups.expert_size != 1:
            raise ValueError(f"dispatcher=local holds all experts on one rank, but expert_parallel_size is "
                             f"{groups.expert_size}; use dispatcher=all_to_all")
        self.num_experts = config.num_experts

    @staticmethod
    def problems(config: ModelConfig, expert_parallel_size: int) -> list[str]:
        if expert_parallel_size > 1:
            return [f"dispatcher=local cannot serve parallel.expert_parallel_size {expert_parallel_size}; "
                    "use dispatcher=all_to_all"]
        return []

    def dispatch(self, hidden: torch.Tensor, routing: RouterOutput) -> tuple[torch.Tensor, DispatchPlan]:
        """hidden [T, D] -> rows [A, D] in expert order and the plan."""
        slots = assignments(routing)
        counts = routing.counts.sum(0)
        rows = permute(hidden, slots, routing.expert_ids.shape[1])
        return rows, DispatchPlan(slots, routing.weights, counts, [], [], None)

    def combine(self, rows: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """rows [A, D] in expert order -> [T, D], weighted by the gates."""
        return unpermute(rows, plan.slots, plan.weights)


class AllToAllDispatcher:
    """Experts are spread over the expert group in consecutive blocks: permute, exchange, regroup; and back.

    Dropless: the exchange has exactly as many rows as there are assignments, zero from and to any rank included.
    With an expert group of one rank it is the local dispatcher.
    """

    def __init__(self, config: ModelConfig, groups: ParallelGroups):
        self.num_experts = config.num_experts
        self.group, self.group_size = groups.expert, groups.expert_size
        self.local = LocalDispatcher(config, groups) if groups.expert_size == 1 else None

    @staticmethod
    def problems(config: ModelConfig, expert_parallel_size: int) -> list[str]:
        if config.num_experts % expert_parallel_size:
            return [f"model.num_experts {config.num_experts} is not divisible by parallel.expert_parallel_size "
                    f"{expert_parallel_size}"]
        return []

    def dispatch(self, hidden: torch.Tensor, routing: RouterOutput) -> tuple[torch.Tensor, DispatchPlan]:
        """hidden [T, D] -> rows [R, D] of this rank's experts in expert order, and the plan."""
        if self.local is not None:
            return self.local.dispatch(hidden, routing)
        slots = assignments(routing)
        send_counts = routing.counts.sum(0).view(self.group_size, -1)
        receive_counts = exchange_counts(send_counts, self.group)
        splits = torch.stack((send_counts.sum(1), receive_counts.sum(1))).tolist()  # the one host copy
        rows = permute(hidden, slots, routing.expert_ids.shape[1])
        rows = all_to_all_rows(rows, splits[0], splits[1], self.group)
        local_expert = torch.arange(receive_counts.shape[1], device=rows.device).repeat(self.group_size)
        row_expert = torch.repeat_interleave(local_expert, receive_counts.reshape(-1), output_size=rows.shape[0])
        by_expert = row_expert.sort(stable=True).indices
        plan = DispatchPlan(slots, routing.weights, receive_counts.sum(0), splits[0], splits[1], by_expert)
        return rows.index_select(0, by_expert), plan

    def combine(self, rows: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """rows [R, D] in expert order -> [T, D] on the ranks the tokens came from, weighted by the gates."""
        if self.local is not None:
            return self.local.combine(rows, plan)
        assert plan.by_expert is not None
        rows = torch.zeros_like(rows).index_copy(0, plan.by_expert, rows)
        rows = all_to_all_rows(rows, plan.receive_splits, plan.send_splits, self.group)
        return unpermute(rows, plan.slots, plan.weights)
