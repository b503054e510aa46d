"""Settings of attention to what a learned index chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from model.attention.config.base import AttentionConfig, layer_problems
from model.config import ModelConfig
from model.cost.parameters import index_shape, sparse_layers
from ops.index_attention.spec import IndexSpec

if TYPE_CHECKING:
    from model.attention.base import Attention


@dataclass(frozen=True, kw_only=True)
class IndexedAttentionConfig(AttentionConfig):
    """Exact attention to what a learned index chooses (ops/index_attention/README.md)."""

    name = "indexed"

    rule: Literal["dsa", "msa", "qsa"] = "dsa"
    """dsa: single tokens for all heads, by weighted index heads (DeepSeek-V3.2). msa: blocks, for
    each key/value head by its own index head (MiniMax-M3). qsa: small blocks for all heads, by the
    means of their index keys (Qwen4).
    """
    block_size: int = 1
    """Tokens that are chosen together; 1 with rule=dsa."""
    top_k: int = 2048
    """Blocks that a query attends to."""
    index_heads: int | None = None
    """Heads of the index. None: as many as the model has key/value heads, as rule=msa asks for."""
    index_head_dim: int | None = None
    """Dimensions of an index head. None: those of the model's heads."""
    index_coeff: float = 1.0
    """Weight of the index's loss, its divergence in nats from the attention's own masses, as a mean
    over tokens, summed over layers.
    """
    dense_steps: int = 1000
    """Optimisation steps before which everything is attended to while the index learns. 0 needs
    init.run with an index that has learned.
    """
    dense_layers: tuple[int, ...] = ()
    """Layers that stay dense, from 0; negative numbers count from the end."""
    interval: int = 1
    """One layer in so many has an index."""
    audit_rows: float = 0.002
    """Share of tokens whose choice is compared with dense attention when measuring; 0 switches the
    comparison off.
    """

    def spec(self) -> IndexSpec:
        """What the op is asked for.

        Raises:
            ValueError: the settings contradict each other, one problem a line.
        """
        return IndexSpec(self.rule, self.block_size, self.top_k)

    def index_shape(self, model: ModelConfig) -> tuple[int, int]:
        """Heads of the index, and the dimensions of each."""
        return index_shape(model, self.arguments)

    def is_sparse(self, model: ModelConfig, layer_idx: int) -> bool:
        """Whether `interval` and `dense_layers` give the layer an index."""
        return layer_idx in sparse_layers(model.num_layers, self.arguments)

    def context_problems(self, model: ModelConfig, size: int) -> list[str]:
        return [
            f"parallel.context_parallel_size is {size}, but attention=indexed chooses for whole "
            "rows with all heads of its index, which ranks that share out heads do not have; set "
            "parallel.context_parallel_size=1, or use attention=scc"
        ]

    def problems(self, model: ModelConfig) -> list[str]:
        try:
            spec = self.spec()
        except ValueError as error:
            return [f"attention.{problem}" for problem in str(error).splitlines()]
        found = [
            f"attention.{name} is {value}; it must be at least 1, or null"
            for name in ("index_heads", "index_head_dim")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if self.dense_steps < 0:
            found.append(f"attention.dense_steps is {self.dense_steps}; it must not be negative")
        if self.index_coeff <= 0:
            found.append(
                f"attention.index_coeff is {self.index_coeff}, so that nothing would teach the "
                "index, which would choose at random; it must be above 0"
            )
        if not 0 <= self.audit_rows <= 1:
            found.append(
                f"attention.audit_rows is {self.audit_rows}; it is a share of tokens, between 0 "
                "and 1"
            )
        if self.interval < 1:
            return [*found, f"attention.interval is {self.interval}; it must be at least 1"]
        found += layer_problems(model, self.interval, self.dense_layers, alone=not found)

        heads, width = self.index_shape(model)
        if spec.by_head and heads != model.num_kv_heads:
            found.append(
                f"attention.index_heads is {heads}, but rule={self.rule} has one for each of the "
                f"model.num_kv_heads {model.num_kv_heads}; set attention.index_heads=null"
            )
        if width < model.rotary_size:
            found.append(
                f"attention.index_head_dim is {width}, but positions turn {model.rotary_size} "
                "dimensions of a head; raise it, or lower model.rotary_dim"
            )
        return found

    def build(self, model: ModelConfig, layer_idx: int = 0) -> Attention:
        from model.attention.indexed import IndexedAttention

        return IndexedAttention(model, self, layer_idx)
