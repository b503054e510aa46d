"""What tensor parallelism cuts of a block: attention by heads, dense MLPs by their width.

Norms, routers, experts and shared experts are whole on every rank, and see its own tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

from model.config import ModelConfig
from model.layers import GatedMLP, RowLinear
from model.parallel.family import Cut, cut
from model.parallel.groups import ParallelGroups


def config_of_part(config: ModelConfig, groups: ParallelGroups) -> ModelConfig:
    """The shape of attention with a rank's part of the heads."""
    size = groups.tensor_size
    if size == 1:
        return config
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        head_dim=config.attention_head_dim,
    )


def cut_attention(
    attention: nn.Module,
    by_head: Mapping[str, int],
    config: ModelConfig,
    groups: ParallelGroups,
) -> None:
    """Mark what an attention of `config_of_part` has a part of. by_head: as AttentionConfig."""
    if groups.tensor_size == 1:
        return
    # A norm of all heads together has a gain for each of their values.
    if config.qk_norm == "hidden":
        by_head = {**by_head, "q_norm.weight": 0, "k_norm.weight": 0}
    for name, parameter in attention.named_parameters():
        if name in by_head:
            cut(parameter, Cut(by_head[name], groups.tensor_rank, groups.tensor_size))
    for module in attention.modules():
        if isinstance(module, RowLinear):
            module.adds_bias = groups.tensor_rank == 0


def cut_mlp(mlp: GatedMLP, groups: ParallelGroups) -> None:
    """Mark the parts of an MLP: gate and up are cut each by itself, though stacked."""
    if groups.tensor_size == 1:
        return
    rank, size = groups.tensor_rank, groups.tensor_size
    cut(mlp.gate_up.weight, Cut(0, rank, size, stacked=2))
    cut(mlp.down.weight, Cut(1, rank, size))
