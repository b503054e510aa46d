"""Parameters and FLOPs of a shape: one formula for plan, MFU, docs and benches. Imports no
torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeGuard

from model.config import ModelConfig
from model.cost.entries import EntryLayer, compressed_kinds, entry_layers, pool_shapes


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
    mtp: int = 0
    """Of the modules of multi-token prediction, which are trained and saved but do not generate,
    without their routed experts.
    """
    mtp_experts: int = 0
    """Routed experts of these modules."""
    mtp_matrices: int = 0
    """What a token multiplies with in these modules, before the head."""
    streams: int = 0
    """Of what reads, writes and mixes several residual streams."""
    cut: int = 0
    """What tensor parallelism splits: what belongs to heads of attention, which norms of single
    heads, the bias of its output and projections into latents do not; dense MLPs, embedding and
    head.
    """

    @property
    def total(self) -> int:
        return (
            self.embedding
            + self.attention
            + self.dense_mlp
            + self.router
            + self.shared_experts
            + self.experts
            + self.norms
            + self.streams
            + self.mtp
            + self.mtp_experts
        )

    @property
    def all_experts(self) -> int:
        """What expert parallelism splits."""
        return self.experts + self.mtp_experts

    @property
    def dense(self) -> int:
        """Everything that it does not split."""
        return self.total - self.all_experts

    @property
    def active(self) -> int:
        return self.dense - self.mtp + self.active_experts


@dataclass(frozen=True)
class Trained:
    """Parameters that are trained, and adapters among them, which come on top of those of the
    shape; of all ranks.
    """

    dense: int
    """All but those of routed experts."""
    experts: int
    dense_adapters: int = 0
    expert_adapters: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.experts

    @property
    def adapters(self) -> int:
        return self.dense_adapters + self.expert_adapters


def count_parameters(
    config: ModelConfig,
    experts_per_token: float,
    attention: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
) -> ParameterCount:
    """Count parameters; `experts_per_token` is the (mean) number of routed experts a token visits;
    attention: arguments of sparse or latent attention, None or empty: dense. layers: of one stage
    of a pipeline, where those of the model's ends have what stands before and behind them; None:
    all.
    """
    hidden = config.hidden_size
    layers = range(config.num_layers) if layers is None else layers
    is_first, is_last = 0 in layers, config.num_layers - 1 in layers
    num_layers = len(layers)
    num_moe = sum(config.is_moe_layer(layer) for layer in layers)
    num_mtp = config.num_mtp_layers if is_last else 0
    if is_latent(attention):
        projections, inner_norms = _latent_parameters(config, attention)
    elif is_compressed(attention):
        projections = sum(
            rows * columns for rows, columns in compressed_matrices(config, attention)
        )
        inner_norms = attention["q_lora_rank"] + config.attention_head_dim
    else:
        projections, inner_norms = _grouped_query_parameters(config)
    one_expert = 3 * hidden * config.expert_intermediate_size
    biases_of_one = (2 * config.expert_intermediate_size + hidden) * config.expert_bias
    router = hidden * config.num_experts
    routed = config.num_experts * (one_expert + biases_of_one)
    shared = config.num_shared_experts * one_expert + hidden * config.shared_expert_gate

    # A module of multi-token prediction: two norms and the projection, a layer, and a norm.
    has_experts = config.is_moe_layer(config.num_layers)
    mlp = router + shared if has_experts else 3 * hidden * config.intermediate_size
    norms = 5 * hidden + inner_norms
    # windowed attention has them on every layer
    sinks = config.num_heads * bool(attention and "window" in attention and attention["sinks"])
    module = 2 * hidden * hidden + projections + mlp + norms + sinks
    one_visit = round(experts_per_token * one_expert) if has_experts else 0
    ends = is_first + (is_last and not config.tie_embeddings)
    heads_norms = inner_norms * (config.qk_norm == "hidden")
    of_no_head = hidden * (config.attention_bias == "qkvo")
    if is_latent(attention):
        width = (attention["q_lora_rank"] or 0) + attention["kv_lora_rank"]
        of_no_head = hidden * (width + attention["qk_rope_head_dim"])
    of_heads = projections + heads_norms - of_no_head
    of_modules = of_heads + sinks + mlp * (not has_experts)
    corrections = _corrections(config, attention or {}, layers)
    dense_mlp = (num_layers - num_moe) * 3 * hidden * config.intermediate_size
    return ParameterCount(
        embedding=config.vocab_size * hidden * ends,
        attention=num_layers * projections + corrections,
        dense_mlp=dense_mlp,
        router=num_moe * router,
        shared_experts=num_moe * shared,
        experts=num_moe * routed,
        norms=num_layers * (2 * hidden + inner_norms)
        + hidden * is_last
        + _entry_norms(config, attention, layers)
        + index_parameters(config, attention, layers)[1],
        streams=stream_parameters(config, layers),
        active_experts=round(num_moe * experts_per_token * (one_expert + biases_of_one)),
        mtp=num_mtp * module,
        mtp_experts=num_mtp * routed if has_experts else 0,
        mtp_matrices=num_mtp * (module - norms - sinks + one_visit),
        cut=config.vocab_size * hidden * ends
        + num_layers * of_heads
        + corrections
        + dense_mlp
        + num_mtp * of_modules,
    )


def stream_parameters(config: ModelConfig, layers: Sequence[int], vectors: bool = True) -> int:
    """Of several residual streams (model/blocks/streams.py), in the layers here and, of the last
    stage, behind them; vectors: biases and scales as well.
    """
    number = config.num_residual_streams
    if number == 1:
        return 0
    rows, is_last = number * (number + 2), config.num_layers - 1 in layers
    mixer = rows * config.residual_size + (rows + 3) * vectors
    behind = number * config.residual_size + (number + 1) * vectors
    return 2 * len(layers) * mixer + is_last * behind


def index_parameters(
    config: ModelConfig, attention: Mapping[str, Any] | None, layers: Sequence[int] | None = None
) -> tuple[int, int]:
    """Of the projections of all indexes, and of their norms (of queries and keys, or of keys with a
    bias), of compressed attention with their biases of places. layers: those that count; None: all.
    """
    if not has_index(attention):
        return 0, 0
    layers = range(config.num_layers) if layers is None else layers
    if is_compressed(attention):
        return _entry_index_parameters(config, attention, layers)
    number = number_in(layers, index_layers(config.num_layers, attention))
    matrices = sum(rows * columns for rows, columns in index_matrices(config, attention))
    return number * matrices, number * 2 * index_shape(config, attention)[1]


def _entry_index_parameters(
    config: ModelConfig, attention: Mapping[str, Any], layers: Sequence[int]
) -> tuple[int, int]:
    """Likewise of compressed attention, where index keys are made with the entries."""
    width, matrices, vectors = attention["index_head_dim"], 0, 0
    for layer in entry_layers(config.num_layers, attention):
        if layer.number not in layers or not layer.chooses:
            continue
        shapes = entry_index_matrices(config, attention, layer)
        matrices += sum(rows * columns for rows, columns in shapes)
        if layer.makes_entries:
            vectors += width
            if attention["index_keys"] == "pooled":
                vectors += _slot_biases(width, attention, layer)
    return matrices, vectors


def _slot_biases(width: int, attention: Mapping[str, Any], layer: EntryLayer) -> int:
    """Of a pool to `width` channels."""
    has_biases = attention["slot_bias"] and layer.is_gated
    return width * (1 + layer.overlaps) * layer.ratio * has_biases


def _entry_norms(
    config: ModelConfig, attention: Mapping[str, Any] | None, layers: Sequence[int]
) -> int:
    """Of the norms of compressed attention's entries."""
    if not is_compressed(attention):
        return 0
    every = entry_layers(config.num_layers, attention)
    return config.attention_head_dim * sum(every[layer].makes_entries for layer in layers)


def is_latent(attention: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Whether these are the arguments of latent attention (MLA)."""
    return attention is not None and "kv_lora_rank" in attention


def is_indexed(attention: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Whether these are the arguments of attention by a learned index over grouped queries."""
    return attention is not None and "rule" in attention


def is_compressed(attention: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Whether these are the arguments of attention to a window and to pooled entries."""
    return attention is not None and "csa_ratio" in attention


def compressed_matrices(config: ModelConfig, attention: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Shapes of a layer's projections of any kind: queries by their latent, keys, outputs by groups
    (stacked blocks) and from there.
    """
    hidden, rank = config.hidden_size, attention["q_lora_rank"]
    width = config.num_heads * config.attention_head_dim
    groups = attention["output_groups"]
    between = groups * attention["o_lora_rank"]
    return [
        (rank, hidden),
        (width, rank),
        (config.attention_head_dim, hidden),
        (between, width // groups),
        (hidden, between),
    ]


def has_index(attention: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Whether some layers choose by a learned index: those of is_indexed, compressed attention with
    layers that choose entries, or sparse attention inside of which one chooses.
    """
    if is_compressed(attention):
        kinds = attention["layer_kinds"]
        return kinds in ("csa", "v4", "v4_flash") or (not isinstance(kinds, str) and "csa" in kinds)
    return attention is not None and (is_indexed(attention) or attention.get("select") == "index")


def index_layers(num_layers: int, attention: Mapping[str, Any]) -> list[int]:
    """The layers with an index of their own, of an attention that has_index."""
    if is_compressed(attention):
        return [layer.number for layer in entry_layers(num_layers, attention) if layer.chooses]
    return sparse_layers(num_layers, attention)[:: attention.get("index_layers", 1)]


def index_shape(config: ModelConfig, attention: Mapping[str, Any]) -> tuple[int, int]:
    """Heads of an index, and the dimensions of each."""
    return (
        attention.get("index_heads") or config.num_kv_heads,
        attention["index_head_dim"] or config.attention_head_dim,
    )


def index_matrices(config: ModelConfig, attention: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Shapes of a layer's projections to index queries, index keys and, with rule=dsa, weights."""
    heads, width = index_shape(config, attention)
    hidden = config.hidden_size
    weights = [(heads, hidden)] if attention.get("rule") == "dsa" else []
    return [(heads * width, hidden), (width, hidden), *weights]


def entry_index_matrices(
    config: ModelConfig, attention: Mapping[str, Any], layer: EntryLayer
) -> list[tuple[int, int]]:
    """Of a layer of compressed attention that chooses: to queries, weights and, where it makes
    entries, to index keys, or to what these are pooled from and its gates.
    """
    heads, width = index_shape(config, attention)
    found = [(heads * width, attention["q_lora_rank"]), (heads, config.hidden_size)]
    if not layer.makes_entries:
        return found
    if attention["index_keys"] == "projected":
        return [*found, (width, config.attention_head_dim)]
    return found + pool_shapes(width, config.hidden_size, layer)


def _grouped_query_parameters(config: ModelConfig) -> tuple[int, int]:
    """Of a layer's projections with their biases, and of its norms of queries and keys."""
    hidden, head_dim = config.hidden_size, config.attention_head_dim
    q_width, kv_width = config.num_heads * head_dim, config.num_kv_heads * head_dim
    norms = {"none": 0, "head": 2 * head_dim, "hidden": q_width + kv_width}[config.qk_norm]
    biases = {
        "none": 0,
        "qkv": q_width + 2 * kv_width,
        "qkvo": q_width + 2 * kv_width + hidden,
    }[config.attention_bias]
    return hidden * (2 * q_width + 2 * kv_width) + biases, norms


def _latent_parameters(config: ModelConfig, attention: Mapping[str, Any]) -> tuple[int, int]:
    """Of a layer's projections, and of its norms of latents."""
    hidden, heads = config.hidden_size, config.num_heads
    q_rank, kv_rank = attention["q_lora_rank"], attention["kv_lora_rank"]
    nope, rope = attention["qk_nope_head_dim"], attention["qk_rope_head_dim"]
    value = attention["v_head_dim"]
    q_width = heads * (nope + rope)
    queries = hidden * q_width if q_rank is None else q_rank * (hidden + q_width)
    latents = hidden * (kv_rank + rope) + kv_rank * heads * (nope + value)
    return queries + latents + heads * value * hidden, (q_rank or 0) + kv_rank


def _corrections(config: ModelConfig, attention: Mapping[str, Any], layers: Sequence[int]) -> int:
    """Parameters that layers learn beside dense attention's: sinks of windowed attention; offset,
    sink, trust, gates and weights of entries of sparse layers; an index without its norms; what
    entries of compressed attention are pooled by.
    """
    if is_compressed(attention):
        head_dim = config.attention_head_dim
        found = index_parameters(config, attention, layers)[0]
        for layer in entry_layers(config.num_layers, attention):
            if layer.number not in layers:
                continue
            adds = attention.get("sinks", True)  # what is added, not multiplied
            found += config.num_heads * adds
            if layer.makes_entries:
                shapes = pool_shapes(head_dim, config.hidden_size, layer)
                found += sum(rows * columns for rows, columns in shapes)
                found += _slot_biases(head_dim, attention, layer) * adds
        return found
    if is_indexed(attention):
        return index_parameters(config, attention, layers)[0]
    if "window" in attention:
        return len(layers) * config.num_heads * bool(attention["sinks"])
    projection = config.hidden_size + 1
    per_head = (
        bool(attention.get("offset"))
        + bool(attention.get("sink"))
        + projection * bool(attention.get("trust"))
        + 3 * projection * (attention.get("merge") == "gated")
    )
    # a matrix per key/value head, from values to weights in an entry's key and in its value
    weights = 2 * config.num_kv_heads * config.attention_head_dim**2
    per_layer = per_head * config.num_heads + weights * (attention.get("entries") == "gated")
    indexes = index_parameters(config, attention, layers)[0]
    if not per_layer:
        return indexes
    return indexes + per_layer * number_in(layers, sparse_layers(config.num_layers, attention))


def keys_per_query(seq_len: int, attention: Mapping[str, Any]) -> float:
    """Mean keys of a query in a sparse layer, over one document of seq_len tokens, as dense
    attention would cost the same.

    attention: arguments of model.attention.sparse.SparseAttention. Of the six products of dense
        attention for a key (scores and values, forward and twice backward) a coarse entry costs as
        many with order 0 and three more with order 2, and ranking the entries of all past blocks
        one or two; with rank_lse=super a super-block costs as much as an entry, and those entries
        are read that are candidates or behind the last whole one. Dense attention has seq_len / 2.
    """
    block = attention["block_size"]
    return _keys_per_query(
        seq_len,
        block,
        max(1, -(-(attention["window_size"] + block - 1) // block)),
        attention["num_sink_blocks"],
        attention["top_k"],
        attention["min_sparse_length"],
        block / attention["coarse_block_size"],
        attention["order"] == 2,
        attention["tail"] == "drop",
        attention["fanout"] if attention.get("rank_lse") == "super" else None,
    )


@lru_cache(maxsize=64)
def _keys_per_query(
    seq_len: int,
    block: int,
    local: int,
    num_sink_blocks: int,
    top_k: int,
    min_sparse_length: int,
    per_block: float,
    second_order: bool,
    drops: bool,
    fanout: int | None,
) -> float:
    """Remembered, since it goes through all blocks of a row and is asked for every stage of every
    layout. local: blocks of the window; per_block: coarse entries of a block; fanout: blocks of the
    super-blocks that a ranking in one pass reads, None where it reads the past.
    """
    total = 0.0
    for own in range(-(-seq_len // block)):
        queries = min(block, seq_len - own * block)
        forced = own if own * block < min_sparse_length else min(own, local - 1 + num_sink_blocks)
        selected = min(top_k, own - forced)
        keys = (forced + selected) * block + (queries + 1) / 2
        if not drops:
            keys += (own - forced - selected) * per_block * (1.5 if second_order else 1.0)
        if top_k > 0 and own > forced:
            ranked = own * per_block
            if fanout is not None:
                behind = min(own % fanout, local - 1)
                ranked = (own - forced + behind) * per_block + own // fanout
            keys += ranked * (2 if second_order else 1) / 6
        total += keys * queries
    return total / seq_len


def indexed_keys(seq_len: int, attention: Mapping[str, Any]) -> float:
    """Mean tokens that a query attends to by an index's choice, over one document of seq_len
    tokens; half a token less, as the mean of all is taken for seq_len / 2.

    A block of the query's own is taken to be half there.
    """
    size, top_k = attention["block_size"], attention["top_k"]
    most = top_k * size
    if attention["rule"] == "msa":
        most -= (size - 1) / 2
    elif attention["rule"] == "qsa":
        most += (size - 1) / 2
    most = min(most, seq_len)
    return float(most - 0.5 - most * (most - 1) / (2 * seq_len))


def closed_entries(seq_len: int, ratio: int, most: int | None = None) -> float:
    """Mean number of closed windows of `ratio` tokens that a query has before it, of which it sees
    `most`; None: all. Over one document of seq_len tokens.
    """
    number = seq_len // ratio
    number = number if most is None else min(number, most)
    total = ratio * number * (number - 1) / 2 + number * (seq_len - number * ratio + 1)
    return total / seq_len


def compressed_keys(seq_len: int, attention: Mapping[str, Any], layer: EntryLayer) -> float:
    """Mean tokens and entries that a query of compressed attention attends to, likewise; half a key
    less, as the mean of all is taken for seq_len / 2.
    """
    keys = window_keys(seq_len, attention["sliding_window"])
    if not layer.ratio:
        return keys
    most = None if layer.chooser is None else attention["top_k"]
    return keys + closed_entries(seq_len, layer.ratio, most)


def window_keys(seq_len: int, window: int) -> float:
    """Mean tokens that a query of a sliding window sees, half a token less; the first ones see what
    there is.
    """
    window = min(window, seq_len)
    return window - 0.5 - window * (window - 1) / (2 * seq_len)


def index_flops(
    config: ModelConfig,
    seq_len: int,
    attention: Mapping[str, Any] | None,
    layers: Sequence[int] | None = None,
    trains: bool = True,
) -> float:
    """Of a token, for the scores of all index keys before it, and in training for the gradients of
    those that were chosen; without the projections. As a mean over a document of seq_len tokens,
    over the layers here.

    Inside sparse attention every candidate has a gradient, which reaches the one token of its
    largest score, and layers that follow another one's choice score in training alone, to teach.
    """
    if not has_index(attention):
        return 0.0
    layers = range(config.num_layers) if layers is None else layers
    heads, width = index_shape(config, attention)
    number = number_in(layers, sparse_layers(config.num_layers, attention))
    if is_compressed(attention):
        scored = 0.0
        for layer in entry_layers(config.num_layers, attention):
            if layer.number not in layers or layer.chooser is None:
                continue
            # Layers that follow another one's choice score in training alone, to teach.
            if layer.chooses or trains:
                scored += 2.0 * closed_entries(seq_len, layer.ratio)
            if trains:
                scored += 4.0 * closed_entries(seq_len, layer.ratio, attention["top_k"])
        return scored * heads * width
    if not is_indexed(attention):
        scored = seq_len / 2 * (1 + 2 * trains / attention["block_size"])
        there = (sparse_layers if trains else index_layers)(config.num_layers, attention)
        return float(2.0 * heads * width * scored * number_in(layers, there))
    size = attention["block_size"]
    pooled = size if attention["rule"] == "qsa" else 1
    scored = seq_len / 2 / pooled
    by_layer = 2.0 * heads * width * scored
    if trains:
        # with rule=msa a block's gradient reaches the one token of its largest score
        chosen = indexed_keys(seq_len, attention) / (size if attention["rule"] != "dsa" else 1)
        by_layer += 4.0 * heads * width * chosen
    return by_layer * number


def flops_per_token(
    config: ModelConfig,
    experts_per_token: float,
    seq_len: int,
    attention: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
) -> float:
    """Training FLOPs of one token, forward and backward: 6 per active matrix parameter plus causal
    attention.

    The embedding look-up is no multiplication; the output head is, once more for every module of
    multi-token prediction. Attention costs 2*2*H*head_dim
    per key forward (scores and values), three times that with backward, over S/2 keys in dense
    layers. Recomputation is not counted (model FLOPs).
    attention: the arguments of sparse, windowed or latent attention; None or empty: dense. A head
        of latent attention has two dimensions, of its scores and of its values.
    layers: of one stage of a pipeline, the last of which has the head; None: all.
    """
    layers = range(config.num_layers) if layers is None else layers
    count = _matrices(config, experts_per_token, attention, layers)
    matrices = _matrices_before_head(count) + count.mtp_matrices
    keys = _mean_keys(config, seq_len, attention, layers)
    if config.num_layers - 1 in layers:
        matrices += (1 + config.num_mtp_layers) * config.vocab_size * config.hidden_size
        # the block of a module of multi-token prediction attends densely
        keys += config.num_mtp_layers * seq_len / 2
    flops = 6.0 * matrices + 6 * config.num_heads * _head_dims(config, attention) * keys
    # Nothing goes on from an index to the hidden states, whose gradient its matrices do not make.
    flops -= 2.0 * index_parameters(config, attention, layers)[0]
    return float(flops + index_flops(config, seq_len, attention, layers))


def _matrices(
    config: ModelConfig,
    experts_per_token: float,
    attention: Mapping[str, Any] | None,
    layers: Sequence[int] | None = None,
) -> ParameterCount:
    """What is multiplied with: biases and sinks are added."""
    matrices_alone = dataclasses.replace(config, attention_bias="none", expert_bias=False)
    without_sinks = {**attention, "sinks": False} if attention else None
    count = count_parameters(matrices_alone, experts_per_token, without_sinks, layers)
    here = range(config.num_layers) if layers is None else layers
    return dataclasses.replace(count, streams=stream_parameters(config, here, vectors=False))


def _matrices_before_head(count: ParameterCount) -> int:
    """Of a token's way through the blocks."""
    return (
        count.attention
        + count.dense_mlp
        + count.router
        + count.shared_experts
        + count.streams
        + count.active_experts
    )


def _mean_keys(
    config: ModelConfig,
    seq_len: int,
    attention: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
) -> float:
    """Keys of a query, as a mean over a document of seq_len tokens, summed over the layers."""
    layers = range(config.num_layers) if layers is None else layers
    if is_compressed(attention):
        every = entry_layers(config.num_layers, attention)
        return sum(compressed_keys(seq_len, attention, every[layer]) for layer in layers)
    num_sparse = num_windowed = 0
    if attention:
        num_sparse = number_in(layers, sparse_layers(config.num_layers, attention))
        num_windowed = number_in(layers, windowed_layers(config.num_layers, attention))
    num_dense = len(layers) - num_sparse - num_windowed
    keys = num_dense * seq_len / 2
    if is_indexed(attention):
        keys += num_sparse * indexed_keys(seq_len, attention)
    elif attention and num_sparse:
        keys += num_sparse * keys_per_query(seq_len, attention)
    if attention and num_windowed:
        keys += num_windowed * window_keys(seq_len, attention["window"])
    return keys


def _head_dims(config: ModelConfig, attention: Mapping[str, Any] | None) -> int:
    """Dimensions of a head in its scores and its values."""
    if is_latent(attention):
        dims = attention["qk_nope_head_dim"] + attention["qk_rope_head_dim"]
        return int(dims + attention["v_head_dim"])
    return 2 * config.attention_head_dim


@dataclass(frozen=True)
class GenerationCost:
    """Of one generated token."""

    flops: float
    num_bytes: float
    """Read from memory: weights that the tokens of a step share count once for all of them."""


def prefill_flops(
    config: ModelConfig,
    experts_per_token: float,
    length: int,
    attention: Mapping[str, Any] | None = None,
) -> float:
    """Of a prompt of `length` tokens, whose last one alone is projected to logits."""
    matrices = _matrices_before_head(_matrices(config, experts_per_token, attention))
    keys = _mean_keys(config, length, attention)
    by_token = 2 * matrices + 2 * config.num_heads * _head_dims(config, attention) * keys
    by_token += index_flops(config, length, attention, trains=False)
    return float(length * by_token + 2 * config.vocab_size * config.hidden_size)


def decode_cost(
    config: ModelConfig,
    experts_per_token: float,
    distinct_experts: float,
    rows: float,
    length: int,
    cache_bytes_per_token: float,
    weight_bytes: float,
    expert_bytes: float | None = None,
    attention: Mapping[str, Any] | None = None,
) -> GenerationCost:
    """Of the token number `length` of a document, in a step with `rows` of them.

    Args:
        distinct_experts: that a layer's tokens visit together in a step, as a mean.
        cache_bytes_per_token: of all layers. A sparse layer reads as much less of it as it has
            fewer keys than dense attention.
        weight_bytes: of a parameter; expert_bytes: of a parameter of the experts, None: likewise.
    """
    count = _matrices(config, experts_per_token, attention)
    head = config.vocab_size * config.hidden_size
    # The keys of the last query are what the sum over all of them grows by.
    keys = length * _mean_keys(config, length, attention)
    if length > 1:
        keys -= (length - 1) * _mean_keys(config, length - 1, attention)
    flops = 2.0 * (_matrices_before_head(count) + head)
    flops += 2 * config.num_heads * _head_dims(config, attention) * keys
    # of the last query, which has twice the keys of the mean one
    flops += 2 * index_flops(config, length, attention, trains=False)

    dense = _matrices_before_head(count) - count.active_experts + head
    one_expert = 3 * config.hidden_size * config.expert_intermediate_size
    experts = len(config.decoder_moe_layers) * distinct_experts * one_expert
    weights = dense * weight_bytes + experts * (expert_bytes or weight_bytes)
    cache = cache_bytes_per_token / config.num_layers * keys
    if is_compressed(attention):
        # What is seen, and of every entry its index key, by the layers that choose.
        of_a_value = cache_bytes_per_token / entry_cache_values(config, attention)
        every = entry_layers(config.num_layers, attention)
        scored = sum(length // layer.ratio for layer in every if layer.chooses)
        width = attention["index_head_dim"]
        cache = of_a_value * (config.attention_head_dim * keys + width * scored)
    elif has_index(attention):
        # Index keys are read of every token, keys and values of the chosen ones.
        width, own = index_shape(config, attention)[1], 2 * config.num_kv_heads
        number = len(index_layers(config.num_layers, attention))
        values = config.num_layers * own * config.attention_head_dim + number * width
        of_a_value = cache_bytes_per_token / values
        cache = of_a_value * (own * config.attention_head_dim * keys + number * width * length)
    return GenerationCost(float(flops), float(weights / rows + cache))


def live_cache_values(config: ModelConfig, attention: Mapping[str, Any]) -> float:
    """Values that a token of compressed attention takes in the caches of all layers as long as new
    ones read its own: its key, and what entries and index keys are pooled from. After that it has
    its share of these (entry_cache_values).
    """
    found = config.num_layers * float(config.attention_head_dim)
    for layer in entry_layers(config.num_layers, attention):
        if layer.makes_entries:
            found += sum(rows for rows, _ in pool_shapes(config.attention_head_dim, 1, layer))
            if layer.chooses and attention["index_keys"] == "pooled":
                found += sum(rows for rows, _ in pool_shapes(attention["index_head_dim"], 1, layer))
    return found


def live_cache_tokens(config: ModelConfig, attention: Mapping[str, Any]) -> int:
    """Tokens before a new one whose own values some layer reads: of its window, and of the pooled
    window that is open and the one before (CompressedAttention.live_window).
    """
    layers = entry_layers(config.num_layers, attention)
    longest = max((layer.ratio for layer in layers if layer.makes_entries), default=0)
    return int(max(attention["sliding_window"] - 1, 2 * longest - 1))


def entry_cache_values(config: ModelConfig, attention: Mapping[str, Any]) -> float:
    """A token's share of the entries and index keys of all layers, each of which is there once,
    however many layers read it.
    """
    found = 0.0
    for layer in entry_layers(config.num_layers, attention):
        if layer.makes_entries:
            values = config.attention_head_dim + attention["index_head_dim"] * layer.chooses
            found += values / layer.ratio
    return found


def number_of_runs(layers: Sequence[int]) -> int:
    """How many runs of neighbours there are among layers that ascend."""
    return sum(i == 0 or layers[i - 1] + 1 != layer for i, layer in enumerate(layers))


def number_in(layers: Sequence[int], chosen: Iterable[int]) -> int:
    """How many of the chosen layers are among `layers`."""
    return sum(layer in layers for layer in chosen)


def sparse_layers(num_layers: int, attention: Mapping[str, Any]) -> list[int]:
    """Layers that sparse attention's `interval` and `dense_layers` leave sparse; of compressed
    attention, those with an index.
    """
    if is_compressed(attention):
        kinds = compressed_kinds(num_layers, attention)
        return [i for i, kind in enumerate(kinds) if kind == "csa"]
    if "window" in attention or is_latent(attention):
        return []
    dense = {i % num_layers for i in attention.get("dense_layers", ())}
    return [
        i
        for i in range(num_layers)
        if (i + 1) % attention.get("interval", 1) == 0 and i not in dense
    ]


def windowed_layers(num_layers: int, attention: Mapping[str, Any]) -> list[int]:
    """Layers that windowed attention's `window_layers` lets slide; none of another attention."""
    chosen = attention.get("window_layers", ())
    if chosen == "alternate":
        return list(range(0, num_layers, 2))
    if chosen == "all":
        return list(range(num_layers))
    return sorted({i % num_layers for i in chosen})
