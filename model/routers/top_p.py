"""Top-p routing: as many experts as it takes to cover a share of the scores."""

from __future__ import annotations

from model.config import ModelConfig
from model.routers.base import Router
from model.routers.config import TopPConfig


class TopPRouter(Router):
    """Each token visits the fewest experts whose share of the scores reaches P (arXiv 2403.07652):
    a token the router is sure of needs few. The controller moves logit(P) until the mean is the
    budget (arXiv 2512.13996).
    """

    law = TopPConfig.law

    def __init__(self, config: ModelConfig, settings: TopPConfig):
        super().__init__(
            config,
            settings.spec(config),
            budget=settings.experts_per_token(config),
            capacity_factor=settings.capacity_factor,
            initial_value=settings.initial_top_p,
        )
