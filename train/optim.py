"""AdamW and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model.experts import is_expert_parameter
from train.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float, expert_group: str | None) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norm gains) do not; experts form a group of their own, as DeepSpeed requires.

    Every parameter lands in exactly one group.
    """
    decayed, undecayed, experts = [], [], []
    for parameter in model.parameters():
        if is_expert_parameter(parameter):
            experts.append(parameter)
        elif parameter.dim() > 1:
            decayed.append(parameter)
        else:
            undecayed.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "name": "dense", "weight_decay": weight_decay, "wd_mult": 1.0},
        {"params": undecayed, "name": "dense_no_decay", "weight_decay": 0.0, "wd_mult": 0.0},
    ]
    if experts:
        groups.append({"params": experts, "name": expert_group, "moe": True, "weight_decay": weight_decay,
                       "wd_mult": 1.0})
    assert sum(len(g["params"]) for g in groups) == sum(1 for _ in model.parameters())
    return groups


def build_optimizer(model: nn.Module, config: OptimConfig, expert_group: str | None) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, config.weight_decay, expert_group), lr=config.lr,
                             betas=(config.beta1, config.beta2), eps=config.eps, fused=torch.cuda.is_available())
