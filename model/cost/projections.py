"""The projections of a shape by name: what low-rank adapters may sit on, and how large they are.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig
from model.cost.parameters import is_latent


@dataclass(frozen=True)
class Projection:
    """A matrix, or a stack of them with one for each expert."""

    inputs: int
    outputs: int
    num_experts: int = 0
    """0: no stack."""

    def adapter_parameters(self, rank: int) -> int:
        """Of A [rank, inputs] and B [outputs, rank], for all experts."""
        return rank * (self.inputs + self.outputs) * max(1, self.num_experts)


def projections(config: ModelConfig, attention: Mapping[str, Any]) -> dict[str, Projection]:
    """Name -> projection of every block, in the order of the layers; no router, gate or head.

    attention: arguments of latent attention, or of any other.
    """
    hidden, found = config.hidden_size, {}
    of_attention = _latent(config, attention) if is_latent(attention) else _grouped_query(config)

    def add_mlp(name: str, width: int, num_experts: int = 0) -> None:
        found[f"{name}.gate_up"] = Projection(hidden, 2 * width, num_experts)
        found[f"{name}.down"] = Projection(width, hidden, num_experts)

    for layer in range(config.num_layers):
        block = f"blocks.{layer}"
        found |= {f"{block}.attention.{name}": shape for name, shape in of_attention.items()}
        if not config.is_moe_layer(layer):
            add_mlp(f"{block}.mlp", config.intermediate_size)
            continue
        width = config.expert_intermediate_size
        add_mlp(f"{block}.mlp.experts", width, config.num_experts)
        if config.num_shared_experts:
            add_mlp(f"{block}.mlp.shared", config.num_shared_experts * width)
    return found


def _grouped_query(config: ModelConfig) -> dict[str, Projection]:
    hidden, head = config.hidden_size, config.attention_head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    return {
        "q_proj": Projection(hidden, queries),
        "k_proj": Projection(hidden, keys),
        "v_proj": Projection(hidden, keys),
        "o_proj": Projection(queries, hidden),
    }


def _latent(config: ModelConfig, attention: Mapping[str, Any]) -> dict[str, Projection]:
    hidden, heads = config.hidden_size, config.num_heads
    nope, rope = attention["qk_nope_head_dim"], attention["qk_rope_head_dim"]
    q_rank, latent = attention["q_lora_rank"], attention["kv_lora_rank"]
    values, queries = attention["v_head_dim"], heads * (nope + rope)
    into = (
        {"q_proj": Projection(hidden, queries)}
        if q_rank is None
        else {"q_a_proj": Projection(hidden, q_rank), "q_b_proj": Projection(q_rank, queries)}
    )
    return into | {
        "kv_a_proj": Projection(hidden, latent + rope),
        "kv_b_proj": Projection(latent, heads * (nope + values)),
        "o_proj": Projection(heads * values, hidden),
    }
