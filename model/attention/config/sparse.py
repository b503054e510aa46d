"""Settings of window, selected blocks and pooled rest in one softmax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from model.attention.config.base import BY_HEAD, AttentionConfig, layer_problems, uneven_heads
from model.config import ModelConfig
from model.cost.parameters import index_shape, sparse_layers
from ops.sparse_attention.spec import SparseAttentionSpec

if TYPE_CHECKING:
    from model.attention.base import Attention

REGULARISERS = ("mass_kl_coeff", "coherence_coeff", "alignment_coeff")
"""Settings that weigh a loss on audited rows."""


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
    rank_lse: Literal["exact", "super"] = "exact"
    """What the masses of a head's blocks are shares of, when `score` ranks them. exact: the whole
    softmax of the past, for which its entries are read once more. super: an estimate of it from
    super-blocks of `fanout` blocks, which reads a part of them.
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
    entries_dtype: Literal["native", "fp8"] = "native"
    """Of pooled entries in a bounded cache, whose size they decide. native: that of the weights.
    fp8: e4m3, with a power of two for each entry. Training and the first piece of a prompt have
    them as they are.
    """
    min_sparse_length: int = 0
    """Queries at positions below this in their document attend densely."""
    num_levels: int = 1
    """2 selects among super-blocks first."""
    fanout: int = 8
    """Blocks of a super-block, which num_levels=2 and rank_lse=super have."""
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

    def parted_problems(self, model: ModelConfig, parts: Sequence[Sequence[int]]) -> list[str]:
        """What keeps layers from being cut into these parts: layers that choose as one are in one
        of them.
        """
        part_of = {i: n for n, part in enumerate(parts) for i in part}
        for layer in range(model.num_layers):
            group = self.index_group(model, layer)
            if group and part_of.get(group[0]) != part_of.get(layer):
                return [
                    f"attention.index_layers {self.index_layers} lets layer {layer} follow the "
                    f"choice of layer {group[0]}, but pipeline stages are cut between them; set "
                    "attention.index_layers=1, or move the cut (parallel.pipeline_split)"
                ]
        return []

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
        return uneven_heads(model, size)

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
        found += layer_problems(model, self.interval, self.dense_layers, alone=not found)
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
            "rank_lse": ("exact", "as the index ranks"),
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
