"""The mixture-of-experts layer: route, dispatch, compute, combine."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from model.attention.config.base import AttentionConfig
from model.config import BalanceConfig, ExpertsConfig, ModelConfig
from model.dispatch.config import DispatcherConfig
from model.layers import GatedMLP
from model.moe.balance import RouterSums, histogram_bins, router_sums
from model.moe.experts import Experts
from model.parallel.groups import ParallelGroups
from model.placement.record import Placement
from model.routers.base import RoutingRequest
from model.routers.config import RouterConfig
from ops.router import RouterOutput


@dataclass(frozen=True)
class ModelParts:
    """The exchangeable parts of a model; each record builds one of its kind per layer."""

    router: RouterConfig
    attention: AttentionConfig
    dispatcher: DispatcherConfig
    balance: BalanceConfig
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    placement: Placement | None = None
    """Which rank serves which expert. None: consecutive blocks."""


class MoELayer(nn.Module):
    """Routed experts plus shared experts. Router, dispatcher and experts are siblings that meet
    only here.
    """

    def __init__(
        self, config: ModelConfig, groups: ParallelGroups, parts: ModelParts, layer_idx: int
    ):
        super().__init__()
        self.balance = parts.balance
        number = config.moe_layers.index(layer_idx)
        self.router = parts.router.build_layer(config, number)
        self.router.token_rounding = parts.experts.token_rounding
        self.router.random_steps = parts.balance.random_routing_steps
        self.router.layer_idx = layer_idx
        self.num_bins = histogram_bins(parts.balance, self.router)
        self.router.prepare_histogram(self.num_bins)
        placement = None
        if parts.placement is not None:
            placement = parts.placement.layers[number]
        self.dispatcher = parts.dispatcher.build(config, groups, placement)
        self.experts = Experts(config, groups, parts.experts, placement)
        self.shared: GatedMLP | None = None
        self.shared_gate: nn.Linear | None = None
        if config.num_shared_experts:
            self.shared = GatedMLP(
                config.hidden_size,
                config.num_shared_experts * config.expert_intermediate_size,
                config.activation,
            )
            if config.shared_expert_gate:
                self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(
        self, hidden: torch.Tensor, request: RoutingRequest
    ) -> tuple[torch.Tensor, RouterSums, RouterOutput]:
        """hidden [B, S, D], request for its B * S tokens -> [B, S, D], the layer's sums, and the
        routing itself.
        """
        tokens = hidden.reshape(-1, hidden.shape[-1])
        segments = hidden.shape[0] if self.balance.aux_loss_scope == "sequence" else 1
        # Quantiles are learnt in training only, and in the steps that calibrate another budget.
        request = request._replace(
            num_segments=segments, num_bins=self.num_bins if request.num_bins else 0
        )

        routing = self.router(tokens, request)

        # Everything that travels is on its way before anything is waited for.
        loan = self.experts.lend()
        dispatched = self.dispatcher.start(tokens, routing, dropless=not self.training)

        # while the tokens travel
        shared = None if self.shared is None else self.shared(tokens)
        if shared is not None and self.shared_gate is not None:
            shared = self.shared_gate(tokens).sigmoid() * shared
        stacks = self.experts.stacks(self.dispatcher.chunk_sizes, loan)
        out, processed = dispatched.finish(lambda chunk, rows: self.experts(stacks[chunk], rows))
        if shared is not None:
            out = out + shared
        sums = router_sums(routing, self.router, self.balance, processed)
        return out.view_as(hidden), sums, routing
