"""Top-p routing: as many experts as it takes to cover a share of the scores."""

from __future__ import annotations

from typing import Literal

from model.config import ModelConfig, experts_of_budget
from model.parallel import ParallelGroups
from model.routers.base import (
    Router,
    budget_problems,
    capacity_problems,
    default_max_experts,
)
from ops.router import RouteSpec


class TopPRouter(Router):
    """Each token visits the fewest experts whose share of the scores reaches P (arXiv 2403.07652): a token the router is
    sure of needs few. The controller moves logit(P) until the mean is `budget` (arXiv 2512.13996).

    initial_top_p: P at the start; min_experts, max_experts: bounds per token (max None: four times the budget).
    num_null_experts: columns that take part in the ranking and cost nothing.
    """

    law = "top_p"

    def __init__(self, config: ModelConfig, groups: ParallelGroups | None = None, layer_idx: int = 0, *, budget: float,
                 budget_unit: Literal["experts", "flops"] = "experts", initial_top_p: float = 0.4,
                 min_experts: int = 1, max_experts: int | None = None,
                 score_function: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax",
                 normalize_weights: bool = True, scaling_factor: float = 1.0, num_groups: int = 1, top_groups: int = 1,
                 num_null_experts: int = 0, capacity_factor: float | None = None):
        experts = experts_of_budget(config, budget, budget_unit)
        columns = config.num_experts + num_null_experts
        spec = RouteSpec(config.num_experts, "top_p", score_function, max(1, round(experts)), num_null_experts,
                         min_experts, default_max_experts(columns, experts, max_experts), num_groups, top_groups,
                         normalize_weights, scaling_factor, skip_nonfinite=config.num_shared_experts > 0)
        super().__init__(config, spec, budget=experts, capacity_factor=capacity_factor, initial_value=initial_top_p)

    @staticmethod
    def problems(config: ModelConfig, *, budget: float, budget_unit: str = "experts", initial_top_p: float = 0.4,
                 min_experts: int = 1, max_experts: int | None = None, score_function: str = "softmax",
                 normalize_weights: bool = True, scaling_factor: float = 1.0, num_groups: int = 1, top_groups: int = 1,
                 num_null_experts: int = 0, capacity_factor: float | None = None) -> list[str]:
        columns = config.num_experts + num_null_experts
        experts = experts_of_budget(config, budget, budget_unit)
        most = default_max_experts(columns, experts, max_experts)
        found = capacity_problems(capacity_factor) + budget_problems(config, budget, budget_unit, most, columns,
                                                                     min_experts)
        if not 0 < initial_top_p < 1:
            found.append(f"router.initial_top_p is {initial_top_p}; it must be between 0 and 1")
        return found or RouteSpec(config.num_experts, "top_p", score_function,  # type: ignore[arg-type]
                                  max(1, round(experts)), num_null_experts, min_experts, most, num_groups, top_groups,
                                  normalize_weights, scaling_factor).problems()
