"""The shape of a model, as one frozen record. Imports no torch: `launch.plan` and `--cfg job` read it without a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """Decoder-only mixture-of-experts transformer.

    A layer is dense when it is among the first `num_dense_layers`, or when it is not on the grid of
    `moe_layer_interval`; all other layers hold `num_experts` experts. `num_experts: 0` is a dense model.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    """Width of the SwiGLU of dense layers."""
    num_experts: int
    expert_intermediate_size: int
    max_seq_len: int
    head_dim: int | None = None
    """None: hidden_size / num_heads."""
    num_shared_experts: int = 0
    """Experts every token visits, fused into one SwiGLU of num_shared_experts * expert_intermediate_size."""
    num_dense_layers: int = 0
    moe_layer_interval: int = 1
    qk_norm: Literal["none", "head", "hidden"] = "none"
    """RMSNorm on queries and keys: per head (Qwen3) or over all heads together (OLMoE)."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    recompute: Literal["none", "block"] = "none"
    """Activation checkpointing: keep only block inputs and recompute the rest in backward."""

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    def is_moe_layer(self, layer_idx: int) -> bool:
        if self.num_experts == 0 or layer_idx < self.num_dense_layers:
            return False
        return (layer_idx - self.num_dense_layers + 1) % self.moe_layer_interval == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_layers) if self.is_moe_layer(i))

    def problems(self) -> list[str]:
        """Every contradiction in the shape, as sentences that name the value and the way out."""
        found = []
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size",
                     "max_seq_len", "moe_layer_interval"):
            if getattr(self, name) < 1:
                found.append(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if found:
            return found
        if self.head_dim is not None and self.head_dim < 2:
            found.append(f"model.head_dim is {self.head_dim}; it must be an even number of at least 2")
        elif self.head_dim is None and self.hidden_size % self.num_heads:
            found.append(f"model.hidden_size {self.hidden_size} is not divisible by model.num_heads {self.num_heads}; "
                         "change one of them or set model.head_dim")
        elif self.attention_head_dim % 2:
            found.append(f"the head dimension {self.attention_head_dim} is odd; rotary embedding needs an even one")
        if self.num_heads % self.num_kv_heads:
            found.append(f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}")
        if self.num_experts < 0:
            found.append(f"model.num_experts is {self.num_experts}; use 0 for a dense model")
        if self.num_experts > 0:
            if self.expert_intermediate_size < 1:
                found.append(f"model.expert_intermediate_size is {self.expert_intermediate_size}; it must be at least 1")
            if not self.moe_layers:
                found.append(f"model.num_experts is {self.num_experts} but no layer is an MoE layer: num_dense_layers "
                             f"{self.num_dense_layers} and moe_layer_interval {self.moe_layer_interval} leave none of "
                             f"{self.num_layers}; lower them or set num_experts=0")
        if self.num_shared_experts < 0 or self.num_dense_layers < 0:
            found.append("model.num_shared_experts and model.num_dense_layers must not be negative")
        if self.norm_eps <= 0 or self.rope_theta <= 0 or self.init_std <= 0:
            found.append("model.norm_eps, model.rope_theta and model.init_std must be positive")
        return found


@dataclass(frozen=True)
class BalanceConfig:
    """What keeps the experts evenly loaded. All coefficients act on per-token means (docs/numerics.md)."""

    aux_loss_coeff: float = 0.0
    aux_loss_scope: Literal["sequence", "batch", "global_batch"] = "batch"
    """The tokens the load fractions are taken over: one sequence; one micro-batch over all data-parallel ranks;
    or all micro-batches of the optimisation step so far, over all data-parallel ranks."""
    z_loss_coeff: float = 0.0
    bias_update_rate: float = 0.0
    """Loss-free balancing (arXiv 2408.15664): step of the per-expert selection bias, once per optimiser step."""

    def problems(self) -> list[str]:
        return [f"balance.{name} is {getattr(self, name)}; it must not be negative"
                for name in ("aux_loss_coeff", "z_loss_coeff", "bias_update_rate") if getattr(self, name) < 0]
