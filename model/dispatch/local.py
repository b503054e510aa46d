"""All experts on one rank: rows into expert order and back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.config import ModelConfig
from model.dispatch.base import Compute, Dispatched, ExpertRows
from model.parallel.groups import ParallelGroups
from ops.all_to_all import (
    Meter,
)
from ops.router import RouterOutput


class LocalDispatcher:
    """All experts live on this rank: nothing moves, and the experts read the tokens where they
    are.
    """

    def __init__(self, config: ModelConfig, groups: ParallelGroups | None = None):
        groups = groups or ParallelGroups.single()
        if groups.expert_size != 1:
            raise ValueError(
                f"dispatcher=local holds all experts on one rank, but expert_parallel_size is "
                f"{groups.expert_size}; use dispatcher=all_to_all"
            )
        self.chunk_sizes = [config.num_experts]
        self.meter = Meter()

    def start(self, hidden: Tensor, routing: RouterOutput, dropless: bool = False) -> Dispatched:
        """hidden [T, D] and where its tokens go."""
        return _Stayed(
            ExpertRows(hidden, routing.weights, routing.slots, routing.inverse, routing.offsets)
        )


@dataclass(frozen=True)
class _Stayed:
    rows: ExpertRows

    def finish(self, compute: Compute) -> tuple[Tensor, Tensor]:
        return compute(0, self.rows), self.rows.offsets[-1].long()
