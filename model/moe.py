"""The mixture-of-experts layer: route, dispatch, compute, combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model.balance import RouterSums, router_sums
from model.config import BalanceConfig, ModelConfig
from model.experts import Experts
from model.layers import GatedMLP
from model.parallel import ParallelGroups


@dataclass(frozen=True)
class ModelParts:
    """Builders of the exchangeable parts; each is called once per layer with the shared ModelConfig."""

    router: Callable[..., Any]
    attention: Callable[..., Any]
    dispatcher: Callable[..., Any]
    balance: BalanceConfig


class MoELayer(nn.Module):
    """Routed experts plus shared experts. Router, dispatcher and experts are siblings that meet only here."""

    def __init__(self, config: ModelConfig, groups: ParallelGroups, parts: ModelParts, layer_idx: int):
        super().__init__()
        self.balance = parts.balance
        self.router = parts.router(config, groups=groups, layer_idx=layer_idx)
        self.dispatcher = parts.dispatcher(config, groups=groups)
        self.experts = Experts(config, groups)
        self.shared = None
        if config.num_shared_experts:
            self.shared = GatedMLP(config.hidden_size, config.num_shared_experts * config.expert_intermediate_size)

    def forward(self, hidden: torch.Tensor, token_mask: torch.Tensor | None) -> tuple[torch.Tensor, RouterSums]:
        """hidden [B, S, D], token_mask [B, S] bool or None -> [B, S, D] and the layer's balance sums."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        mask = None if token_mask is None else token_mask.reshape(-1)
        routing = self.router(tokens, mask)
        rows, plan = self.dispatcher.dispatch(tokens, routing)
        out = self.dispatcher.combine(self.experts(rows, plan.counts), plan)
        if self.shared is not None:
            out = out + self.shared(tokens)
        sums = router_sums(routing, mask, hidden.shape[0], self.balance)
        return out.view_as(hidden), sums._replace(processed=rows.shape[0])
