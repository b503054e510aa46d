"""Parameters and FLOPs of a shape: one formula for plan, MFU, docs and benches. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part. `active` is what one token multiplies with, embeddings included."""

    embedding: int
    attention: int
    dense_mlp: int
    router: int
    shared_experts: int
    experts: int
    norms: int
    active_experts: int

    @property
    def total(self) -> int:
        return (self.embedding + self.attention + self.dense_mlp + self.router + self.shared_experts + self.experts
                + self.norms)

    @property
    def dense(self) -> int:
        """Everything that expert parallelism does not split."""
        return self.total - self.experts

    @property
    def active(self) -> int:
        return self.dense + self.active_experts


def count_parameters(config: ModelConfig, experts_per_token: float) -> ParameterCount:
    """Count parameters; `experts_per_token` is the (mean) number of routed experts a token visits."""
    hidden, head_dim = config.hidden_size, config.attention_head_dim
    num_moe = len(config.moe_layers)
    q_width, kv_width = config.num_heads * head_dim, config.num_kv_heads * head_dim
    qk_norm = {"none": 0, "head": 2 * head_dim, "hidden": q_width + kv_width}[config.qk_norm]
    one_expert = 3 * hidden * config.expert_intermediate_size
    return ParameterCount(
        embedding=config.vocab_size * hidden * (1 if config.tie_embeddings else 2),
        attention=config.num_layers * hidden * (2 * q_width + 2 * kv_width),
        dense_mlp=(config.num_layers - num_moe) * 3 * hidden * config.intermediate_size,
        router=num_moe * hidden * config.num_experts,
        shared_experts=num_moe * config.num_shared_experts * one_expert,
        experts=num_moe * config.num_experts * one_expert,
        norms=config.num_layers * (2 * hidden + qk_norm) + hidden,
        active_experts=round(num_moe * experts_per_token * one_expert),
    )


def flops_per_token(config: ModelConfig, experts_per_token: float, seq_len: int) -> float:
    """Training FLOPs of one token, forward and backward: 6 per active matrix parameter plus causal attention.

    The embedding look-up is no multiplication; the output head is. Attention costs 2*2*H*head_dim*S/2 forward (scores
    and values over the causal half), three times that with backward. Recomputation is not counted (model FLOPs).
    """
    count = count_parameters(config, experts_per_token)
    head = config.vocab_size * config.hidden_size
    matrices = (count.attention + count.dense_mlp + count.router + count.shared_experts + count.active_experts + head)
    attention = 6 * config.num_layers * config.num_heads * config.attention_head_dim * seq_len
    return 6.0 * matrices + attention
