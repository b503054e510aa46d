"""Threshold routing: every expert takes the tokens whose score lies above a cut of its own."""

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


class ThresholdRouter(Router):
    """A token visits the experts whose score exceeds their cut, the (1 - budget / E) quantile of their scores over recent
    tokens (Expert Threshold, arXiv 2603.11535; dynamic quantile balancing). Budget and balance are met at once, without
    looking at other tokens of the batch. The cuts live in balance_bias, with the opposite sign.

    min_experts: 1 gives a token that clears no cut its best expert (by score minus cut); 0 leaves it to the shared expert.
        None: 0 where there is a shared expert.
    """

    law = "quantile"

    def __init__(self, config: ModelConfig, groups: ParallelGroups | None = None, layer_idx: int = 0, *, budget: float,
                 budget_unit: Literal["experts", "flops"] = "experts", min_experts: int | None = None,
                 max_experts: int | None = None,
                 score_function: Literal["softmax", "sigmoid", "sqrt_softplus"] = "sigmoid",
                 normalize_weights: bool = False, scaling_factor: float = 1.0, capacity_factor: float | None = None):
        experts = experts_of_budget(config, budget, budget_unit)
        spec = RouteSpec(config.num_experts, "threshold", score_function, max(1, round(experts)), 0,
                         least_experts(config, min_experts),
                         default_max_experts(config.num_experts, experts, max_experts),
                         normalize_weights=normalize_weights, scaling_factor=scaling_factor,
                         skip_nonfinite=config.num_shared_experts > 0)
        super().__init__(config, spec, budget=experts, capacity_factor=capacity_factor)

    @staticmethod
    def problems(config: ModelConfig, *, budget: float, budget_unit: str = "experts", min_experts: int | None = None,
                 max_experts: int | None = None, score_function: str = "sigmoid", normalize_weights: bool = False,
                 scaling_factor: float = 1.0, capacity_factor: float | None = None) -> list[str]:
        experts = experts_of_budget(config, budget, budget_unit)
        most = default_max_experts(config.num_experts, experts, max_experts)
        found = capacity_problems(capacity_factor) + budget_problems(config, budget, budget_unit, most, config.num_experts,
                                                                     least_experts(config, min_experts))
        if score_function == "relu":
            found.append("router.score_function relu belongs to router=relu")
        least = least_experts(config, min_experts)
        if least == 0 and not config.num_shared_experts:
            found.append("router.min_experts=0 leaves tokens without any expert; it needs model.num_shared_experts")
        return found or RouteSpec(config.num_experts, "threshold", score_function,  # type: ignore[arg-type]
                                  max(1, round(experts)), 0, least, most, normalize_weights=normalize_weights,
                                  scaling_factor=scaling_factor).problems()
