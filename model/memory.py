"""Memory of one device by component: what `launch.plan` prints before anything starts. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig
from model.flops import count_parameters

LOGIT_BYTES = 12
"""Per logit at the peak of backward: the fp32 log-softmax and two fp32 gradients."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the fullest device, without DeepSpeed's communication buckets, its fp32 copy of one parameter group's
    gradient at the step (grad_accum_dtype=bf16), and the allocator's slack. Activations are an estimate of what backward
    keeps."""

    dense_weights: int
    expert_weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return (self.dense_weights + self.expert_weights + self.gradients + self.optimizer + self.activations
                + self.logits)


def device_memory(config: ModelConfig, experts_per_token: float, *, precision: str, zero_stage: int, world_size: int,
                  expert_parallel_size: int, micro_batch_size: int, seq_len: int,
                  attention: Mapping[str, Any] | None = None, recompute_experts: bool = False,
                  grad_accum_dtype: str = "fp32") -> DeviceMemory:
    """Memory under ZeRO and expert parallelism.

    Dense state is shared by all ranks, expert state by the world_size / expert_parallel_size ranks that hold the same
    experts. Optimiser state is 12 bytes a parameter (fp32 master weight and two moments), 8 at stage 0 in fp32, where
    the weights are the masters. Gradients are sums in grad_accum_dtype; the ones that backward makes, of the weights' dtype,
    live one parameter at a time. A stage-3 device also holds the gathered weights of the layer at work, not counted here.
    """
    count = count_parameters(config, experts_per_token, attention)
    width = 4 if precision == "fp32" else 2
    summed_width = 4 if grad_accum_dtype == "fp32" else 2
    expert_data_size = world_size // expert_parallel_size
    dense, experts = count.dense, -(-count.experts // expert_parallel_size)

    def share(parameters: int, over: int, from_stage: int) -> int:
        return -(-parameters // over) if zero_stage >= from_stage else parameters

    tokens = micro_batch_size * seq_len
    row_values = 0 if recompute_experts else 2 * config.expert_intermediate_size  # of an assignment: pre-activations
    row_values += config.hidden_size if expert_parallel_size > 1 else 0  # and the row itself, where it travelled
    per_state = 8 if zero_stage == 0 else 12
    return DeviceMemory(
        dense_weights=width * share(dense, world_size, 3),
        expert_weights=width * share(experts, expert_data_size, 3),
        gradients=summed_width * (share(dense, world_size, 2) + share(experts, expert_data_size, 2)),
        optimizer=per_state * (share(dense, world_size, 1) + share(experts, expert_data_size, 1)),
        activations=_activation_bytes(config, tokens, width, width * experts_per_token * row_values),
        logits=_logit_bytes(config, tokens, precision),
    )


def _logit_bytes(config: ModelConfig, tokens: int, precision: str) -> int:
    """Of the logits at hand, and of the head's gradient, which bf16 adds up over chunks in fp32."""
    chunk = min(tokens, config.loss_chunk_size or tokens)
    summed = 4 * config.vocab_size * config.hidden_size if chunk < tokens and precision != "fp32" else 0
    return chunk * config.vocab_size * LOGIT_BYTES + summed


def _activation_bytes(config: ModelConfig, tokens: int, width: int, routed: float) -> int:
    """Bytes kept for backward, assuming balanced experts.

    routed: bytes per token that the routed experts keep.
    """
    hidden = config.hidden_size
    q_width = config.num_heads * config.attention_head_dim
    kv_width = config.num_kv_heads * config.attention_head_dim
    norm = 2 * width * hidden  # input and output
    rotary = 4 * (q_width + kv_width)
    attention = norm + rotary + width * (2 * q_width + 2 * kv_width + hidden)
    dense_mlp = norm + width * 4 * config.intermediate_size
    shared = width * 4 * config.num_shared_experts * config.expert_intermediate_size
    moe = norm + 4 * hidden + routed + shared + 4 * 4 * config.num_experts
    num_moe = len(config.moe_layers)
    layers = config.num_layers * attention + (config.num_layers - num_moe) * dense_mlp + num_moe * moe
    if config.recompute == "block":
        layers = config.num_layers * width * hidden + attention + max(moe if num_moe else 0, dense_mlp)
    return round(tokens * (layers + norm))
