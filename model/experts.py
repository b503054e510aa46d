"""The experts of one layer that live on this rank, as stacked weights."""

from __future__ import annotations

import torch
from torch import nn

from model.config import ModelConfig
from model.parallel import ParallelGroups
from ops.grouped_mlp import grouped_mlp


class Experts(nn.Module):
    """SwiGLU experts: gate_up [L, 2F, D], down [L, D, F] for the L local experts.

    `global_ids` names them globally: initialisation and checkpoints go by global expert, never by rank.
    Parameters carry `allreduce = False`, the mark megatron-core and DeepSpeed share for expert parameters.
    """

    def __init__(self, config: ModelConfig, groups: ParallelGroups):
        super().__init__()
        if config.num_experts % groups.expert_size:
            raise ValueError(f"num_experts {config.num_experts} is not divisible by expert_parallel_size "
                             f"{groups.expert_size}")
        self.global_ids = groups.local_experts(config.num_experts)
        width, hidden_size = config.expert_intermediate_size, config.hidden_size
        self.gate_up = nn.Parameter(torch.empty(len(self.global_ids), 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(len(self.global_ids), hidden_size, width))
        for parameter in self.parameters():
            parameter.allreduce = False

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """rows [R, D] in local expert order, counts [L] int64 -> [R, D]."""
        return grouped_mlp(rows, self.gate_up, self.down, counts)


def is_expert_parameter(parameter: nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)
