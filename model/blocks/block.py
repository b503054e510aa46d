"""One layer of the transformer: attention, then an MLP or experts."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from model.attention.base import AttentionSums, SequenceLayout
from model.attention.cache import LayerCache, Pages
from model.blocks.cut import config_of_part, cut_attention, cut_mlp
from model.config import ModelConfig
from model.layers import GatedMLP, RMSNorm, times
from model.moe.balance import RouterSums
from model.moe.layer import ModelParts, MoELayer
from model.parallel.groups import ParallelGroups
from model.routers.base import RoutingRequest
from ops.router import RouterOutput

BlockOutput = tuple[torch.Tensor, AttentionSums | None, RouterSums | None, RouterOutput | None]
"""Hidden states [B, S, D], and what attention, the routers' losses and the routing say."""


class Block(nn.Module):
    """Pre-norm residual block: attention, then a dense MLP or an MoE layer."""

    def __init__(
        self, config: ModelConfig, groups: ParallelGroups, parts: ModelParts, layer_idx: int
    ):
        super().__init__()
        self.residual_multiplier = config.residual_scale
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = parts.attention.build(config_of_part(config, groups), layer_idx)
        attention = cast(nn.Module, self.attention)
        cut_attention(attention, parts.attention.by_head, config, groups)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp: nn.Module
        if config.is_moe_layer(layer_idx):
            self.mlp = MoELayer(config, groups, parts, layer_idx)
        else:
            width = config.intermediate_size // groups.tensor_size
            self.mlp = GatedMLP(config.hidden_size, width, config.activation)
            cut_mlp(self.mlp, groups)

    def forward(
        self,
        hidden: torch.Tensor,
        layout: SequenceLayout,
        request: RoutingRequest,
        cache: LayerCache | Pages | None = None,
    ) -> BlockOutput:
        # What is cut wants the tokens of the tensor group, experts and norms a rank's own.
        tokens = layout.gather_tokens(self.attention_norm(hidden))
        attended, attention_sums = self.attention(tokens, layout, cache)
        attended = layout.sum_own_tokens(attended)
        hidden = hidden + times(attended, self.residual_multiplier)
        normed = self.mlp_norm(hidden)
        if isinstance(self.mlp, MoELayer):
            out, sums, routing = self.mlp(normed, request)
            return hidden + times(out, self.residual_multiplier), attention_sums, sums, routing
        out = layout.sum_own_tokens(self.mlp(layout.gather_tokens(normed)))
        return hidden + times(out, self.residual_multiplier), attention_sums, None, None
