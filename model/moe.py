"""The mixture-of-experts layer: route, dispatch, compute, combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from model.balance import RouterSums, histogram_bins, router_sums
from model.config import BalanceConfig, ExpertsConfig, ModelConfig
from model.experts import Experts
from model.layers import GatedMLP
from model.parallel import ParallelGroups
from model.placement import Placement
from model.routers.base import RoutingRequest
from ops.router import RouterOutput


@dataclass(frozen=True)
class ModelParts:
    """Builders of the exchangeable parts; each is called once per layer with the shared ModelConfig.

    placement: which rank serves which expert; None: consecutive blocks.
    """

    router: Callable[..., Any]
    attention: Callable[..., Any]
    dispatcher: Callable[..., Any]
    balance: BalanceConfig
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    placement: Placement | None = None


class MoELayer(nn.Module):
    """Routed experts plus shared experts. Router, dispatcher and experts are siblings that meet only here."""

    def __init__(self, config: ModelConfig, groups: ParallelGroups, parts: ModelParts, layer_idx: int):
        super().__init__()
        self.balance = parts.balance
        self.router = parts.router(config, groups=groups, layer_idx=layer_idx)
        self.router.token_rounding = parts.experts.token_rounding
        self.num_bins = histogram_bins(parts.balance, self.router)
        self.router.prepare_histogram(self.num_bins)
        placement = None
        if parts.placement is not None:
            placement = parts.placement.layers[config.moe_layers.index(layer_idx)]
        self.dispatcher = parts.dispatcher(config, groups=groups, placement=placement)
        self.experts = Experts(config, groups, parts.experts, placement)
        self.shared = None
        if config.num_shared_experts:
            self.shared = GatedMLP(config.hidden_size, config.num_shared_experts * config.expert_intermediate_size)

    def forward(self, hidden: torch.Tensor, request: RoutingRequest) -> tuple[torch.Tensor, RouterSums, RouterOutput]:
        """hidden [B, S, D], request for its B * S tokens -> [B, S, D], the layer's sums, and the routing itself."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        segments = hidden.shape[0] if self.balance.aux_loss_scope == "sequence" else 1
        # Quantiles are learnt in training only, and in the steps that calibrate another budget.
        request = request._replace(num_segments=segments, num_bins=self.num_bins if request.num_bins else 0)
        routing = self.router(tokens, request)
        loan = self.experts.lend()
        dispatched = self.dispatcher.start(tokens, routing, dropless=not self.training)
        shared = None if self.shared is None else self.shared(tokens)  # while the tokens travel
        stacks = self.experts.stacks(self.dispatcher.chunk_sizes, loan)
        out, processed = dispatched.finish(lambda chunk, rows: self.experts(stacks[chunk], rows))
        if shared is not None:
            out = out + shared
        return out.view_as(hidden), router_sums(routing, self.router, self.balance, processed), routing
