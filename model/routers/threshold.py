"""Threshold routing: every expert takes the tokens whose score lies above a cut of its own."""

from __future__ import annotations

from model.config import ModelConfig
from model.routers.base import Router
from model.routers.config import ThresholdConfig


class ThresholdRouter(Router):
    """A token visits the experts whose score exceeds their cut, the (1 - budget / E) quantile of
    their scores over recent tokens (Expert Threshold, arXiv 2603.11535; dynamic quantile
    balancing). Budget and balance are met at once, without looking at other tokens of the batch.
    The cuts live in balance_bias, with the opposite sign.
    """

    law = ThresholdConfig.law

    def __init__(self, config: ModelConfig, settings: ThresholdConfig):
        super().__init__(
            config,
            settings.spec(config),
            budget=settings.experts_per_token(config),
            capacity_factor=settings.capacity_factor,
        )
