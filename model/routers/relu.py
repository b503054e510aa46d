"""ReLU routing: experts with a positive logit, and a penalty that keeps their number at the budget."""

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


class ReLURouter(Router):
    """Gates are ReLU(logits) and an expert is visited where its gate is positive (ReMoE, arXiv 2412.14711): routing is
    differentiable everywhere. A load-weighted L1 penalty on the gates, its coefficient moved by the controller, keeps the
    mean number of experts at `budget` and the load even. In inference the controller moves the cut instead.

    initial_coeff: penalty coefficient at the start. min_experts None: 0 where there is a shared expert, else 1.
    """

    law = "relu"

    def __init__(self, config: ModelConfig, groups: ParallelGroups | None = None, layer_idx: int = 0, *, budget: float,
                 budget_unit: Literal["experts", "flops"] = "experts", initial_coeff: float = 1e-8,
                 min_experts: int | None = None, max_experts: int | None = None, scaling_factor: float = 1.0,
                 capacity_factor: float | None = None):
        experts = experts_of_budget(config, budget, budget_unit)
        spec = RouteSpec(config.num_experts, "relu", "relu", max(1, round(experts)), 0,
                         least_experts(config, min_experts),
                         default_max_experts(config.num_experts, experts, max_experts), normalize_weights=False,
                         scaling_factor=scaling_factor, skip_nonfinite=config.num_shared_experts > 0)
        super().__init__(config, spec, budget=experts, capacity_factor=capacity_factor)
        self.initial_coeff = initial_coeff

    @staticmethod
    def problems(config: ModelConfig, *, budget: float, budget_unit: str = "experts", initial_coeff: float = 1e-8,
                 min_experts: int | None = None, max_experts: int | None = None, scaling_factor: float = 1.0,
                 capacity_factor: float | None = None) -> list[str]:
        experts = experts_of_budget(config, budget, budget_unit)
        most = default_max_experts(config.num_experts, experts, max_experts)
        found = capacity_problems(capacity_factor) + budget_problems(config, budget, budget_unit, most, config.num_experts,
                                                                     least_experts(config, min_experts))
        if not 0 < initial_coeff < 1:
            found.append(f"router.initial_coeff is {initial_coeff}; it must be between 0 and 1")
        least = least_experts(config, min_experts)
        if least == 0 and not config.num_shared_experts:
            found.append("router.min_experts=0 leaves tokens without any expert; it needs model.num_shared_experts")
        return found or RouteSpec(config.num_experts, "relu", "relu", max(1, round(experts)), 0, least, most,
                                  normalize_weights=False, scaling_factor=scaling_factor).problems()
