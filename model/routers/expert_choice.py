"""Expert choice: every expert picks its tokens."""

from __future__ import annotations

import dataclasses
from typing import Literal

from model.config import ModelConfig
from model.parallel import ParallelGroups
from model.routers.base import Router, default_max_experts
from ops.router import RouteSpec


class ExpertChoiceRouter(Router):
    """Every expert takes its best top_k * T / E tokens of the micro-batch (arXiv 2202.09368): the load is even by
    construction. The choice looks at later tokens, so outside of training the cuts of recent steps decide instead
    (arXiv 2603.11535); they live in balance_bias, with the opposite sign.

    max_experts: most experts of one token (None: four times top_k); what lies above is cut off and counted.
    """

    law = "quantile"

    def __init__(self, config: ModelConfig, groups: ParallelGroups, layer_idx: int, *, top_k: int,
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
