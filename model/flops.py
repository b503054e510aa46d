"""Parameters and FLOPs of a shape: one formula for plan, MFU, docs and benches. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


def count_parameters(config: ModelConfig, experts_per_token: float,
                     attention: Mapping[str, Any] | None = None) -> ParameterCount:
    """Count parameters; `experts_per_token` is the (mean) number of routed experts a token visits; attention: arguments of
    sparse attention, None or empty: dense."""
    hidden, head_dim = config.hidden_size, config.attention_head_dim
    num_moe = len(config.moe_layers)
    q_width, kv_width = config.num_heads * head_dim, config.num_kv_heads * head_dim
    qk_norm = {"none": 0, "head": 2 * head_dim, "hidden": q_width + kv_width}[config.qk_norm]
    one_expert = 3 * hidden * config.expert_intermediate_size
    return ParameterCount(
        embedding=config.vocab_size * hidden * (1 if config.tie_embeddings else 2),
        attention=config.num_layers * hidden * (2 * q_width + 2 * kv_width) + _corrections(config, attention or {}),
        dense_mlp=(config.num_layers - num_moe) * 3 * hidden * config.intermediate_size,
        router=num_moe * hidden * config.num_experts,
        shared_experts=num_moe * config.num_shared_experts * one_expert,
        experts=num_moe * config.num_experts * one_expert,
        norms=config.num_layers * (2 * hidden + qk_norm) + hidden,
        active_experts=round(num_moe * experts_per_token * one_expert),
    )


def _corrections(config: ModelConfig, attention: Mapping[str, Any]) -> int:
    """Parameters that sparse layers learn beside dense attention's: offset, sink, trust, gates."""
    projection = config.hidden_size + 1
    per_head = (bool(attention.get("offset")) + bool(attention.get("sink")) + projection * bool(attention.get("trust"))
                + 3 * projection * (attention.get("merge") == "gated"))
    return per_head * config.num_heads * len(sparse_layers(config.num_layers, attention)) if per_head else 0


def keys_per_query(seq_len: int, attention: Mapping[str, Any]) -> float:
    """Mean keys of a query in a sparse layer, over one document of seq_len tokens, as dense attention would cost the same.

    attention: arguments of model.attention.sparse.SparseAttention. Of the six products of dense attention for a key
    (scores and values, forward and twice backward) a coarse entry costs as many with order 0 and three more with order 2,
    and ranking the entries of all past blocks one or two. Dense attention has seq_len / 2.
    """
    block = attention["block_size"]
    local = max(1, -(-(attention["window_size"] + block - 1) // block))
    second_order = attention["order"] == 2
    per_block = block / attention["coarse_block_size"]
    total = 0.0
    for own in range(-(-seq_len // block)):
        queries = min(block, seq_len - own * block)
        forced = own if own * block < attention["min_sparse_length"] else min(own, local - 1 + attention["num_sink_blocks"])
        selected = min(attention["top_k"], own - forced)
        keys = (forced + selected) * block + (queries + 1) / 2
        if attention["tail"] != "drop":
            keys += (own - forced - selected) * per_block * (1.5 if second_order else 1.0)
        if attention["top_k"] > 0 and own > forced:
            keys += own * per_block * (2 if second_order else 1) / 6
        total += keys * queries
    return total / seq_len


def flops_per_token(config: ModelConfig, experts_per_token: float, seq_len: int,
                    attention: Mapping[str, Any] | None = None) -> float:
    """Training FLOPs of one token, forward and backward: 6 per active matrix parameter plus causal attention.

    The embedding look-up is no multiplication; the output head is. Attention costs 2*2*H*head_dim per key forward (scores
    and values), three times that with backward, over S/2 keys in dense layers. Recomputation is not counted (model FLOPs).
    attention: the arguments of sparse attention; None or empty: dense.
    """
    count = count_parameters(config, experts_per_token, attention)
    head = config.vocab_size * config.hidden_size
    matrices = (count.attention + count.dense_mlp + count.router + count.shared_experts + count.active_experts + head)
    num_sparse = 0 if not attention else len(sparse_layers(config.num_layers, attention))
    keys = (config.num_layers - num_sparse) * seq_len / 2
    if attention and num_sparse:
        keys += num_sparse * keys_per_query(seq_len, attention)
    return 6.0 * matrices + 12 * config.num_heads * config.attention_head_dim * keys


def sparse_layers(num_layers: int, attention: Mapping[str, Any]) -> list[int]:
    """Layers that sparse attention's `interval` and `dense_layers` leave sparse."""
    dense = {i % num_layers for i in attention.get("dense_layers", ())}
    return [i for i in range(num_layers) if (i + 1) % attention.get("interval", 1) == 0 and i not in dense]
