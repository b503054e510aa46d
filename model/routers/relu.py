"""ReLU routing: experts whose logit exceeds a cut of their own, with what exceeds it as gate."""

from __future__ import annotations

from typing import Literal

from model.config import ModelConfig, experts_of_budget
from model.parallel import ParallelGroups
from model.routers.base import (
    Router,
    budget_problems,
    capacity_problems,
    default_max_experts,
    least_experts,
)
from ops.router import RouteSpec

FORMER_COEFF = 1e-8
"""Default of router.initial_coeff in versions that had it."""


class ReLURouter(Router):
    """Gates are ReLU(logit - cut) and an expert is visited where its gate is positive, so that routing is differentiable
    everywhere and a gate starts at zero (ReMoE, arXiv 2412.14711). There a penalty on the gates pushes the number of experts
    down to the budget, and nothing pushes it up; here each expert's cut is the quantile of its own logits that gives it its
    share of the budget, as in threshold routing. The cuts live in balance_bias, with the opposite sign.

    min_experts None: 0 where there is a shared expert, else 1. initial_coeff: of the penalty that held the budget in
    earlier versions: their default is still read, so that their configs load, and any other value is refused.
    """

    law = "relu"

    def __init__(self, config: ModelConfig, groups: ParallelGroups | None = None, layer_idx: int = 0, *, budget: float,
                 budget_unit: Literal["experts", "flops"] = "experts", initial_coeff: float | None = None,
                 min_experts: int | None = None, max_experts: int | None = None, scaling_factor: float = 1.0,
                 capacity_factor: float | None = None):
        experts = experts_of_budget(config, budget, budget_unit)
        spec = RouteSpec(config.num_experts, "relu", "relu", max(1, round(experts)), 0,
                         least_experts(config, min_experts),
                         default_max_experts(config.num_experts, experts, max_experts), normalize_weights=False,
                         scaling_factor=scaling_factor, skip_nonfinite=config.num_shared_experts > 0)
        super().__init__(config, spec, budget=experts, capacity_factor=capacity_factor)

    @staticmethod
    def problems(config: ModelConfig, *, budget: float, budget_unit: str = "experts", initial_coeff: float | None = None,
                 min_experts: int | None = None, max_experts: int | None = None, scaling_factor: float = 1.0,
                 capacity_factor: float | None = None) -> list[str]:
        experts = experts_of_budget(config, budget, budget_unit)
        most = default_max_experts(config.num_experts, experts, max_experts)
        found = capacity_problems(capacity_factor) + budget_problems(config, budget, budget_unit, most, config.num_experts,
                                                                     least_experts(config, min_experts))
        if initial_coeff not in (None, FORMER_COEFF):
            found.append(f"router.initial_coeff is {initial_coeff}, which no longer acts: cuts hold the budget now, not a "
                         "penalty on gates; drop it")
        least = least_experts(config, min_experts)
        if least == 0 and not config.num_shared_experts:
            found.append("router.min_experts=0 leaves tokens without any expert; it needs model.num_shared_experts")
        return found or RouteSpec(config.num_experts, "relu", "relu", max(1, round(experts)), 0, least, most,
                                  normalize_weights=False, scaling_factor=scaling_factor).problems()
