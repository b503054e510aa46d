"""The matrices between a model's layers, by shape, in the order in which the model names them: what
Muon orthogonalises. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from model.config import ModelConfig
from model.cost.entries import EntryLayer, entry_layers, pool_shapes
from model.cost.parameters import (
    compressed_matrices,
    entry_index_matrices,
    has_index,
    index_layers,
    index_matrices,
    is_compressed,
    is_latent,
)


class Matrices(NamedTuple):
    """Matrices of one shape that one parameter holds."""

    kind: str
    """Of train/config/kinds.py."""
    number: int
    """Experts' matrices of all experts, as if no rank had others."""
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Elements of all of them."""
        return self.number * self.rows * self.columns


def hidden_matrices(
    config: ModelConfig,
    attention: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
) -> list[Matrices]:
    """Every parameter that is made of such matrices. attention: arguments of sparse or latent
    attention, None or empty: dense. layers: of one stage of a pipeline; None: all.
    """
    layers = range(config.num_layers) if layers is None else layers
    found: list[Matrices] = []
    indexed = index_layers(config.num_layers, attention) if has_index(attention) else []
    every = entry_layers(config.num_layers, attention) if is_compressed(attention) else None
    for layer in layers:
        entries = None if every is None else every[layer]
        found += _layer(config, config.is_moe_layer(layer), attention, layer in indexed, entries)
    for _ in range(config.num_mtp_layers if config.num_layers - 1 in layers else 0):
        found.append(Matrices("other", 1, config.hidden_size, 2 * config.hidden_size))
        # the block of such a module attends densely, or by latents as the layers do
        inside = attention if is_latent(attention) else None
        found += _layer(config, config.is_moe_layer(config.num_layers), inside)
    return found


def _layer(
    config: ModelConfig,
    has_experts: bool,
    attention: Mapping[str, Any] | None,
    indexes: bool = False,
    entries: EntryLayer | None = None,
) -> Iterator[Matrices]:
    """indexes: the layer has what an index learns; entries: of a layer of compressed attention."""
    hidden = config.hidden_size
    if is_compressed(attention):
        assert entries is not None
        # Outputs by groups are stacked blocks, which Muon leaves to AdamW.
        *into, _, back = compressed_matrices(config, attention)
        projections = [*into, back]
        if entries.makes_entries:
            projections += pool_shapes(config.attention_head_dim, hidden, entries)
    else:
        projections = _latent(config, attention) if is_latent(attention) else _grouped_query(config)
    for rows, columns in projections:
        yield Matrices("attention", 1, rows, columns)
    if indexes and has_index(attention):
        shapes = index_matrices(config, attention)
        if is_compressed(attention):
            assert entries is not None
            shapes = entry_index_matrices(config, attention, entries)
        for rows, columns in shapes:
            yield Matrices("indexer", 1, rows, columns)
    if not has_experts:
        yield Matrices("mlp", 2, config.intermediate_size, hidden)
        yield Matrices("mlp", 1, hidden, config.intermediate_size)
        return
    width = config.expert_intermediate_size
    yield Matrices("experts", 2 * config.num_experts, width, hidden)
    yield Matrices("experts", config.num_experts, hidden, width)
    if config.num_shared_experts:
        shared = config.num_shared_experts * width
        yield Matrices("shared_experts", 2, shared, hidden)
        yield Matrices("shared_experts", 1, hidden, shared)


def _grouped_query(config: ModelConfig) -> list[tuple[int, int]]:
    """Queries, keys, values, output."""
    hidden, head_dim = config.hidden_size, config.attention_head_dim
    q_width, kv_width = config.num_heads * head_dim, config.num_kv_heads * head_dim
    return [(q_width, hidden), (kv_width, hidden), (kv_width, hidden), (hidden, q_width)]


def _latent(config: ModelConfig, attention: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Queries, by a latent or not, the latent of keys and values with the rotary key, and out of
    it; output.
    """
    hidden, heads = config.hidden_size, config.num_heads
    q_rank, kv_rank = attention["q_lora_rank"], attention["kv_lora_rank"]
    nope, rope = attention["qk_nope_head_dim"], attention["qk_rope_head_dim"]
    value, q_width = attention["v_head_dim"], heads * (nope + rope)
    queries = [(q_width, hidden)] if q_rank is None else [(q_rank, hidden), (q_width, q_rank)]
    return [
        *queries,
        (kv_rank + rope, hidden),
        (heads * (nope + value), kv_rank),
        (hidden, heads * value),
    ]
