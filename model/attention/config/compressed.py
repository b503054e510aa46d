"""Settings of attention to a window and pooled entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from model.attention.config.base import AttentionConfig, model_uncombined
from model.config import ModelConfig
from model.cost.parameters import compressed_kinds, compressed_ratio
from ops.compressed_attention.spec import CompressedSpec

if TYPE_CHECKING:
    from model.attention.base import Attention


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionConfig(AttentionConfig):
    """A window of tokens and pooled entries of everything before, in one softmax over one head of
    keys that are values (DeepSeek-V4; ops/compressed_attention/README.md).
    """

    name = "compressed"

    layer_kinds: Literal["csa", "hca", "v4"] | tuple[str, ...] = "csa"
    """What layers see beside the window. csa: entries that an index chooses. hca: all of their few
    entries. v4: two layers of hca, then hca and csa by turns. Or a kind for each layer, where
    window sees nothing else.
    """
    sliding_window: int = 128
    """Tokens up to and with the query that are exact."""
    csa_ratio: int = 4
    """Tokens of an entry in layers of csa, whose entries reach over the window before as well."""
    hca_ratio: int = 128
    """Tokens of an entry in layers of hca."""
    top_k: int = 512
    """Entries that a query attends to in layers of csa."""
    q_lora_rank: int = 1024
    """Width of the latent that queries come from."""
    output_groups: int = 8
    """Runs of heads that are projected each by itself, before all together."""
    o_lora_rank: int = 1024
    """What the outputs of such a run are projected to."""
    rope_head_dim: int = 64
    """Last dimensions of a head that are turned by the position; outputs are turned back."""
    compressed_rope_theta: float | None = 160_000.0
    """Base of the frequencies in layers with entries, to which model.rope_scaling belongs as well.
    None: model.rope_theta.
    """
    index_heads: int = 64
    """Heads of the index."""
    index_head_dim: int = 128
    """Dimensions of an index head."""
    index_coeff: float = 1.0
    """Weight of the index's loss, its divergence in nats from the masses that attention gave to
    entries, as a mean over tokens, summed over layers.
    """
    dense_steps: int = 1000
    """Optimisation steps before which all entries are attended to while the index learns. 0 needs
    init.run with an index that has learned.
    """
    audit_rows: float = 0.002
    """Share of tokens whose choice is compared with attention to all entries when measuring; 0
    switches the comparison off.
    """

    def kind(self, model: ModelConfig, layer_idx: int) -> str:
        """csa, hca or window."""
        return compressed_kinds(model.num_layers, self.arguments)[layer_idx]

    def spec(self, kind: str) -> CompressedSpec:
        """What the op is asked for in layers of a kind.

        Raises:
            ValueError: a number is not possible.
        """
        ratio = compressed_ratio(self.arguments, kind)
        return CompressedSpec(self.sliding_window, ratio, self.top_k if kind == "csa" else None)

    def rotary_size(self, model: ModelConfig) -> int:
        return self.rope_head_dim

    def is_sparse(self, model: ModelConfig, layer_idx: int) -> bool:
        """Whether an index chooses in the layer."""
        return self.kind(model, layer_idx) == "csa"

    def context_problems(self, model: ModelConfig, size: int) -> list[str]:
        return [
            f"parallel.context_parallel_size is {size}, but attention=compressed has one head of "
            "keys for all, and pools whole rows; set parallel.context_parallel_size=1"
        ]

    def tensor_problems(self, model: ModelConfig, size: int, context: int) -> list[str]:
        return [
            f"parallel.tensor_parallel_size is {size}, but attention=compressed has one head of "
            "keys for all, which ranks cannot share out; set parallel.tensor_parallel_size=1"
        ]

    def problems(self, model: ModelConfig) -> list[str]:
        numbers = (
            *("sliding_window", "csa_ratio", "hca_ratio", "top_k", "q_lora_rank"),
            *("output_groups", "o_lora_rank", "rope_head_dim", "index_heads", "index_head_dim"),
        )
        found = [
            f"attention.{name} is {value}; it must be at least 1"
            for name in numbers
            if (value := getattr(self, name)) < 1
        ]
        if self.dense_steps < 0:
            found.append(f"attention.dense_steps is {self.dense_steps}; it must not be negative")
        if self.compressed_rope_theta is not None and self.compressed_rope_theta <= 0:
            found.append(
                f"attention.compressed_rope_theta is {self.compressed_rope_theta}; it must be "
                "positive, or null"
            )
        if not 0 <= self.audit_rows <= 1:
            found.append(
                f"attention.audit_rows is {self.audit_rows}; it is a share of tokens, between 0 "
                "and 1"
            )
        found += self._kind_problems(model)
        if not found and "csa" in compressed_kinds(model.num_layers, self.arguments):
            if self.index_coeff <= 0:
                found.append(
                    f"attention.index_coeff is {self.index_coeff}, so that nothing would teach the "
                    "index, which would choose at random; it must be above 0"
                )
            if self.index_head_dim < self.rope_head_dim:
                found.append(
                    f"attention.index_head_dim is {self.index_head_dim}, but positions turn "
                    f"attention.rope_head_dim {self.rope_head_dim} dimensions; raise it"
                )
        return found + self._shape_problems(model)

    def _kind_problems(self, model: ModelConfig) -> list[str]:
        if isinstance(self.layer_kinds, str):
            return []
        if len(self.layer_kinds) != model.num_layers:
            return [
                f"attention.layer_kinds names {len(self.layer_kinds)} layers, but the model has "
                f"{model.num_layers}; name each, or choose csa, hca or v4"
            ]
        return [
            f"attention.layer_kinds has {kind}; choose csa, hca or window for each layer"
            for kind in sorted({*self.layer_kinds} - {"csa", "hca", "window"})
        ]

    def _shape_problems(self, model: ModelConfig) -> list[str]:
        """What the model says of attention must not contradict, nor be left unread."""
        found = []
        if model.num_kv_heads != 1:
            found.append(
                f"model.num_kv_heads is {model.num_kv_heads}, but with attention=compressed all "
                "heads share one, whose keys are its values; set model.num_kv_heads=1"
            )
        if self.output_groups >= 1 and model.num_heads % self.output_groups:
            found.append(
                f"attention.output_groups is {self.output_groups}, which does not divide "
                f"model.num_heads {model.num_heads}; change one of them"
            )
        if self.rope_head_dim % 2 or self.rope_head_dim > model.attention_head_dim:
            found.append(
                f"attention.rope_head_dim is {self.rope_head_dim}; it must be even and at most the "
                f"{model.attention_head_dim} dimensions of a head (model.head_dim)"
            )
        if model.num_mtp_layers:
            found.append(
                f"model.num_mtp_layers is {model.num_mtp_layers}, but what modules of multi-token "
                "prediction attend to with attention=compressed is not defined; set "
                "model.num_mtp_layers=0"
            )
        if model.rope_scaling is not None and model.rope_scaling.table_factor != 1:
            found.append(
                "model.rope_scaling enlarges what is turned by "
                f"{model.rope_scaling.table_factor:.4g}, and with attention=compressed keys are "
                "values; set model.rope_scaling.attention_factor=1"
            )
        if model.attention_scale is not None:
            found.append(
                f"logits scaled by {model.attention_scale:.4g} (model.attention_multiplier or "
                "model.mup_base_head_dim) do not combine with attention=compressed, whose scale is "
                "1 / sqrt(model.head_dim); set them to null"
            )
        instead = {
            "qk_norm": ("none", "which normalises queries and keys by itself"),
            "attention_bias": ("none", "whose projections have no biases"),
            "rotary_dim": (None, "where attention.rope_head_dim says what is turned"),
        }
        return found + model_uncombined(model, "compressed", instead)

    def build(self, model: ModelConfig, layer_idx: int = 0) -> Attention:
        from model.attention.compressed import CompressedAttention

        return CompressedAttention(model, self, layer_idx)
