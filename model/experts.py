"""The experts of one layer that live on this rank, as stacked weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ExpertsConfig, ModelConfig
from model.dispatch import ExpertRows, lent_experts
from model.parallel import ParallelGroups
from model.placement import LayerPlacement
from ops.all_to_all import Flight, Hop, begin_rows, end_rows
from ops.grouped_mlp import grouped_mlp

Stack = tuple[Tensor, Tensor]
"""gate_up [n, 2F, D] and down [n, D, F] of n experts."""


class Experts(nn.Module):
    """SwiGLU experts: gate_up [L, 2F, D], down [L, D, F] for the L local experts.

    `global_ids` names them globally: initialisation and checkpoints go by global expert, never by rank.
    Parameters carry `allreduce = False`, the mark megatron-core and DeepSpeed share for expert parameters.

    A placement may lend experts to other ranks, which then share the work. There is still one parameter per expert: its
    owner sends the weights along in every forward, and their gradient comes back the same way, so that ZeRO, gradient
    norm, optimiser state and checkpoints know nothing of it.
    """

    def __init__(self, config: ModelConfig, groups: ParallelGroups, settings: ExpertsConfig,
                 placement: LayerPlacement | None = None):
        super().__init__()
        if config.num_experts % groups.expert_size:
            raise ValueError(f"num_experts {config.num_experts} is not divisible by expert_parallel_size "
                             f"{groups.expert_size}")
        self.settings = settings
        local = groups.local_experts(config.num_experts)
        self.global_ids = tuple(local if placement is None else placement.experts[local.start:local.stop])
        width, hidden_size = config.expert_intermediate_size, config.hidden_size
        self.gate_up = nn.Parameter(torch.empty(len(self.global_ids), 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(len(self.global_ids), hidden_size, width))
        for parameter in self.parameters():
            parameter.allreduce = False
        self.loan: tuple[list[int], Hop] | None = None
        if placement is not None and placement.replicas[0]:
            lent = [lent_experts(placement, rank) for rank in range(groups.expert_size)]
            to_ranks = [[e for e in experts if placement.owner(e) == groups.expert_rank] for experts in lent]
            owners = [placement.owner(e) for e in lent[groups.expert_rank]]
            hop = Hop(groups.expert, [len(e) for e in to_ranks], [owners.count(r) for r in range(groups.expert_size)])
            self.loan = ([self.global_ids.index(e) for experts in to_ranks for e in experts], hop)

    def lend(self) -> tuple[Flight, Flight] | None:
        """Send the weights that other ranks borrow, and expect those borrowed here. Collective over the expert group."""
        if self.loan is None:
            return None
        experts, hop = self.loan
        gate_up, down = (begin_rows(p[experts].flatten(1), (hop,)) for p in (self.gate_up, self.down))
        return gate_up, down

    def stacks(self, chunk_sizes: list[int], loan: tuple[Flight, Flight] | None) -> list[Stack]:
        """The weights by chunk, those borrowed as the last one."""
        borrowed: list[Stack] = []
        if loan is not None:
            gate_up, down = (end_rows(flight).unflatten(1, p.shape[1:])
                             for flight, p in zip(loan, (self.gate_up, self.down), strict=True))
            borrowed = [(gate_up, down)]
            chunk_sizes = chunk_sizes[:-1]
        if len(chunk_sizes) == 1:
            return [(self.gate_up, self.down), *borrowed]
        return [*zip(self.gate_up.split(chunk_sizes), self.down.split(chunk_sizes), strict=True), *borrowed]

    def forward(self, stack: Stack, rows: ExpertRows) -> Tensor:
        """The rows of a stack's experts -> [R, D]."""
        hidden, *places = rows
        weights, *indices = places
        return grouped_mlp(hidden, weights, *stack, *indices, backend=self.settings.backend,
                           recompute=self.settings.recompute)


def is_expert_parameter(parameter: nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)
