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
    top_k: int = 2
    """Experts per token the model is meant for: the default of router.top_k and router.budget."""
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
    loss_chunk_size: int = 0
    """Logits and loss of so many tokens at a time, the logits once more in backward; 0: all of the micro-batch at once."""

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
            if not 1 <= self.top_k <= self.num_experts:
                found.append(f"model.top_k is {self.top_k}; it must be between 1 and model.num_experts {self.num_experts}")
            if self.expert_intermediate_size < 1:
                found.append(f"model.expert_intermediate_size is {self.expert_intermediate_size}; it must be at least 1")
            if not self.moe_layers:
                found.append(f"model.num_experts is {self.num_experts} but no layer is an MoE layer: num_dense_layers "
                             f"{self.num_dense_layers} and moe_layer_interval {self.moe_layer_interval} leave none of "
                             f"{self.num_layers}; lower them or set num_experts=0")
        if self.num_shared_experts < 0 or self.num_dense_layers < 0:
            found.append("model.num_shared_experts and model.num_dense_layers must not be negative")
        if self.loss_chunk_size < 0:
            found.append(f"model.loss_chunk_size is {self.loss_chunk_size}; give a number of tokens, or 0 for all")
        if self.norm_eps <= 0 or self.rope_theta <= 0 or self.init_std <= 0:
            found.append("model.norm_eps, model.rope_theta and model.init_std must be positive")
        return found


@dataclass(frozen=True)
class ExpertsConfig:
    """How the experts compute (ops/grouped_mlp)."""

    backend: Literal["auto", "triton", "grouped_mm", "torch", "reference"] = "auto"
    """auto: the fastest that the device has; the run says which."""
    recompute: bool = False
    """Compute the up-projection again in backward, instead of keeping 2 * expert_intermediate_size values per assignment."""
    token_rounding: int = 0
    """In training, round each expert's assignments of a micro-batch to a multiple of this (ops/router/spill.py); 0: off."""

    def problems(self) -> list[str]:
        if self.token_rounding < 0:
            return [f"experts.token_rounding is {self.token_rounding}; give a tile size such as 128, or 0 to switch it off"]
        return []


@dataclass(frozen=True)
class BalanceConfig:
    """What keeps the experts evenly loaded. All coefficients act on per-token means (docs/numerics.md)."""

    aux_loss_coeff: float = 0.0
    aux_loss_scope: Literal["sequence", "batch", "global_batch"] = "batch"
    """The tokens the load fractions are taken over: one sequence; one micro-batch over all data-parallel ranks;
    or all micro-batches of the optimisation step so far, over all data-parallel ranks."""
    z_loss_coeff: float = 0.0
    bias_update: Literal["none", "sign", "quantile"] = "none"
    """How the selection bias follows the load, once per optimiser step. sign: by bias_update_rate towards an even load
    (loss-free balancing, arXiv 2408.15664). quantile: to the quantile of each expert's scores that gives it its share
    (quantile balancing, arXiv 2607.24653), read off a histogram."""
    bias_update_rate: float = 0.0
    """Step of bias_update=sign."""
    quantile_momentum: float = 0.5
    """Share of the old bias kept by a quantile update, 0 to 0.99; also that of the
    routers that balance by themselves."""
    histogram_bins: int = 256
    entropy_coeff: float = 0.0
    """Weight of the mean entropy of the router's softmax, in nats (arXiv 2403.07652): positive makes it decide."""
    orthogonality_coeff: float = 0.0
    """Weight of the L1 norm of R R^T - I over the normalised rows of the router, per expert (SimBal, arXiv 2506.14038)."""

    def problems(self) -> list[str]:
        found = [f"balance.{name} is {getattr(self, name)}; it must not be negative"
                 for name in ("aux_loss_coeff", "z_loss_coeff", "bias_update_rate", "entropy_coeff", "orthogonality_coeff")
                 if getattr(self, name) < 0]
        if (self.bias_update == "sign") != (self.bias_update_rate > 0):
            found.append(f"balance.bias_update_rate {self.bias_update_rate} belongs to balance.bias_update=sign, which is "
                         f"{self.bias_update}: set both or neither")
        if not 0 <= self.quantile_momentum < 1:
            found.append(f"balance.quantile_momentum is {self.quantile_momentum}; it must be in [0, 1)")
        if not 16 <= self.histogram_bins <= 4096:
            found.append(f"balance.histogram_bins is {self.histogram_bins}; it must be between 16 and 4096")
        return found


@dataclass(frozen=True)
class BudgetConfig:
    """How the mean number of experts per token is held to router.budget (model/budget.py)."""

    kp: float = 0.5
    """Gain on the change of the smoothed relative error."""
    ki: float = 0.2
    """Gain on the smoothed relative error itself, per step."""
    error_momentum: float = 0.8
    """Share of the smoothed error kept each step, 0 to 0.99; 0: the step's own error."""
    scope: Literal["layer", "model"] = "layer"
    """Whose mean is held: every layer's, or that over all layers."""
    warm_start_steps: int = 50
    """Steps of plain top-k at the start, while the scores settle."""
    blend_steps: int = 50
    """Steps over which the number of experts then moves from top-k to the mode's own."""
    guard_error: float = 0.25
    """A layer whose smoothed error stays above this for guard_steps (five times as long if it was never within half of it)
    falls back to top-k."""
    guard_steps: int = 20
    guard_capped: float = 0.5
    """So does a layer with a larger share of tokens at router.max_experts."""
    hold_steps: int = 200
    """How long a layer stays in a fallback before it tries again."""

    def problems(self) -> list[str]:
        found = [f"budget.{name} is {getattr(self, name)}; it must not be negative"
                 for name in ("kp", "ki", "warm_start_steps", "blend_steps") if getattr(self, name) < 0]
        if not 0 <= self.error_momentum < 1:
            found.append(f"budget.error_momentum is {self.error_momentum}; it must be in [0, 1)")
        if self.kp >= 2 or self.ki >= 1:
            found.append(f"budget.kp {self.kp} and budget.ki {self.ki} must be below 2 and 1, or the controller oscillates")
        found += [f"budget.{name} is {getattr(self, name)}; it must be positive"
                  for name in ("guard_error", "guard_steps", "guard_capped", "hold_steps") if getattr(self, name) <= 0]
        if self.guard_capped > 1:
            found.append(f"budget.guard_capped is {self.guard_capped}; it is a share of tokens, at most 1 (which switches "
                         "it off)")
        return found


@dataclass(frozen=True)
class FailSafeConfig:
    """What happens when routing goes wrong; every fallback counts its tokens under moe/fallback (ops/router/README.md)."""

    collapse_share: float = 1.0
    """F2: a layer whose busiest round(k) experts take this share of all assignments falls back to one expert a token (and
    the shared one) for budget.hold_steps, its bias frozen. 1: off."""
    spike_zscore: float = 0.0
    """F4: a gradient norm this many standard deviations above its running mean makes the next freeze_steps steps select
    experts with the router weights of the last snapshot. 0: off."""
    freeze_steps: int = 20
    snapshot_interval: int = 50
    """Steps between the snapshots F4 goes back to."""
    rank_overload: float = 0.0
    """F5: while the busiest rank of an expert group has had more than this many times the mean load for overload_steps,
    the layer's most experts per token go down by one. 0: off."""
    overload_steps: int = 20

    def problems(self) -> list[str]:
        found = []
        if not 0 < self.collapse_share <= 1:
            found.append(f"fail_safe.collapse_share is {self.collapse_share}; it must be in (0, 1] (1 switches it off)")
        if self.spike_zscore < 0 or self.rank_overload < 0 or 0 < self.rank_overload <= 1:
            found.append("fail_safe.spike_zscore must not be negative and fail_safe.rank_overload must be 0 or above 1")
        found += [f"fail_safe.{name} is {getattr(self, name)}; it must be at least 1"
                  for name in ("freeze_steps", "snapshot_interval", "overload_steps") if getattr(self, name) < 1]
        return found


def experts_of_budget(config: ModelConfig, budget: float, unit: str) -> float:
    """Mean experts per token of a budget in experts, or in forward FLOPs of the routed experts per token (6 D F each,
    over all MoE layers)."""
    if unit == "experts":
        return budget
    return budget / (6 * config.hidden_size * config.expert_intermediate_size * max(1, len(config.moe_layers)))
