"""Expert choice: every expert picks its tokens."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from model.config import ModelConfig
from model.parallel import ParallelGroups
from model.routers.base import FALLBACK_K, SHARE, Router, default_max_experts
from ops.router import RouteSpec


class ExpertChoiceRouter(Router):
    """Every expert takes its best top_k * T / E tokens of the micro-batch (arXiv 2202.09368): the load is even by
    construction. The choice looks at later tokens and other rows, so outside of training a token visits the experts whose
    score exceeds their cut instead, the (1 - top_k / E) quantile of their scores, averaged over recent steps (arXiv
    2603.11535). The cuts live in balance_bias, with the opposite sign, and so in checkpoints; while they are all zero
    (before the first step, or from a checkpoint of a router without any) a token visits its top_k best experts.

    max_experts: most experts of one token (None: four times top_k); what lies above is cut off and counted.
    """

    law = "quantile"

    def __init__(self, config: ModelConfig, groups: ParallelGroups | None = None, layer_idx: int = 0, *, top_k: int,
                 max_experts: int | None = None, min_experts: int = 0,
                 score_function: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax",
                 normalize_weights: bool = False, scaling_factor: float = 1.0):
        spec = RouteSpec(config.num_experts, "expert_choice", score_function, top_k, 0, min_experts,
                         default_max_experts(config.num_experts, top_k, max_experts),
                         normalize_weights=normalize_weights, scaling_factor=scaling_factor,
                         skip_nonfinite=config.num_shared_experts > 0)
        super().__init__(config, spec)

    def mode_spec(self) -> RouteSpec:
        return self.spec if self.training else dataclasses.replace(self.spec, mode="threshold")

    def control_in_force(self) -> torch.Tensor:
        control = super().control_in_force()
        if self.training:
            return control
        # A cut of zero would let every expert through. Asked on the device, as `any` on the host would wait for it.
        plain = control.clone()
        plain[SHARE], plain[FALLBACK_K] = 0.0, float(self.spec.top_k)
        return torch.where(self.balance_bias.any(), control, plain)

    @staticmethod
    def problems(config: ModelConfig, *, top_k: int, max_experts: int | None = None, min_experts: int = 0,
                 score_function: str = "softmax", normalize_weights: bool = False,
                 scaling_factor: float = 1.0) -> list[str]:
        if score_function == "relu":
            return ["router.score_function relu belongs to router=relu"]
        most = default_max_experts(config.num_experts, top_k, max_experts)
        if most < top_k <= config.num_experts:
            return [f"router.max_experts {most} is below router.top_k {top_k}, the mean of all tokens"]
        if top_k < min_experts <= most:
            return [f"router.min_experts {min_experts} is above router.top_k {top_k}, the mean of all tokens"]
        return RouteSpec(config.num_experts, "expert_choice", score_function, top_k, 0,  # type: ignore[arg-type]
                         min_experts, most, normalize_weights=normalize_weights, scaling_factor=scaling_factor).problems()
