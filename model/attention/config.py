"""What each attention can be asked for, and which requests contradict themselves or the model.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from model.component import Component
from model.config import ModelConfig
from model.cost.parameters import (
    compressed_kinds,
    compressed_ratio,
    index_shape,
    sparse_layers,
    windowed_layers,
)
from ops.compressed_attention.spec import CompressedSpec
from ops.index_attention.spec import IndexSpec
from ops.sparse_attention.spec import SparseAttentionSpec

if TYPE_CHECKING:
    from model.attention.base import Attention

BY_HEAD = {
    **{f"{name}_proj.{kind}": 0 for name in "qkv" for kind in ("weight", "bias")},
    "o_proj.weight": 1,
}
"""Projections of queries, keys, values and outputs -> the dimension that their heads are along."""
REGULARISERS = ("mass_kl_coeff", "coherence_coeff", "alignment_coeff")
"""Settings that weigh a loss on audited rows."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Component):
    """The settings of an attention."""

    by_head: ClassVar[Mapping[str, int]] = {}
    """Name of a parameter whose rows or columns belong to heads -> the dimension that these are
    along, in neighbouring runs. Tensor parallelism cuts it there, and what is not named is whole.
    Empty: this attention cannot be cut.
    """

    def problems(self, model: ModelConfig) -> list[str]:
        """Contradictions of the knobs with each other and the model, which has been checked."""
        raise NotImplementedError

    def context_problems(self, model: ModelConfig, size: int) -> list[str]:
        """What keeps `size` ranks from sharing rows, each with all of them for some of the heads
        (SequenceLayout.to_heads).
        """
        return [
            f"attention={self.name} does not say how ranks share out its heads; set "
            "parallel.context_parallel_size=1"
        ]

    gathers: ClassVar[bool] = False
    """Whether some of the tokens can attend to whole rows (SequenceLayout.to_keys)."""

    def sharing_problems(self, model: ModelConfig, size: int, gather: int) -> list[str]:
        """What keeps `size` ranks from sharing rows, of which `gather` gather keys and values, and
        those between them share out heads.
        """
        by_heads = size // gather
        if size == 1:
            return []
        if gather > 1 and not self.gathers:
            return [
                f"parallel.context_gather_size is {gather}, but attention={self.name} does not "
                "compute queries of a part of a row; set parallel.context_gather_size=1"
            ]
        found = self.context_problems(model, by_heads) if by_heads > 1 else []
        over = f"parallel.context_parallel_size {size} / parallel.context_gather_size {gather}"
        name = f"parallel.context_parallel_size {by_heads}"
        return [p if gather == 1 else p.replace(name, f"{over} = {by_heads}") for p in found]

    def work(self, model: ModelConfig, places: Any) -> Any:
        """What queries at these places of their documents cost in all layers together, in the unit
        of a key that is read: by this rows are dealt out to ranks that gather. places: a tensor of
        integers, as what returns.
        """
        return (places + 1) * model.num_layers

    def tensor_problems(self, model: ModelConfig, size: int, context: int) -> list[str]:
        """What keeps `size` ranks from having a part of the heads each, which `context` ranks then
        share out further.
        """
        name = f"parallel.tensor_parallel_size {size}"
        if not self.by_head:
            return [
                f"attention={self.name} does not say which of its parameters belong to heads; set "
                "parallel.tensor_parallel_size=1"
            ]
        if model.num_kv_heads % (size * context) == 0:
            return []
        over = "" if context == 1 else f" x parallel.context_parallel_size {context}"
        return [
            f"{name}{over} does not divide model.num_kv_heads {model.num_kv_heads}, which its "
            "ranks share out; lower it"
        ]

    def rotary_size(self, model: ModelConfig) -> int:
        """Dimensions of a head that are turned by its position."""
        return model.rotary_size

    def is_sparse(self, model: ModelConfig, layer_idx: int) -> bool:
        """Whether the layer leaves something out by a choice, which is measured."""
        return False

    def build(self, model: ModelConfig, layer_idx: int = 0) -> Attention:
        """The attention of one layer, with its weights still to be drawn."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DenseAttentionConfig(AttentionConfig):
    """Every query sees everything before it in its document."""

    name = "dense"
    by_head = BY_HEAD
    gathers = True

    def problems(self, model: ModelConfig) -> list[str]:
        return []

    def context_problems(self, model: ModelConfig, size: int) -> list[str]:
        return _uneven_heads(model, size)

    def build(self, model: ModelConfig, layer_idx: int = 0) -> Attention:
        from model.attention.dense import DenseAttention

        return DenseAttention(model)


@dataclass(frozen=True, kw_only=True)
class WindowedAttentionConfig(AttentionConfig):
    """Dense attention of which some layers see a sliding window (gpt-oss, arXiv 2508.10925)."""

    name = "windowed"
    by_head = BY_HEAD | {"sinks": 0}
    gathers = True

    window: int = 128
    """Tokens up to and with the query that a sliding layer sees."""
    window_layers: Literal["alternate", "all"] | tuple[int, ...] = "alternate"
    """Layers that slide: every second one from the first on, all, or these; negative numbers count
    from the end.
    """
    sinks: bool = False
    """Learn a logit per head that takes its share of the softmax and has no value, on every
    layer.
    """

    def slides(self, model: ModelConfig, layer_idx: int) -> bool:
        """Whether the layer sees a window alone."""
        return layer_idx in windowed_layers(model.num_layers, self.arguments)

    def work(self, model: ModelConfig, places: Any) -> Any:
        sliding = len(windowed_layers(model.num_layers, self.arguments))
        seen = (places + 1).clamp(max=self.window)
        return sliding * seen + (model.num_layers - sliding) * (places + 1)

    def context_problems(self, model: ModelConfig, size: int) -> list[str]:
        return _uneven_heads(model, size)

    def problems(self, model: ModelConfig) -> list[str]:
        found = []
        if self.window < 1:
            found.append(f"attention.window is {self.window}; it must be at least 1")
        if isinstance(self.window_layers, str):
            return found
        found += [
            f"attention.window_layers names layer {i}, but the model has {model.num_layers} layers"
            for i in self.window_layers
            if not -model.num_layers <= i < model.num_layers
        ]
        if not self.window_layers and not self.sinks:
            found.append(
                "attention.window_layers is empty and attention.sinks false, which is dense "
                "attention; use attention=dense"
            )
        return found

    def build(self, model: ModelConfig, layer_idx: int = 0) -> Attention:
        from model.attention.windowed import WindowedAttention

        return WindowedAttention(model, self, layer_idx)


@dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig(AttentionConfig):
    """Window, selected blocks and pooled rest in one softmax (ops/sparse_attention/README.md)."""

    name = "sparse"
    gathers = True
    by_head = BY_HEAD | dict.fromkeys(
        (
            *("offset", "sink", "entry_weights"),
            *("trust.weight", "trust.bias", "gates.weight", "gates.bias"),
        ),
        0,
    )

    block_size: int = 64
    """Tokens of a selectable block."""
    top_k: int = 16
    """Blocks selected per query and key/value head, beside the forced ones."""
    window_size: int = 512
    """Tokens up to and with the query that are always exact, rounded up to blocks."""
    num_sink_blocks: int = 1
    """First blocks of a document that are always exact."""
    coarse_block_size: int = 32
    """Tokens pooled into one coarse entry; divides block_size."""
    entries: Literal["mean", "gated"] = "mean"
    """How tokens are pooled into an entry. mean: equally. gated: under weights per channel that a
    layer learns to read from the values; they start equal, so that dense checkpoints convert.
    """
    order: int = 2
    """0: coarse entries are means. 2: they have the variance term as well."""
    max_variance: float = 4.0
    """Bound of the variance term."""
    score: Literal["prob", "max", "error_gain"] = "prob"
    """Rank of a block: its estimated mass, its largest logit, or the part of its estimated mass
    that the variance term made.
    """
    select: Literal["mass", "index"] = "mass"
    """What chooses the blocks. mass: the rank that `score` gives. index: a small learned index,
    with a query for each key/value head and a key for each token, which learns from the masses of
    the layer's own softmax (ops/index_attention/README.md).
    """
    index_head_dim: int | None = None
    """Dimensions of an index head. None: those of the model's heads."""
    index_coeff: float = 1.0
    """Weight of the index's loss, its divergence in nats from the attention's own masses, as a mean
    over tokens, summed over the layers with an index.
    """
    index_steps: int = 0
    """Steps after the dense ones in which blocks are still selected by mass while the index
    learns. Weights that come without an index need some.
    """
    index_layers: int = 1
    """An index for so many sparse layers: it chooses in the first one, and the next ones follow."""
    tail: Literal["coarse", "drop"] = "coarse"
    """Whether what is not selected is pooled or dropped."""
    top_p: float | None = None
    """Share of the estimated mass that the selection must cover: fewer than top_k blocks are taken
    where that is enough. None: always top_k.
    """
    resident_blocks: int | None = None
    """Blocks whose tokens a cache keeps, for each key/value head, beside the first ones, the window
    and what began since the last boundary; other blocks cannot be selected any more, in training as
    in decoding. None: all.
    """
    resident_interval: int = 1024
    """Tokens of a document between boundaries, at which the resident blocks are chosen anew, by the
    estimated mass that earlier queries gave them.
    """
    resident_decay: float = 0.9
    """What such a mass still counts after one more interval."""
    min_sparse_length: int = 0
    """Queries at positions below this in their document attend densely."""
    num_levels: int = 1
    """2 selects among super-blocks first."""
    fanout: int = 8
    """Blocks of a super-block."""
    num_expanded: int = 4
    """Super-blocks that a query opens."""
    merge: Literal["lse", "gated"] = "lse"
    """lse is one softmax. gated adds three (coarse entries, selected blocks, window), weighted by
    sigmoid gates of the hidden state (NSA, arXiv 2502.11089).
    """
    offset: bool = False
    """Learn a bias per head on the logits of coarse entries."""
    trust: bool = False
    """Learn log sigmoid(w_h x + b_h) on top of it, with b_h = 4 at the start."""
    sink: bool = False
    """Learn a logit per head that has no value."""
    dense_layers: tuple[int, ...] = ()
    """Layers that stay dense, from 0; negative numbers count from the end."""
    interval: int = 1
    """One layer in so many is sparse."""
    dense_steps: int = 0
    """Optimisation steps before which all layers are dense."""
    noise_steps: int = 0
    """Steps after these in which the selection is noisy in training: Gumbel noise that falls from
    `temperature` to 0, and from min_top_k to top_k blocks.
    """
    temperature: float = 1.0
    """Of the Gumbel noise at its start."""
    min_top_k: int | None = None
    """In the noisy steps the number of blocks is drawn from min_top_k to top_k. None: top_k."""
    mass_kl_coeff: float = 0.0
    """Regulariser: estimated against true block masses (ops/sparse_attention/audit.py)."""
    coherence_coeff: float = 0.0
    """Regulariser: variance within blocks where the tail has mass."""
    alignment_coeff: float = 0.0
    """Regulariser: distance from dense attention."""
    audit_rows: float = 0.002
    """Share of tokens that are compared with dense attention when measuring, and at every step if
    there are regularisers. 0 switches the comparison off.
    """

    @property
    def regularisers(self) -> tuple[float, float, float]:
        """The weights of REGULARISERS, in that order."""
        return self.mass_kl_coeff, self.coherence_coeff, self.alignment_coeff

    def spec(self) -> SparseAttentionSpec:
        """What the op is asked for.

        Raises:
            ValueError: the settings contradict each other, one problem a line.
        """
        names = {field.name for field in dataclasses.fields(SparseAttentionSpec)}
        return SparseAttentionSpec(**{n: v for n, v in self.arguments.items() if n in names})

    def is_sparse(self, model: ModelConfig, layer_idx: int) -> bool:
        """Whether `interval` and `dense_layers` leave the layer sparse."""
        return layer_idx in sparse_layers(model.num_layers, self.arguments)

    def work(self, model: ModelConfig, places: Any) -> Any:
        sparse = len(sparse_layers(model.num_layers, self.arguments))
        exact = self.window_size + (self.top_k + self.num_sink_blocks) * self.block_size
        # Entries of everything in the past are at least ranked, with or without a tail.
        pooled = self.coarse_block_size * (self.fanout if self.num_levels == 2 else 1)
        seen = (places + 1).clamp(max=exact) + places // pooled
        return sparse * seen + (model.num_layers - sparse) * (places + 1)

    def index_shape(self, model: ModelConfig) -> tuple[int, int]:
        """Heads of an index, and the dimensions of each."""
        return index_shape(model, self.arguments)

    def index_group(self, model: ModelConfig, layer_idx: int) -> list[int]:
        """The layers that choose as one, with this one among them; the first one has the index.
        Empty: the layer selects by mass.
        """
        if self.select != "index":
            return []
        layers = sparse_layers(model.num_layers, self.arguments)
        if layer_idx not in layers:
            return []
        begin = layers.index(layer_idx) // self.index_layers * self.index_layers
        return layers[begin : begin + self.index_layers]

    def sharing_problems(self, model: ModelConfig, size: int, gather: int) -> list[str]:
        if gather == 1 or size == 1:
            return super().sharing_problems(model, size, gather)
        name = f"parallel.context_gather_size is {gather}"
        if self.select == "index":
            return [
                f"{name}, but with attention.select=index a layer chooses for whole rows, of which "
                "a rank that gathers has some of the queries; set parallel.context_gather_size=1 "
                "and parallel.context_parallel_size=1, or attention.select=mass"
            ]
        if self.resident_blocks is not None:
            return [
                f"{name}, but attention.resident_blocks {self.resident_blocks} keeps blocks by the "
                "masses of all queries, of which a rank that gathers has some; set "
                "parallel.context_gather_size=1, or attention.resident_blocks=null"
            ]
        return super().sharing_problems(model, size, gather)

    def context_problems(self, model: ModelConfig, size: int) -> list[str]:
        if self.select == "index":
            return [
                f"parallel.context_parallel_size is {size}, but with attention.select=index a "
                "layer chooses for whole rows with all heads of its index, which ranks that share "
                "out heads do not have; set parallel.context_parallel_size=1, or "
                "attention.select=mass"
            ]
        return _uneven_heads(model, size)

    def tensor_problems(self, model: ModelConfig, size: int, context: int) -> list[str]:
        if self.select == "index":
            return [
                f"parallel.tensor_parallel_size is {size}, but with attention.select=index a layer "
                "chooses with all heads of its index, of which no rank has a part; set "
                "parallel.tensor_parallel_size=1, or attention.select=mass"
            ]
        return super().tensor_problems(model, size, context)

    def problems(self, model: ModelConfig) -> list[str]:
        try:
            spec = self.spec()
        except ValueError as error:
            return [f"attention.{problem}" for problem in str(error).splitlines()]
        found = [
            f"attention.{name} is {getattr(self, name)}; it must not be negative"
            for name in ("dense_steps", "noise_steps", "index_steps", "temperature", *REGULARISERS)
            if getattr(self, name) < 0
        ]
        if self.interval < 1:
            return [*found, f"attention.interval is {self.interval}; it must be at least 1"]
        found += _layer_problems(self, model, alone=not found)
        found += self._audit_problems()
        found += self._gate_problems(spec) if self.merge == "gated" else []
        found += self._entry_problems(spec) if self.entries == "gated" else []
        found += self._index_problems(spec, model) + self._resident_problems()
        # The gates weigh a coarse branch of their own, whatever becomes of the one softmax's tail.
        if spec.tail == "drop" and self.merge != "gated":
            found += [
                f"attention.{name} acts on coarse entries, which tail=drop does not have; switch "
                "it off"
                for name in ("offset", "trust")
                if getattr(self, name)
            ]
        return found + self._noise_problems()

    def _audit_problems(self) -> list[str]:
        if not 0 <= self.audit_rows <= 1:
            return [
                f"attention.audit_rows is {self.audit_rows}; it is a share of tokens, between 0 "
                "and 1"
            ]
        if self.audit_rows == 0 and any(self.regularisers):
            return [
                "attention.audit_rows is 0, but the regularisers work on audited rows; raise it, "
                f"or set {', '.join(REGULARISERS)} to 0"
            ]
        return []

    def _gate_problems(self, spec: SparseAttentionSpec) -> list[str]:
        found = []
        if spec.num_levels == 2:
            found.append(
                "attention.num_levels=2 keeps super-blocks in the one softmax, which merge=gated "
                "does not have"
            )
        if any(self.regularisers):
            found.append(
                "attention.merge=gated has no dense attention to approach; set "
                f"{', '.join(REGULARISERS)} to 0"
            )
        return found + [
            f"attention.{name} corrects the one softmax, which merge=gated does not have; switch "
            "it off"
            for name in ("offset", "trust", "sink")
            if getattr(self, name)
        ]

    def _entry_problems(self, spec: SparseAttentionSpec) -> list[str]:
        found = []
        if spec.num_levels == 2:
            found.append(
                "attention.entries=gated does not reach super-blocks, whose tokens are pooled "
                "equally; set attention.num_levels=1"
            )
        if self.merge == "gated":
            found.append(
                "attention.entries=gated learns through the one softmax, which merge=gated does "
                "not have; set attention.merge=lse"
            )
        elif spec.tail == "drop":
            found.append(
                "attention.entries=gated learns through the tail, which tail=drop does not have; "
                "set attention.tail=coarse"
            )
        return found

    def _index_problems(self, spec: SparseAttentionSpec, model: ModelConfig) -> list[str]:
        if self.select == "mass":
            without = {
                "index_head_dim": None,
                "index_coeff": 1.0,
                "index_steps": 0,
                "index_layers": 1,
            }
            return [
                f"attention.{name} is {value}, but attention.select=mass has no index; set "
                f"attention.select=index, or drop it"
                for name, default in without.items()
                if (value := getattr(self, name)) != default
            ]
        found = []
        if self.index_coeff <= 0:
            found.append(
                f"attention.index_coeff is {self.index_coeff}, so that nothing would teach the "
                "index, which would choose at random; it must be above 0"
            )
        if self.index_layers < 1:
            found.append(f"attention.index_layers is {self.index_layers}; it must be at least 1")
        if spec.top_k == 0:
            found.append("attention.select=index has nothing to choose with attention.top_k=0")
        _, width = self.index_shape(model)
        if width < max(1, model.rotary_size):
            found.append(
                f"attention.index_head_dim is {width}, but positions turn {model.rotary_size} "
                "dimensions of a head; raise it, or lower model.rotary_dim"
            )

        # What would be left unread, or has no masses to teach by.
        instead = {
            "tail": ("coarse", "whose mass teaches the index"),
            "merge": ("lse", "whose masses teach the index"),
            "num_levels": (1, "as the index has no super-blocks"),
            "score": ("prob", "as the index ranks"),
            "top_p": (None, "as an index knows no masses"),
            "noise_steps": (0, "as the choice of an index has no noise"),
        }
        return found + self._uncombined("attention.select=index", instead)

    def _resident_problems(self) -> list[str]:
        if self.resident_blocks is None:
            defaults = {"resident_interval": 1024, "resident_decay": 0.9}
            return [
                f"attention.{name} is {value}, but attention.resident_blocks=null keeps all "
                "blocks; set attention.resident_blocks, or drop it"
                for name, default in defaults.items()
                if (value := getattr(self, name)) != default
            ]
        instead = {
            "merge": ("lse", "in whose softmax evicted blocks stay"),
            "select": ("mass", "by which blocks stay resident"),
            "noise_steps": (0, "as the choice among resident blocks has no noise"),
        }
        return self._uncombined("attention.resident_blocks", instead)

    def _uncombined(self, other: str, instead: Mapping[str, tuple[Any, str]]) -> list[str]:
        """Settings of this attention that `other` does not go with. instead: by setting the value
        that it goes with, and why.
        """
        return [
            f"attention.{name}={asked} does not combine with {other}; set attention.{name}="
            f"{'null' if value is None else value}, {why}"
            for name, (value, why) in instead.items()
            if (asked := getattr(self, name)) != value
        ]

    def _noise_problems(self) -> list[str]:
        if self.min_top_k is None:
            return []
        if not 0 <= self.min_top_k <= self.top_k:
            return [
                f"attention.min_top_k is {self.min_top_k}; it must be between 0 and "
                f"attention.top_k {self.top_k}, or null"
            ]
        if self.noise_steps <= 0:
            return [
                f"attention.min_top_k {self.min_top_k} acts during the noisy steps, but "
                "attention.noise_steps is 0"
            ]
        return []

    def build(self, model: ModelConfig, layer_idx: int = 0) -> Attention:
        from model.attention.sparse import SparseAttention

        return SparseAttention(model, self, layer_idx)


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
        found += _layer_problems(self, model, alone=not found)

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
        return found + _model_uncombined(model, "compressed", instead)

    def build(self, model: ModelConfig, layer_idx: int = 0) -> Attention:
        from model.attention.compressed import CompressedAttention

        return CompressedAttention(model, self, layer_idx)


@dataclass(frozen=True, kw_only=True)
class MlaConfig(AttentionConfig):
    """Multi-head latent attention (arXiv 2405.04434): every query sees everything before it in its
    document; keys and values of all heads are projections of one latent.
    """

    name = "mla"
    gathers = True
    by_head: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(("q_proj.weight", "q_b_proj.weight", "kv_b_proj.weight"), 0),
        "o_proj.weight": 1,
    }

    q_lora_rank: int | None = 1536
    """Width of the latent that queries come from; null: they come from the hidden state."""
    kv_lora_rank: int = 512
    """Width of the latent that keys and values come from."""
    qk_nope_head_dim: int = 128
    """Dimensions of a head's query and key that know nothing of positions."""
    qk_rope_head_dim: int = 64
    """Dimensions that are turned by the position; their key is the same for all heads."""
    v_head_dim: int = 128
    """Dimensions of a head's value."""

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def softmax_scale(self, model: ModelConfig) -> float:
        """What the logits are multiplied by."""
        stretched = 1.0 if model.rope_scaling is None else model.rope_scaling.latent_softmax_factor
        return float(self.qk_head_dim**-0.5) * stretched

    def rotary_size(self, model: ModelConfig) -> int:
        return self.qk_rope_head_dim

    def context_problems(self, model: ModelConfig, size: int) -> list[str]:
        return _uneven_heads(model, size)

    def problems(self, model: ModelConfig) -> list[str]:
        found = [
            f"attention.{name} is {value}; it must be at least 1"
            + (", or null for queries without a latent" if name == "q_lora_rank" else "")
            for name, value in self.arguments.items()
            if value is not None and value < 1
        ]
        if self.qk_rope_head_dim % 2:
            found.append(
                f"attention.qk_rope_head_dim is {self.qk_rope_head_dim}; rotary embedding needs an "
                "even number"
            )

        # What the model says of attention must not contradict, nor be left unread.
        if model.num_kv_heads != model.num_heads:
            found.append(
                f"model.num_kv_heads is {model.num_kv_heads}, but with attention=mla each of the "
                f"model.num_heads {model.num_heads} heads has keys and values of its own, made "
                f"from the latent; set model.num_kv_heads={model.num_heads}"
            )
        if model.head_dim not in (None, self.qk_head_dim):
            found.append(
                f"model.head_dim is {model.head_dim}, but with attention=mla a head has "
                "attention.qk_nope_head_dim + attention.qk_rope_head_dim = "
                f"{self.qk_head_dim} dimensions; set model.head_dim=null"
            )
        instead = {
            "qk_norm": ("none", "which normalises the latents"),
            "attention_bias": ("none", "whose projections have no biases"),
            "attention_multiplier": (None, "whose logits are scaled by their own dimensions"),
            "rotary_dim": (None, "where attention.qk_rope_head_dim says what is turned"),
        }
        return found + _model_uncombined(model, "mla", instead)

    def build(self, model: ModelConfig, layer_idx: int = 0) -> Attention:
        from model.attention.latent import LatentAttention

        return LatentAttention(model, self)


def _model_uncombined(
    model: ModelConfig, attention: str, instead: Mapping[str, tuple[Any, str]]
) -> list[str]:
    """Settings of the model that an attention does not go with. instead: by setting the value that
    it goes with, and why.
    """
    return [
        f"model.{name}={asked} does not combine with attention={attention}, {why}; set "
        f"model.{name}={'null' if value is None else value}"
        for name, (value, why) in instead.items()
        if (asked := getattr(model, name)) != value
    ]


def _layer_problems(
    settings: SparseAttentionConfig | IndexedAttentionConfig, model: ModelConfig, alone: bool
) -> list[str]:
    """alone: nothing else was found, so that which layers are sparse means something."""
    found = [
        f"attention.dense_layers names layer {i}, but the model has {model.num_layers} layers"
        for i in settings.dense_layers
        if not -model.num_layers <= i < model.num_layers
    ]
    if alone and not found and not sparse_layers(model.num_layers, settings.arguments):
        found.append(
            f"attention.interval {settings.interval} and attention.dense_layers "
            f"{list(settings.dense_layers)} leave no sparse layer of {model.num_layers}; use "
            "attention=dense"
        )
    return found


def _uneven_heads(model: ModelConfig, size: int) -> list[str]:
    """A head with its keys and values is on one rank, so each has as many of these."""
    heads = model.num_kv_heads
    if heads % size == 0:
        return []
    fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    return [
        f"parallel.context_parallel_size {size} does not divide model.num_kv_heads {heads}, which "
        f"its ranks share out; choose one of {fitting}, or let more ranks gather keys and values "
        "(parallel.context_gather_size)"
    ]


ATTENTIONS: dict[str, type[AttentionConfig]] = {
    record.name: record
    for record in (
        DenseAttentionConfig,
        WindowedAttentionConfig,
        SparseAttentionConfig,
        IndexedAttentionConfig,
        CompressedAttentionConfig,
        MlaConfig,
    )
}
"""Name in a config -> record."""
