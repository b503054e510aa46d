"""ReLU routing: experts whose logit exceeds a cut of their own, with what exceeds it as gate."""

from __future__ import annotations

from model.config import ModelConfig
from model.routers.base import Router
from model.routers.config import ReLUConfig


class ReLURouter(Router):
    """Gates are ReLU(logit - cut) and an expert is visited where its gate is positive, so that
    routing is differentiable everywhere and a gate starts at zero (ReMoE, arXiv 2412.14711). There
    a penalty on the gates pushes the number of experts down to the budget, and nothing pushes it
    up; here each expert's cut is the quantile of its own logits that gives it its share of the
    budget, as in threshold routing. The cuts live in balance_bias, with the opposite sign.
    """

    law = ReLUConfig.law

    def __init__(self, config: ModelConfig, settings: ReLUConfig):
        super().__init__(
            config,
            settings.spec(config),
            budget=settings.experts_per_token(config),
            capacity_factor=settings.capacity_factor,
        )
