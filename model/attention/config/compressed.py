"""Settings of attention to a window and pooled entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from model.attention.config.base import AttentionConfig, model_uncombined
from model.config import ModelConfig
from model.cost.entries import EntryLayer, compressed_kinds, entry_layers
from ops.compressed_attention.spec import CompressedSpec

if TYPE_CHECKING:
    from model.attention.base import Attention


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionConfig(AttentionConfig):
    """A window of tokens and pooled entries of everything before, in one softmax over one head of
    keys that are values (DeepSeek-V4; ops/compressed_attention/README.md).
    """

    name = "compressed"

    layer_kinds: Literal["csa", "hca", "v4", "v4_flash"] | tuple[str, ...] = "csa"
    """What layers see beside the window. csa: entries that an index chooses. hca: all of their few
    entries. v4: two layers of hca, then hca and csa by turns. v4_flash: two of window, which sees
    nothing else, then csa and hca by turns. Or a kind for each layer.
    """
    sliding_window: int = 128
    """Tokens up to and with the query that are exact."""
    csa_ratio: int = 4
    """Tokens of an entry in layers of csa."""
    late_csa_ratio: int | None = None
    """The same from the middle of the layers on. None: csa_ratio there as well."""
    csa_overlap: bool = True
    """Whether entries in layers of csa reach over the window before as well."""
    slot_bias: bool = True
    """Whether what tokens weigh in an entry has a bias for their place in the window."""
    entry_layers: int | tuple[int, ...] = 1
    """Entries for so many layers of csa: the first one makes them, and the next ones read them. Or
    the layers that make them.
    """
    hca_ratio: int = 128
    """Tokens of an entry in layers of hca."""
    top_k: int = 512
    """Entries that a query attends to in layers of csa."""
    top_k_blocks: int | None = None
    """Blocks of neighbouring entries, the best by their best entry, out of which these are chosen.
    None: out of all.
    """
    index_block_size: int = 8
    """Entries of such a block."""
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
    index_layers: int | tuple[int, ...] = 1
    """An index for so many layers of csa with the same entries: it chooses in the first one, and
    the next ones follow. Or the layers that choose.
    """
    index_keys: Literal["pooled", "projected"] = "pooled"
    """What an entry is known by to an index. pooled: an entry of its own, by weights of its own.
    projected: a projection of the entry.
    """
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

    def layers(self, model: ModelConfig) -> list[EntryLayer]:
        """What every layer sees, and of whom."""
        return entry_layers(model.num_layers, self.arguments)

    def spec(self, layer: EntryLayer) -> CompressedSpec:
        """What the op is asked for in a layer.

        Raises:
            ValueError: a number is not possible.
        """
        if layer.chooser is None:
            return CompressedSpec(self.sliding_window, layer.ratio)
        return CompressedSpec(
            self.sliding_window, layer.ratio, self.top_k, self.top_k_blocks, self.index_block_size
        )

    def parted_problems(self, model: ModelConfig, parts: Sequence[Sequence[int]]) -> list[str]:
        """What keeps layers from being cut into these parts, each a run of neighbours: what a layer
        reads of an earlier one is where both are.
        """
        part_of = {i: n for n, part in enumerate(parts) for i in part}
        for layer in self.layers(model):
            for name, what, source in (
                ("entry_layers", "entries", layer.maker),
                ("index_layers", "choice", layer.chooser),
            ):
                if source is None or part_of.get(source) == part_of.get(layer.number):
                    continue
                return [
                    f"attention.{name} {_shown(getattr(self, name))} lets layer {layer.number} "
                    f"read the {what} of layer {source}, but pipeline stages are cut between them; "
                    f"let layer {layer.number} begin anew (attention.{name}), or move the cut "
                    "(parallel.pipeline_split)"
                ]
        return []

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
            "index_block_size",
        )
        found = [
            f"attention.{name} is {value}; it must be at least 1"
            for name in numbers
            if (value := getattr(self, name)) < 1
        ]
        for name in ("late_csa_ratio", "top_k_blocks"):
            if (asked := getattr(self, name)) is not None and asked < 1:
                found.append(f"attention.{name} is {asked}; it must be at least 1, or null")
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
        found += [] if found else self._sharing_problems(model) + self._choice_problems()
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
                f"{model.num_layers}; name each, or choose csa, hca, v4 or v4_flash"
            ]
        return [
            f"attention.layer_kinds has {kind}; choose csa, hca or window for each layer"
            for kind in sorted({*self.layer_kinds} - {"csa", "hca", "window"})
        ]

    def _sharing_problems(self, model: ModelConfig) -> list[str]:
        """Of which layers make entries, and of which choose."""
        found, kinds = [], compressed_kinds(model.num_layers, self.arguments)
        csa = [i for i, kind in enumerate(kinds) if kind == "csa"]
        for name in ("entry_layers", "index_layers"):
            asked = getattr(self, name)
            if isinstance(asked, int):
                if asked < 1:
                    found.append(f"attention.{name} is {asked}; it must be at least 1")
            elif others := sorted({*asked} - {*csa}):
                found.append(
                    f"attention.{name} names layer {others[0]}, which is not one of csa; name some "
                    f"of {csa}"
                )
        if found:
            return found
        entries, index = self.entry_layers, self.index_layers
        for layer in self.layers(model):
            makes = layer.makes_entries and layer.kind == "csa"
            if makes and isinstance(entries, tuple) and layer.number not in entries:
                return [
                    f"attention.entry_layers {_shown(entries)} does not name layer {layer.number}, "
                    f"before which no layer makes entries of {layer.ratio} tokens; name it"
                ]
            if layer.chooses and isinstance(index, tuple) and layer.number not in index:
                return [
                    f"attention.index_layers {_shown(index)} does not name layer {layer.number}, "
                    "whose entries no layer before has chosen among; name it"
                ]
        return []

    def _choice_problems(self) -> list[str]:
        blocks = self.top_k_blocks
        if blocks is None or blocks * self.index_block_size >= self.top_k:
            return []
        return [
            f"attention.top_k_blocks {blocks} x attention.index_block_size "
            f"{self.index_block_size} are fewer entries than attention.top_k {self.top_k}; raise "
            "it, or lower attention.top_k"
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


def _shown(layers: int | tuple[int, ...]) -> int | list[int]:
    """As a config has them."""
    return list(layers) if isinstance(layers, tuple) else layers
