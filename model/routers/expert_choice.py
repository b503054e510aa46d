"""Expert choice: every expert picks its tokens."""

from __future__ import annotations

import dataclasses

import torch

from model.config import ModelConfig
from model.routers.base import Router
from model.routers.config import ExpertChoiceConfig
from model.routers.state import RouterInputs, RouterState
from ops.router import RouteSpec


class ExpertChoiceRouter(Router):
    """Every expert takes its best top_k * T / E tokens of the micro-batch (arXiv 2202.09368): the
    load is even by construction. The choice looks at later tokens and other rows, so outside of
    training a token visits the experts whose score exceeds their cut instead, the (1 - top_k / E)
    quantile of their scores, averaged over recent steps (arXiv 2603.11535). The cuts live in
    balance_bias, with the opposite sign, and so in checkpoints; while they are all zero (before the
    first step, or from a checkpoint of a router without any) a token visits its top_k best experts.
    """

    law = ExpertChoiceConfig.law

    def __init__(self, config: ModelConfig, settings: ExpertChoiceConfig):
        super().__init__(config, settings.spec(config))

    def mode_spec(self) -> RouteSpec:
        return self.spec if self.training else dataclasses.replace(self.spec, mode="threshold")

    def inputs_in_force(self, plain_k: int = 0, state: RouterState | None = None) -> torch.Tensor:
        control = super().inputs_in_force(plain_k, state)
        if self.training or plain_k:
            return control
        # A cut of zero would let every expert through. Asked on the device, as `any` on the host
        # would wait for it.
        plain = control.clone()
        inputs = RouterInputs.of(plain)
        inputs.share.fill_(0.0)
        inputs.fallback_k.fill_(float(self.spec.top_k))
        bias = self.balance_bias if state is None else state.balance_bias
        return torch.where(bias.any(-1, keepdim=True), control, plain)
