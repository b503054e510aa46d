"""Top-k routing: the same number of experts for every token, with null experts a varying number of
real ones.
"""

from __future__ import annotations

from model.config import ModelConfig
from model.routers.base import Router
from model.routers.config import NullExpertsConfig, TopKConfig


class TopKRouter(Router):
    """Each token visits the `top_k` experts with the highest score + bias (TopKConfig)."""

    law = TopKConfig.law

    def __init__(self, config: ModelConfig, settings: TopKConfig):
        super().__init__(
            config,
            settings.spec(config),
            capacity_factor=settings.capacity_factor,
            logit_bias=settings.bias,
        )


class NullExpertsRouter(Router):
    """Top-k over the experts and `num_null_experts` columns that cost nothing (NullExpertsConfig).

    Gates are normalised over the real experts. The null experts' keys are their scores; an expert's
    selection bias is the quantile of its score over the null expert it has to beat that gives it
    its share of the budget, so that budget and load are held together. The biases never enter a
    gate, and no logit moves.
    """

    law = NullExpertsConfig.law

    def __init__(self, config: ModelConfig, settings: NullExpertsConfig):
        super().__init__(
            config,
            settings.spec(config),
            budget=settings.experts_per_token(config),
            capacity_factor=settings.capacity_factor,
        )
