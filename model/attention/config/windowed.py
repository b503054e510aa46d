"""Settings of dense attention with sliding windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from model.attention.config.base import BY_HEAD, AttentionConfig, uneven_heads
from model.config import ModelConfig
from model.cost.parameters import windowed_layers

if TYPE_CHECKING:
    from model.attention.base import Attention


@dataclass(frozen=True, kw_only=True)
class WindowedAttentionConfig(AttentionConfig):
    """Dense attention of which some layers see a sliding window (gpt-oss, arXiv 2508.10925)."""

    name = "windowed"
    by_head = BY_HEAD | {"sinks": 0}
    gathers = True

    window: int = 128
    """Tokens up to and with the query that a sliding layer sees."""
    window_layers: Literal["alternate", "all"] | tuple[int, ...] = "alternate"
    """Layers that slide: every second one from the first on, all, or these; negative numbers count
    from the end.
    """
    sinks: bool = False
    """Learn a logit per head that takes its share of the softmax and has no value, on every
    layer.
    """

    def slides(self, model: ModelConfig, layer_idx: int) -> bool:
        """Whether the layer sees a window alone."""
        return layer_idx in windowed_layers(model.num_layers, self.arguments)

    def work(self, model: ModelConfig, places: Any) -> Any:
        sliding = len(windowed_layers(model.num_layers, self.arguments))
        seen = (places + 1).clamp(max=self.window)
        return sliding * seen + (model.num_layers - sliding) * (places + 1)

    def context_problems(self, model: ModelConfig, size: int) -> list[str]:
        return uneven_heads(model, size)

    def problems(self, model: ModelConfig) -> list[str]:
        found = []
        if self.window < 1:
            found.append(f"attention.window is {self.window}; it must be at least 1")
        if isinstance(self.window_layers, str):
            return found
        found += [
            f"attention.window_layers names layer {i}, but the model has {model.num_layers} layers"
            for i in self.window_layers
            if not -model.num_layers <= i < model.num_layers
        ]
        if not self.window_layers and not self.sinks:
            found.append(
                "attention.window_layers is empty and attention.sinks false, which is dense "
                "attention; use attention=dense"
            )
        return found

    def build(self, model: ModelConfig, layer_idx: int = 0) -> Attention:
        from model.attention.windowed import WindowedAttention

        return WindowedAttention(model, self, layer_idx)
