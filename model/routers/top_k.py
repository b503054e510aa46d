"""Top-k routing: the same number of experts for every token, with null experts a varying number of real ones."""

from __future__ import annotations

import math
from typing import Literal

from model.config import ModelConfig, experts_of_budget
from model.parallel import ParallelGroups
from model.routers.base import Router, budget_problems, capacity_problems
from ops.router import RouteSpec


class TopKRouter(Router):
    """Each token visits the `top_k` experts with the highest score + bias; ties go to the lower expert id.

    score_function: "softmax" over the experts (Switch, arXiv 2101.03961), "sigmoid" per expert (DeepSeek-V3, arXiv
        2412.19437) or "sqrt_softplus". Logits and scores are fp32 whatever the precision of the model.
    normalize_weights: gates of a token sum to 1. With top_k = 1 this would make every gate 1 and starve the router of
        gradient, so it is refused.
    scaling_factor: multiplies the gates (routed_scaling_factor).
    num_groups, top_groups: only the experts of the best groups take part (DeepSeek-V3's node-limited routing).
    """

    def __init__(self, config: ModelConfig, groups: ParallelGroups | None = None, layer_idx: int = 0, *, top_k: int,
                 score_function: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax",
                 normalize_weights: bool = True, scaling_factor: float = 1.0, num_groups: int = 1, top_groups: int = 1,
                 capacity_factor: float | None = None):
        spec = RouteSpec(config.num_experts, "top_k", score_function, top_k, max_experts=top_k, num_groups=num_groups,
                         top_groups=top_groups, normalize_weights=normalize_weights, scaling_factor=scaling_factor,
                         skip_nonfinite=config.num_shared_experts > 0)
        super().__init__(config, spec, capacity_factor=capacity_factor)

    @staticmethod
    def problems(config: ModelConfig, *, top_k: int, score_function: str = "softmax", normalize_weights: bool = True,
                 scaling_factor: float = 1.0, num_groups: int = 1, top_groups: int = 1,
                 capacity_factor: float | None = None) -> list[str]:
        """Contradictions between the router's knobs and the model, for launch.validate."""
        if score_function == "relu":
            return ["router.score_function relu belongs to router=relu"]
        if not 1 <= top_k <= config.num_experts:
            return [f"router.top_k is {top_k}; it must be between 1 and model.num_experts {config.num_experts}",
                    *RouteSpec(config.num_experts, "top_k", score_function, 1, max_experts=1,  # type: ignore[arg-type]
                               normalize_weights=False, scaling_factor=scaling_factor).problems()]
        spec = RouteSpec(config.num_experts, "top_k", score_function, top_k,  # type: ignore[arg-type]
                         max_experts=top_k, num_groups=num_groups, top_groups=top_groups,
                         normalize_weights=normalize_weights, scaling_factor=scaling_factor)
        return spec.problems() + capacity_problems(capacity_factor)


def _ranks(config: ModelConfig, top_k: int | None, experts: float) -> int:
    return top_k if top_k is not None else min(config.num_experts, 2 * max(1, math.ceil(experts)))


class NullExpertsRouter(Router):
    """Top-k over the experts and `num_null_experts` columns that cost nothing: a token that chooses those visits fewer
    experts (arXiv 2406.13233, 2509.01322). Gates are normalised over the real ones. The null experts' keys are their
    scores; an expert's selection bias is the quantile of its score over the null expert it has to beat that gives it its
    share of `budget`, so that budget and load are held together. The biases never enter a gate, and no logit moves.

    top_k: experts and null experts together; None: twice the budget.
    """

    law = "null"

    def __init__(self, config: ModelConfig, groups: ParallelGroups | None = None, layer_idx: int = 0, *,
                 num_null_experts: int, budget: float, top_k: int | None = None,
                 budget_unit: Literal["experts", "flops"] = "experts",
                 score_function: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax",
                 normalize_weights: bool = True, scaling_factor: float = 1.0, capacity_factor: float | None = None):
        experts = experts_of_budget(config, budget, budget_unit)
        ranks = _ranks(config, top_k, experts)
        spec = RouteSpec(config.num_experts, "top_k", score_function, ranks, num_null_experts, max_experts=ranks,
                         normalize_weights=normalize_weights, scaling_factor=scaling_factor,
                         skip_nonfinite=config.num_shared_experts > 0)
        super().__init__(config, spec, budget=experts, capacity_factor=capacity_factor)

    @staticmethod
    def problems(config: ModelConfig, *, num_null_experts: int, budget: float, top_k: int | None = None,
                 budget_unit: str = "experts",
                 score_function: str = "softmax", normalize_weights: bool = True, scaling_factor: float = 1.0,
                 capacity_factor: float | None = None) -> list[str]:
        ranks = _ranks(config, top_k, experts_of_budget(config, budget, budget_unit))
        most = min(ranks, config.num_experts)
        found = capacity_problems(capacity_factor) + budget_problems(config, budget, budget_unit, ranks, most)
        experts = experts_of_budget(config, budget, budget_unit)
        if num_null_experts >= 1 and experts <= ranks - num_null_experts:
            found.append(f"router.num_null_experts is {num_null_experts}, so that "
                         f"{ranks - num_null_experts} of router.top_k {ranks} are experts at least; a "
                         f"mean of {experts:.3g} needs more null experts or a lower top_k")
        if num_null_experts < 1:
            found.append(f"router.num_null_experts is {num_null_experts}; router=null_experts needs at least 1")
        if score_function == "relu":
            found.append("router.score_function relu belongs to router=relu")
        return found + RouteSpec(config.num_experts, "top_k", score_function, ranks,  # type: ignore[arg-type]
                                 num_null_experts, max_experts=ranks, normalize_weights=normalize_weights,
                                 scaling_factor=scaling_factor).problems()
