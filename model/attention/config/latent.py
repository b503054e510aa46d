"""Settings of multi-head latent attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from model.attention.config.base import AttentionConfig, model_uncombined, uneven_heads
from model.config import ModelConfig

if TYPE_CHECKING:
    from model.attention.base import Attention


@dataclass(frozen=True, kw_only=True)
class MlaConfig(AttentionConfig):
    """Multi-head latent attention (arXiv 2405.04434): every query sees everything before it in its
    document; keys and values of all heads are projections of one latent.
    """

    name = "mla"
    gathers = True
    by_head: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(("q_proj.weight", "q_b_proj.weight", "kv_b_proj.weight"), 0),
        "o_proj.weight": 1,
    }

    q_lora_rank: int | None = 1536
    """Width of the latent that queries come from; null: they come from the hidden state."""
    kv_lora_rank: int = 512
    """Width of the latent that keys and values come from."""
    qk_nope_head_dim: int = 128
    """Dimensions of a head's query and key that know nothing of positions."""
    qk_rope_head_dim: int = 64
    """Dimensions that are turned by the position; their key is the same for all heads."""
    v_head_dim: int = 128
    """Dimensions of a head's value."""

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def softmax_scale(self, model: ModelConfig) -> float:
        """What the logits are multiplied by."""
        stretched = 1.0 if model.rope_scaling is None else model.rope_scaling.latent_softmax_factor
        return float(self.qk_head_dim**-0.5) * stretched

    def rotary_size(self, model: ModelConfig) -> int:
        return self.qk_rope_head_dim

    def context_problems(self, model: ModelConfig, size: int) -> list[str]:
        return uneven_heads(model, size)

    def problems(self, model: ModelConfig) -> list[str]:
        found = [
            f"attention.{name} is {value}; it must be at least 1"
            + (", or null for queries without a latent" if name == "q_lora_rank" else "")
            for name, value in self.arguments.items()
            if value is not None and value < 1
        ]
        if self.qk_rope_head_dim % 2:
            found.append(
                f"attention.qk_rope_head_dim is {self.qk_rope_head_dim}; rotary embedding needs an "
                "even number"
            )

        # What the model says of attention must not contradict, nor be left unread.
        if model.num_kv_heads != model.num_heads:
            found.append(
                f"model.num_kv_heads is {model.num_kv_heads}, but with attention=mla each of the "
                f"model.num_heads {model.num_heads} heads has keys and values of its own, made "
                f"from the latent; set model.num_kv_heads={model.num_heads}"
            )
        if model.head_dim not in (None, self.qk_head_dim):
            found.append(
                f"model.head_dim is {model.head_dim}, but with attention=mla a head has "
                "attention.qk_nope_head_dim + attention.qk_rope_head_dim = "
                f"{self.qk_head_dim} dimensions; set model.head_dim=null"
            )
        instead = {
            "qk_norm": ("none", "which normalises the latents"),
            "attention_bias": ("none", "whose projections have no biases"),
            "attention_multiplier": (None, "whose logits are scaled by their own dimensions"),
            "rotary_dim": (None, "where attention.qk_rope_head_dim says what is turned"),
        }
        return found + model_uncombined(model, "mla", instead)

    def build(self, model: ModelConfig, layer_idx: int = 0) -> Attention:
        from model.attention.latent import LatentAttention

        return LatentAttention(model, self)
