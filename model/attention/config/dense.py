"""Settings of dense attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.attention.config.base import BY_HEAD, AttentionConfig, uneven_heads
from model.config import ModelConfig

if TYPE_CHECKING:
    from model.attention.base import Attention


@dataclass(frozen=True, kw_only=True)
class DenseAttentionConfig(AttentionConfig):
    """Every query sees everything before it in its document."""

    name = "dense"
    by_head = BY_HEAD
    gathers = True

    def problems(self, model: ModelConfig) -> list[str]:
        return []

    def context_problems(self, model: ModelConfig, size: int) -> list[str]:
        return uneven_heads(model, size)

    def build(self, model: ModelConfig, layer_idx: int = 0) -> Attention:
        from model.attention.dense import DenseAttention

        return DenseAttention(model)
