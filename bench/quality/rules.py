"""The attentions of this project side by side, small and by name: for comparisons of what a rule
can do, with as many columns for a query, or with as many numbers in a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.attention.base import SequenceLayout
from model.attention.config.base import AttentionConfig
from model.attention.config.compressed import CompressedAttentionConfig
from model.attention.config.indexed import IndexedAttentionConfig
from model.attention.config.sparse import SparseAttentionConfig
from model.config import ModelConfig
from model.cost.memory import cache_bytes

HEADS, KV_HEADS = 2, 1
LEARNING = 1
"""Of a layer with an index: its step before this is one in which the index learns, and does not
choose yet.
"""

SCC = SparseAttentionConfig(
    block_size=8,
    top_k=2,
    window_size=8,
    num_sink_blocks=1,
    coarse_block_size=8,
    index_head_dim=16,
    audit_rows=0.0,
)
"""Five blocks exactly: the first one, the query's own and the one before, and two of its choice."""
CSA = CompressedAttentionConfig(
    sliding_window=8,
    csa_ratio=4,
    hca_ratio=8,
    top_k=32,
    q_lora_rank=64,
    output_groups=1,
    o_lora_rank=64,
    rope_head_dim=2,
    compressed_rope_theta=None,
    index_heads=2,
    index_head_dim=16,
    dense_steps=LEARNING,
    audit_rows=0.0,
)
INDEXED = IndexedAttentionConfig(
    rule="dsa", top_k=40, index_heads=2, index_head_dim=16, dense_steps=LEARNING, audit_rows=0.0
)


@dataclass(frozen=True)
class Rule:
    """An attention, and what a query of it attends to in so many words."""

    attention: AttentionConfig
    columns: str


RULES = {
    "window": Rule(
        replace(SCC, tail="drop", order=0, top_k=0, num_sink_blocks=0, window_size=33), "40 tokens"
    ),
    "nsa": Rule(replace(SCC, merge="gated", order=0), "40 tokens and all entries, three softmaxes"),
    "scc_index": Rule(
        replace(SCC, select="index", index_steps=LEARNING), "40 tokens and all other entries"
    ),
    "scc_e_gated": Rule(
        replace(SCC, resident_blocks=4, resident_interval=16, entries="gated"),
        "40 tokens, two blocks of them from four, and all other entries",
    ),
    "scc_e_small": Rule(
        replace(
            SCC,
            coarse_block_size=4,
            resident_blocks=2,
            resident_interval=8,
            entries="gated",
            offset=True,
        ),
        "40 tokens, two blocks of them from two, and all other entries of 4 tokens",
    ),
    "dsa": Rule(INDEXED, "40 tokens"),
    "msa": Rule(
        replace(INDEXED, rule="msa", block_size=8, top_k=5, index_heads=None), "5 blocks of 8"
    ),
    "qsa": Rule(replace(INDEXED, rule="qsa", block_size=4, top_k=10), "10 blocks of 4"),
    "csa": Rule(CSA, "8 tokens and 32 entries of 4"),
    "hca": Rule(replace(CSA, layer_kinds="hca"), "8 tokens and all entries of 8"),
}


def shape(attention: AttentionConfig, hidden_size: int) -> ModelConfig:
    """A layer's surroundings. A head of keys that are values is as wide as both."""
    shared = isinstance(attention, CompressedAttentionConfig)
    return ModelConfig(
        vocab_size=64,
        hidden_size=hidden_size,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=hidden_size // HEADS * (2 if shared else 1),
        intermediate_size=2 * hidden_size,
        num_experts=0,
        expert_intermediate_size=0,
        max_seq_len=1024,
        rotary_dim=2,  # the least there is, of tables that turn nothing
    )


def cached_numbers(attention: AttentionConfig, length: int, hidden_size: int = 64) -> float:
    """What a cache has to hold of a context of `length` tokens, a token of it. Of pooled entries
    and their keys alone, what grows with the context.
    """
    config = shape(attention, hidden_size)
    if isinstance(attention, CompressedAttentionConfig):
        chooses = attention.kind(config, 0) == "csa"
        ratio = attention.csa_ratio if chooses else attention.hca_ratio
        return (config.attention_head_dim + chooses * attention.index_head_dim) / ratio
    arguments = None if attention.name == "dense" else attention.arguments
    return cache_bytes(config, 1, length, arguments) / length


class RuleLayer(nn.Module):
    """Attention as models here have it, without positions: where a token stands says nothing."""

    def __init__(self, rule: Rule, hidden_size: int):
        super().__init__()
        config = shape(rule.attention, hidden_size)
        self.attention: Any = rule.attention.build(config)
        self.rotary_size = rule.attention.rotary_size(config)

    def forward(self, hidden: Tensor, learning: bool) -> tuple[Tensor, Tensor]:
        """hidden [B, N, D] -> as much, and what its index has to learn, a mean over tokens.

        Args:
            learning: the index learns and does not choose yet.
        """
        batch_size, length, _ = hidden.shape
        self.attention.step = 0 if learning else LEARNING
        turned = torch.zeros(batch_size, length, self.rotary_size // 2)
        layout = SequenceLayout(
            cos=turned + 1,
            sin=turned,
            cu_seqlens=torch.arange(0, batch_size * length + 1, length, dtype=torch.int32),
            max_seqlen=length,
            masked_positions=None,
            positions=torch.zeros(batch_size, length, dtype=torch.int64),
        )
        attended, sums = self.attention(hidden, layout)
        penalty = hidden.new_zeros(()) if sums is None else sums.penalty_sum
        return attended, penalty / (batch_size * length)
