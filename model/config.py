"""The shape of a model, as one frozen record. Imports no torch: `launch.plan` and `--cfg job` read
it without a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from ops.grouped_mlp.spec import Activation, Precision


@dataclass(frozen=True)
class RopeScaling:
    """How a model that was trained on short texts turns its queries and keys on longer ones."""

    type: Literal["linear", "llama3", "yarn"]
    """linear: every frequency over `factor` (arXiv 2306.15595). llama3: low frequencies over
    `factor`, high ones as they are, a ramp between (Llama 3.1). yarn: likewise with a ramp over the
    dimensions, and larger logits (arXiv 2309.00071).
    """
    factor: float
    """How many times longer the texts are."""
    original_max_seq_len: int | None = None
    """Longest text of the training before; of llama3 and yarn, which need it."""
    low_freq_factor: float | None = None
    """llama3: frequencies that turn fewer times than this over the original length are low."""
    high_freq_factor: float | None = None
    """llama3: and those that turn more often than this are high."""
    beta_fast: float | None = None
    """yarn: as high_freq_factor, 32 where it is null."""
    beta_slow: float | None = None
    """yarn: as low_freq_factor, 1 where it is null."""
    truncate: bool = True
    """yarn: the ramp begins and ends at whole dimensions; gpt-oss does without."""
    mscale: float | None = None
    """yarn, with mscale_all_dim: cosines and sines are multiplied by the quotient of
    `yarn_magnitude` of both (DeepSeek).
    """
    mscale_all_dim: float | None = None
    """yarn: see mscale; in latent attention (MLA) it also multiplies the softmax's scale."""
    attention_factor: float | None = None
    """yarn: multiplies cosines and sines, whatever mscale says. None: as mscale says, or
    yarn_magnitude(factor).
    """

    @property
    def table_factor(self) -> float:
        """What cosines and sines are multiplied by; the logits get its square."""
        if self.type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_magnitude(self.factor, self.mscale) / yarn_magnitude(
                self.factor, self.mscale_all_dim
            )
        return yarn_magnitude(self.factor)

    @property
    def latent_softmax_factor(self) -> float:
        """What latent attention (MLA) multiplies 1 / sqrt(head dimension) by: there only a part of
        a head is turned, and the table's factor would leave out the rest (DeepSeek-V2).
        """
        if self.type != "yarn" or not self.mscale_all_dim:
            return 1.0
        return yarn_magnitude(self.factor, self.mscale_all_dim) ** 2

    def problems(self) -> list[str]:
        """Every contradiction, as sentences that name the value and the way out."""
        name, found = "model.rope_scaling", []
        if self.factor < 1:
            found.append(f"{name}.factor is {self.factor}; it must be at least 1")

        # What another type reads would be ignored here.
        read = {
            "linear": (),
            "llama3": ("original_max_seq_len", "low_freq_factor", "high_freq_factor"),
            "yarn": (
                "original_max_seq_len",
                *("beta_fast", "beta_slow"),
                *("mscale", "mscale_all_dim", "attention_factor"),
            ),
        }
        for key in (*read["llama3"], *read["yarn"][1:]):
            value = getattr(self, key)
            if value is not None and key not in read[self.type]:
                found.append(
                    f"{name}.{key} is {value}, but {name}.type={self.type} does not read it; set "
                    "it to null"
                )
            elif value is not None and value <= 0:
                found.append(f"{name}.{key} is {value}; it must be positive, or null")
        if not self.truncate and self.type != "yarn":
            found.append(f"{name}.truncate=false belongs to {name}.type=yarn, not {self.type}")

        needed = read["llama3"] if self.type == "llama3" else read[self.type][:1]
        found += [
            f"{name}.{key} is null; {name}.type={self.type} needs it"
            for key in needed
            if getattr(self, key) is None
        ]
        if found:
            return found
        low, high = self.ramp
        # A ramp of one point is a step: Kimi K2's is.
        if self.type != "linear" and (low > high or (low == high and self.type == "llama3")):
            keys = (
                "low_freq_factor and high_freq_factor"
                if self.type == "llama3"
                else "beta_slow and beta_fast"
            )
            found.append(f"{name}: {keys} are {low} and {high}; the first must be the smaller one")
        return found

    @property
    def ramp(self) -> tuple[float, float]:
        """Turns over the original length below which a frequency is low, and above which it is
        high.
        """
        if self.type == "llama3":
            assert self.low_freq_factor is not None and self.high_freq_factor is not None
            return self.low_freq_factor, self.high_freq_factor
        return self.beta_slow or 1.0, self.beta_fast or 32.0


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """0.1 * weight * ln(factor) + 1, by which YaRN enlarges queries and keys (arXiv 2309.00071,
    equation 22).
    """
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Decoder-only mixture-of-experts transformer.

    A layer is dense when it is among the first `num_dense_layers`, or when it is not on the grid of
    `moe_layer_interval`; all other layers hold `num_experts` experts. `num_experts: 0` is a dense
    model.
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
    """Experts every token visits, fused into one SwiGLU of num_shared_experts *
    expert_intermediate_size.
    """
    num_dense_layers: int = 0
    moe_layer_interval: int = 1
    num_mtp_layers: int = 0
    """Modules of multi-token prediction behind the last layer, each with a block, and experts where
    the model has some; trained with weight train.mtp_coeff, not used by generation.
    """
    qk_norm: Literal["none", "head", "hidden"] = "none"
    """RMSNorm on queries and keys: per head (Qwen3) or over all heads together (OLMoE)."""
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    """Which projections of attention add a bias: none, those of queries, keys and values (Qwen2),
    or the one back as well.
    """
    attention_multiplier: float | None = None
    """What attention's logits are multiplied by. None: 1 / sqrt(head dimension)."""
    rope_theta: float = 10000.0
    rotary_dim: int | None = None
    """Only so many first dimensions of a head are turned (GLM-4, MiniMax-M2). None: all."""
    rope_scaling: RopeScaling | None = None
    """How positions beyond those of an earlier training are turned. None: as any others."""
    activation: Activation = "swiglu"
    """Of every gated MLP: swiglu, or clamped as gpt-oss (clamped_swiglu) and DeepSeek-V4
    (limited_swiglu) have it (ops/grouped_mlp/spec.py).
    """
    expert_bias: bool = False
    """Both products of the routed experts add biases (gpt-oss)."""
    shared_expert_gate: bool = False
    """The shared expert's output is multiplied by the sigmoid of a projection of the token
    (Qwen2-MoE).
    """
    embedding_multiplier: float = 1.0
    """Of the embedded tokens (this, residual_multiplier and logits_divisor: Granite)."""
    residual_multiplier: float = 1.0
    """Of what attention and MLP add to the residual stream."""
    logits_divisor: float = 1.0
    """What the head's logits are divided by."""
    num_residual_streams: int = 1
    """Vectors of a token between layers, which read, write and mix them by learned weights of its
    state (manifold-constrained hyper-connections, mHC, arXiv 2512.24880; DeepSeek-V4: 4). 1: a
    layer's output is added to one, as in most models.
    """
    sinkhorn_steps: int = 20
    """Of several streams: how often columns of the matrix that mixes them, and rows in between, are
    made to sum to 1.
    """
    sinkhorn_eps: float = 1e-6
    """Of several streams: what is added to their weights and to those sums."""
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    """Standard deviation of the first weights, which `init` makes others of."""
    init: Literal["depth_scaled", "normal", "truncated_normal", "small", "mup"] = "depth_scaled"
    """How first weights are drawn (docs/concepts/first_weights.md). depth_scaled: Normal(0,
    init_std), and init_std / sqrt(2 num_layers) for what projects back into the residual stream
    (GPT-2). normal: all alike (DeepSeek-V3). truncated_normal: within three standard deviations
    (OLMoE). small: sqrt(2 / (5 hidden_size)), and 2 / (num_layers sqrt(hidden_size)) back
    (GPT-NeoX-20B). mup: so that settings of a narrower model hold, learning rates included.
    """
    mup_base_hidden_size: int | None = None
    """Of init=mup: hidden_size of the model whose learning rates and init_std these are; its other
    widths are in proportion.
    """
    mup_base_head_dim: int | None = None
    """Of init=mup: its head dimension, where heads grow with the width and not in number. None: it
    is the same.
    """
    mup_base_num_layers: int | None = None
    """Of init=mup: its number of layers; what a layer adds to the residual stream is multiplied by
    this over num_layers (CompleteP). None: depth is not scaled but for first weights, as
    depth_scaled has them.
    """
    recompute: Literal["none", "block"] = "none"
    """Activation checkpointing: keep only block inputs and recompute the rest in backward."""
    loss_chunk_size: int = 0
    """Logits and loss of so many tokens at a time, the logits once more in backward; 0: all of the
    micro-batch at once.
    """

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    @property
    def rotary_size(self) -> int:
        """Dimensions of a head that are turned."""
        return self.attention_head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def residual_size(self) -> int:
        """Values of a token between layers, and between stages."""
        return self.num_residual_streams * self.hidden_size

    @property
    def width_ratio(self) -> float:
        """Of init=mup: how many times wider than its base the model is; else 1."""
        if self.init != "mup" or self.mup_base_hidden_size is None:
            return 1.0
        return self.hidden_size / self.mup_base_hidden_size

    @property
    def depth_ratio(self) -> float:
        """Likewise, how many times deeper."""
        if self.init != "mup" or self.mup_base_num_layers is None:
            return 1.0
        return self.num_layers / self.mup_base_num_layers

    @property
    def whole_logits_divisor(self) -> float:
        """What the head's logits are divided by. A tied head is as large as an embedding, and muP
        makes up for that here.
        """
        return self.logits_divisor * (self.width_ratio if self.tie_embeddings else 1.0)

    @property
    def residual_scale(self) -> float:
        """What is multiplied with all that attention and MLP add to the residual stream."""
        return self.residual_multiplier / self.depth_ratio

    @property
    def attention_scale(self) -> float | None:
        """What attention's logits are multiplied by. None: 1 / sqrt(head dimension)."""
        base = self.mup_base_head_dim if self.init == "mup" else None
        if base is None or base == self.attention_head_dim:
            return self.attention_multiplier
        usual = base**-0.5 if self.attention_multiplier is None else self.attention_multiplier
        return usual * base / self.attention_head_dim

    @property
    def plain_experts(self) -> bool:
        """Whether the experts are what every back-end of ops/grouped_mlp computes."""
        return self.activation == "swiglu" and not self.expert_bias

    def is_moe_layer(self, layer_idx: int) -> bool:
        if self.num_experts == 0 or layer_idx < self.num_dense_layers:
            return False
        if layer_idx >= self.num_layers:  # of multi-token prediction
            return True
        return (layer_idx - self.num_dense_layers + 1) % self.moe_layer_interval == 0

    @property
    def decoder_moe_layers(self) -> tuple[int, ...]:
        """Layers with experts that a generated token visits."""
        return tuple(i for i in range(self.num_layers) if self.is_moe_layer(i))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with experts that training visits: those of the blocks of multi-token prediction
        come last, numbered on.
        """
        every = range(self.num_layers + self.num_mtp_layers)
        return tuple(i for i in every if self.is_moe_layer(i))

    def size_problems(self) -> list[str]:
        """Sizes below one, with which nothing can be computed of the shape."""
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "intermediate_size",
            "max_seq_len",
            "moe_layer_interval",
        )
        return [
            f"model.{name} is {size}; it must be at least 1"
            for name in sizes
            if (size := getattr(self, name)) < 1
        ]

    def problems(self) -> list[str]:
        """Every contradiction in the shape, as sentences that name the value and the way out."""
        found = self.size_problems()
        if found:
            return found
        if self.head_dim is not None and self.head_dim < 2:
            found.append(
                f"model.head_dim is {self.head_dim}; it must be an even number of at least 2"
            )
        elif self.head_dim is None and self.hidden_size % self.num_heads:
            found.append(
                f"model.hidden_size {self.hidden_size} is not divisible by model.num_heads "
                f"{self.num_heads}; change one of them or set model.head_dim"
            )
        elif self.attention_head_dim % 2:
            found.append(
                f"the head dimension {self.attention_head_dim} is odd; rotary embedding needs an "
                "even one"
            )
        if self.num_heads % self.num_kv_heads:
            found.append(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads "
                f"{self.num_kv_heads}"
            )
        if self.num_experts < 0:
            found.append(f"model.num_experts is {self.num_experts}; use 0 for a dense model")
        if self.num_experts > 0:
            if not 1 <= self.top_k <= self.num_experts:
                found.append(
                    f"model.top_k is {self.top_k}; it must be between 1 and model.num_experts "
                    f"{self.num_experts}"
                )
            if self.expert_intermediate_size < 1:
                found.append(
                    f"model.expert_intermediate_size is {self.expert_intermediate_size}; it must "
                    "be at least 1"
                )
            if not self.decoder_moe_layers:
                found.append(
                    f"model.num_experts is {self.num_experts} but no layer is an MoE layer: "
                    f"num_dense_layers {self.num_dense_layers} and moe_layer_interval "
                    f"{self.moe_layer_interval} leave none of {self.num_layers}; lower them or set "
                    "num_experts=0"
                )
        if self.num_shared_experts < 0 or self.num_dense_layers < 0:
            found.append("model.num_shared_experts and model.num_dense_layers must not be negative")
        if self.num_mtp_layers < 0:
            found.append(
                f"model.num_mtp_layers is {self.num_mtp_layers}; use 0 for no multi-token "
                "prediction"
            )
        if self.loss_chunk_size < 0:
            found.append(
                f"model.loss_chunk_size is {self.loss_chunk_size}; give a number of tokens, or 0 "
                "for all"
            )
        if self.norm_eps <= 0 or self.rope_theta <= 0 or self.init_std <= 0:
            found.append("model.norm_eps, model.rope_theta and model.init_std must be positive")
        return found + self._feature_problems() + self._init_problems()

    def _init_problems(self) -> list[str]:
        """Of the first weights."""
        found = []
        bases = {
            name: getattr(self, name)
            for name in ("mup_base_hidden_size", "mup_base_head_dim", "mup_base_num_layers")
            if getattr(self, name) is not None
        }
        found += [
            f"model.{name} is {value}; it must be at least 1"
            for name, value in bases.items()
            if value < 1
        ]
        if self.init != "mup":
            found += [
                f"model.{name} is {value}, but it belongs to model.init=mup, which is {self.init}; "
                "drop it"
                for name, value in bases.items()
            ]
        elif self.mup_base_hidden_size is None:
            found.append(
                "model.init=mup needs model.mup_base_hidden_size, the width of the model whose "
                "learning rates these are"
            )
        usual = ModelConfig.__dataclass_fields__["init_std"].default
        if self.init == "small" and self.init_std != usual:
            found.append(
                f"model.init_std is {self.init_std}, but model.init=small follows from hidden_size "
                "and num_layers alone; drop it"
            )
        return found

    def _feature_problems(self) -> list[str]:
        """Of what some published families have and others do not."""
        found = []
        head_dim = self.attention_head_dim
        if self.rotary_dim is not None and (
            not 2 <= self.rotary_dim <= head_dim or self.rotary_dim % 2
        ):
            found.append(
                f"model.rotary_dim is {self.rotary_dim}; it must be an even number from 2 to the "
                f"head dimension {head_dim}, or null for all of it"
            )
        if self.rope_scaling is not None:
            found += self.rope_scaling.problems()
        found += self._stream_problems()
        if self.shared_expert_gate and not (self.num_shared_experts and self.num_experts):
            found.append(
                f"model.shared_expert_gate=true, but model.num_experts is {self.num_experts} and "
                f"model.num_shared_experts {self.num_shared_experts}: there is no shared expert to "
                "gate; switch it off"
            )
        if self.expert_bias and not self.num_experts:
            found.append(
                "model.expert_bias=true, but model.num_experts is 0: there are no experts; switch "
                "it off"
            )
        for name in (
            "embedding_multiplier",
            "residual_multiplier",
            "logits_divisor",
            "attention_multiplier",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append(f"model.{name} is {value}; it must be positive")
        return found

    def _stream_problems(self) -> list[str]:
        """Of the residual streams."""
        number, usual = self.num_residual_streams, ModelConfig.__dataclass_fields__
        if number < 1:
            return [f"model.num_residual_streams is {number}; use 1 for one residual stream"]
        if number == 1:
            return [
                f"model.{name} is {getattr(self, name)}, but model.num_residual_streams is 1, and "
                "one stream is not mixed; drop it"
                for name in ("sinkhorn_steps", "sinkhorn_eps")
                if getattr(self, name) != usual[name].default
            ]
        found = []
        if self.sinkhorn_steps < 1:
            found.append(f"model.sinkhorn_steps is {self.sinkhorn_steps}; it must be at least 1")
        if self.sinkhorn_eps < 0:
            found.append(f"model.sinkhorn_eps is {self.sinkhorn_eps}; it must not be negative")
        if self.num_mtp_layers:
            found.append(
                f"model.num_mtp_layers is {self.num_mtp_layers}, but what modules of multi-token "
                f"prediction do with model.num_residual_streams {number} is not defined; set "
                "model.num_mtp_layers=0"
            )
        if self.init == "mup":
            found.append(
                f"model.init is mup, which has no rule for what mixes model.num_residual_streams "
                f"{number}; choose another model.init"
            )
        return found


@dataclass(frozen=True)
class ExpertsConfig:
    """How the experts compute (ops/grouped_mlp)."""

    backend: Literal["auto", "triton", "grouped_mm", "torch", "reference"] = "auto"
    """auto: the fastest that the device has; the run says which."""
    recompute: bool = False
    """Compute the up-projection again in backward, instead of keeping 2 * expert_intermediate_size
    values per assignment.
    """
    token_rounding: int = 0
    """In training, round each expert's assignments of a micro-batch to a multiple of this
    (ops/router/overflow.py); 0: off.
    """
    precision: Precision = "native"
    """Of the experts' products (docs/concepts/fp8.md). native: train.precision. fp8: forward, and
    back to the tokens, of values rounded to 8-bit floats with a scale for each row; 8-bit tensor
    cores compute it from compute capability 8.9 on, other devices the same in wider products.
    fp8_all: gradients of the experts' weights as well, with a scale for each column of 128 rows.
    """

    def problems(self) -> list[str]:
        if self.token_rounding < 0:
            return [
                f"experts.token_rounding is {self.token_rounding}; give a tile size such as 128, "
                "or 0 to switch it off"
            ]
        return []


@dataclass(frozen=True)
class FactorSchedule:
    """What a setting is multiplied by over the steps of a run: 1, and from `start` on it falls to
    `floor`, which it reaches in the last step.
    """

    style: Literal["constant", "step", "linear", "cosine"] = "constant"
    """step: it falls at once, behind `start`."""
    start: float = 0.0
    """The last step at the whole setting: a share of train.num_steps where it is below 1."""
    floor: float = 0.0
    """Share of the setting that is left at the end."""

    def start_step(self, num_steps: int) -> int:
        """`start` as a number of steps."""
        return round(self.start * num_steps) if self.start < 1 else int(self.start)

    def factor(self, step: int, num_steps: int) -> float:
        """In step number `step`, the first of which is 1."""
        start = self.start_step(num_steps)
        if self.style == "constant" or step <= start:
            return 1.0
        passed = min(1.0, (step - start) / max(1, num_steps - start))
        left = {"step": 0.0, "linear": 1 - passed}.get(
            self.style, 0.5 * (1 + math.cos(math.pi * passed))
        )
        return self.floor + (1 - self.floor) * left

    def problems(self, about: str) -> list[str]:
        """about: the setting that this record is."""
        found = []
        if self.start < 0 or (self.start >= 1 and self.start != int(self.start)):
            found.append(
                f"{about}.start is {self.start}; give a share of train.num_steps below 1, or a "
                "whole number of steps"
            )
        if not 0 <= self.floor <= 1:
            found.append(f"{about}.floor is {self.floor}; it must be between 0 and 1")
        if self.style == "constant" and (self.start, self.floor) != (0.0, 0.0):
            found.append(
                f"{about}.start {self.start} and floor {self.floor} belong to {about}.style=step, "
                "linear or cosine, which is constant"
            )
        return found


@dataclass(frozen=True)
class BalanceConfig:
    """What keeps the experts evenly loaded. All coefficients act on per-token means
    (docs/numerics.md).
    """

    aux_loss_coeff: float = 0.0
    aux_loss_schedule: FactorSchedule = field(default_factory=FactorSchedule)
    """Of aux_loss_coeff, over the steps."""
    aux_loss_scope: Literal["sequence", "batch", "global_batch"] = "batch"
    """The tokens the load fractions are taken over: one sequence; one micro-batch over all
    data-parallel ranks; or all micro-batches of the optimisation step so far, over all
    data-parallel ranks.
    """
    z_loss_coeff: float = 0.0
    bias_update: Literal["none", "sign", "quantile"] = "none"
    """How the selection bias follows the load, once per optimiser step. sign: by bias_update_rate
    towards an even load (loss-free balancing, arXiv 2408.15664). quantile: to the quantile of each
    expert's scores that gives it its share (quantile balancing, arXiv 2607.24653), read off a
    histogram.
    """
    bias_update_rate: float = 0.0
    """Step of bias_update=sign."""
    bias_rate_schedule: FactorSchedule = field(default_factory=FactorSchedule)
    """Of bias_update_rate, over the steps (DeepSeek-V3: style=step to 0 for the last 3.4% of the
    tokens).
    """
    random_routing_steps: int = 0
    """Steps of training over which routers go from random logits to their own (stochastic routing
    warm-up of Ling, arXiv 2503.05139, equation 3): no expert is flooded or left out while scores
    mean nothing. 0: their own from the start.
    """
    quantile_momentum: float = 0.5
    """Share of the old bias kept by a quantile update, 0 to 0.99; also that of the
    routers that balance by themselves."""
    histogram_bins: int = 256
    entropy_coeff: float = 0.0
    """Weight of the mean entropy of the router's softmax, in nats (arXiv 2403.07652): positive
    makes it decide.
    """
    orthogonality_coeff: float = 0.0
    """Weight of the L1 norm of R R^T - I over the normalised rows of the router, per expert
    (SimBal, arXiv 2506.14038).
    """

    @property
    def is_scheduled(self) -> bool:
        """Whether anything of it changes over the steps."""
        return {self.aux_loss_schedule.style, self.bias_rate_schedule.style} != {"constant"}

    def at(self, step: int, num_steps: int) -> BalanceConfig:
        """The settings of step number `step` of a run, the first of which is 1."""
        if not self.is_scheduled:
            return self
        return replace(
            self,
            aux_loss_coeff=self.aux_loss_coeff * self.aux_loss_schedule.factor(step, num_steps),
            bias_update_rate=self.bias_update_rate
            * self.bias_rate_schedule.factor(step, num_steps),
        )

    def problems(self) -> list[str]:
        found = [
            f"balance.{name} is {getattr(self, name)}; it must not be negative"
            for name in (
                "aux_loss_coeff",
                "z_loss_coeff",
                "bias_update_rate",
                "entropy_coeff",
                "orthogonality_coeff",
            )
            if getattr(self, name) < 0
        ]
        if (self.bias_update == "sign") != (self.bias_update_rate > 0):
            found.append(
                f"balance.bias_update_rate {self.bias_update_rate} belongs to "
                f"balance.bias_update=sign, which is {self.bias_update}: set both or neither"
            )
        for name, setting in (
            ("aux_loss_schedule", "aux_loss_coeff"),
            ("bias_rate_schedule", "bias_update_rate"),
        ):
            schedule = getattr(self, name)
            found += schedule.problems(f"balance.{name}")
            if schedule.style != "constant" and getattr(self, setting) == 0:
                found.append(
                    f"balance.{name}.style is {schedule.style}, but balance.{setting} is 0, and "
                    "so there is nothing to schedule; drop it"
                )
        if self.random_routing_steps < 0:
            found.append(
                f"balance.random_routing_steps is {self.random_routing_steps}; it must not be "
                "negative (0 switches it off)"
            )
        if not 0 <= self.quantile_momentum < 1:
            found.append(
                f"balance.quantile_momentum is {self.quantile_momentum}; it must be in [0, 1)"
            )
        if not 16 <= self.histogram_bins <= 4096:
            found.append(
                f"balance.histogram_bins is {self.histogram_bins}; it must be between 16 and 4096"
            )
        return found


@dataclass(frozen=True)
class BudgetConfig:
    """How the mean number of experts per token is held to router.budget (model/moe/budget.py)."""

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
    """A layer whose smoothed error stays above this for guard_steps (five times as long if it was
    never within half of it) falls back to top-k.
    """
    guard_steps: int = 20
    guard_capped: float = 0.5
    """So does a layer with a larger share of tokens at router.max_experts."""
    hold_steps: int = 200
    """How long a layer stays in a fallback before it tries again."""

    def problems(self) -> list[str]:
        found = [
            f"budget.{name} is {getattr(self, name)}; it must not be negative"
            for name in ("kp", "ki", "warm_start_steps", "blend_steps")
            if getattr(self, name) < 0
        ]
        if not 0 <= self.error_momentum < 1:
            found.append(f"budget.error_momentum is {self.error_momentum}; it must be in [0, 1)")
        if self.kp >= 2 or self.ki >= 1:
            found.append(
                f"budget.kp {self.kp} and budget.ki {self.ki} must be below 2 and 1, or the "
                "controller oscillates"
            )
        found += [
            f"budget.{name} is {getattr(self, name)}; it must be positive"
            for name in ("guard_error", "guard_steps", "guard_capped", "hold_steps")
            if getattr(self, name) <= 0
        ]
        if self.guard_capped > 1:
            found.append(
                f"budget.guard_capped is {self.guard_capped}; it is a share of tokens, at most 1 "
                "(which switches it off)"
            )
        return found


@dataclass(frozen=True)
class FailSafeConfig:
    """What happens when routing goes wrong; every fallback counts its tokens under moe/fallback
    (ops/router/README.md).
    """

    collapse_share: float = 1.0
    """Collapse: a layer whose busiest round(k) experts take this share of all assignments falls
    back to one expert a token (and the shared one) for budget.hold_steps, its bias frozen. 1: off.
    """
    spike_zscore: float = 0.0
    """Spike: a gradient norm this many standard deviations above its running mean makes the next
    freeze_steps steps select experts with the router weights of the last snapshot. 0: off.
    """
    freeze_steps: int = 20
    snapshot_interval: int = 50
    """Steps between the snapshots that a spike goes back to."""
    rank_overload: float = 0.0
    """Overload: while the busiest rank of an expert group has had more than this many times the
    mean load for overload_steps, the layer's most experts per token go down by one. 0: off.
    """
    overload_steps: int = 20

    def problems(self) -> list[str]:
        found = []
        if not 0 < self.collapse_share <= 1:
            found.append(
                f"fail_safe.collapse_share is {self.collapse_share}; it must be in (0, 1] (1 "
                "switches it off)"
            )
        if self.spike_zscore < 0 or self.rank_overload < 0 or 0 < self.rank_overload <= 1:
            found.append(
                "fail_safe.spike_zscore must not be negative and fail_safe.rank_overload must be 0 "
                "or above 1"
            )
        found += [
            f"fail_safe.{name} is {getattr(self, name)}; it must be at least 1"
            for name in ("freeze_steps", "snapshot_interval", "overload_steps")
            if getattr(self, name) < 1
        ]
        return found


def experts_of_budget(config: ModelConfig, budget: float, unit: str) -> float:
    """Mean experts per token of a budget in experts, or in forward FLOPs of the routed experts per
    token (6 D F each, over all MoE layers that a generated token visits).
    """
    if unit == "experts":
        return budget
    return budget / (
        6
        * config.hidden_size
        * config.expert_intermediate_size
        * max(1, len(config.decoder_moe_layers))
    )
