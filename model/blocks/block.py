"""One layer of the transformer: attention, then an MLP or experts."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from model.attention.base import AttentionSums, SequenceLayout
from model.attention.cache import LayerCache, Pages
from model.blocks.cut import config_of_part, cut_attention, cut_mlp
from model.blocks.streams import Opened, StreamMixer, closed
from model.config import ModelConfig
from model.layers import GatedMLP, RMSNorm, times
from model.moe.balance import RouterSums
from model.moe.layer import ModelParts, MoELayer
from model.parallel.groups import ParallelGroups
from model.routers.base import RoutingRequest
from ops.router import RouterOutput

BlockOutput = tuple[torch.Tensor, AttentionSums | None, RouterSums | None, RouterOutput | None]
"""Hidden states as they came, [B, S, D] or of several streams, and what attention, the routers'
losses and the routing say.
"""


class Block(nn.Module):
    """Pre-norm residual block: attention, then a dense MLP or an MoE layer. With several residual
    streams (model.num_residual_streams) both read and write them by weights of their own.
    """

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
        self.attention_streams: StreamMixer | None = None
        self.mlp_streams: StreamMixer | None = None
        if config.num_residual_streams > 1:
            self.attention_streams, self.mlp_streams = StreamMixer(config), StreamMixer(config)

    def forward(
        self,
        hidden: torch.Tensor,
        layout: SequenceLayout,
        request: RoutingRequest,
        cache: LayerCache | Pages | None = None,
    ) -> BlockOutput:
        # What is cut wants the tokens of the tensor group, experts and norms a rank's own.
        opened = None if self.attention_streams is None else self.attention_streams(hidden)
        normed = self.attention_norm(hidden if opened is None else opened.read)
        attended, attention_sums = self.attention(layout.gather_tokens(normed), layout, cache)
        hidden = self._added(hidden, opened, layout.sum_own_tokens(attended))

        opened = None if self.mlp_streams is None else self.mlp_streams(hidden)
        normed = self.mlp_norm(hidden if opened is None else opened.read)
        if isinstance(self.mlp, MoELayer):
            out, sums, routing = self.mlp(normed, request)
            return self._added(hidden, opened, out), attention_sums, sums, routing
        out = layout.sum_own_tokens(self.mlp(layout.gather_tokens(normed)))
        return self._added(hidden, opened, out), attention_sums, None, None

    def _added(
        self, hidden: torch.Tensor, opened: Opened | None, out: torch.Tensor
    ) -> torch.Tensor:
        out = times(out, self.residual_multiplier)
        return hidden + out if opened is None else closed(hidden, opened, out)
