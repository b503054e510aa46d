"""Memory of one device by component: what `launch.plan` prints before anything starts. Imports no
torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig
from model.cost.entries import entry_layers
from model.cost.parameters import (
    Trained,
    count_parameters,
    entry_cache_values,
    entry_index_matrices,
    has_index,
    index_layers,
    index_shape,
    is_compressed,
    is_latent,
    live_cache_tokens,
    live_cache_values,
    number_in,
    number_of_runs,
    sparse_layers,
    windowed_layers,
)
from ops.sparse_attention.spec import SparseAttentionSpec

LOGIT_BYTES = 12
"""Per logit at the peak of backward: the fp32 log-softmax and two fp32 gradients."""
RESIDENCE_BYTES = 13
"""Of a block and key/value head in a bounded cache: whether it stays, its mass, where it is."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the fullest device, without DeepSpeed's communication buckets, its fp32 copy of one
    parameter group's gradient at the step (grad_accum_dtype=bf16), and the allocator's slack.
    Activations are an estimate of what backward keeps.
    """

    dense_weights: int
    expert_weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    teacher: int = 0
    """Of train/objectives/cost.py: a teacher's weights, and what the divergence from it keeps."""
    gathered: int = 0
    """Whole weights that stage 3 holds besides its parts: all of them, up to max_live."""
    bucket: int = 0
    """Gradients that stage 3 has copied to be reduced: a bucket that it keeps for good."""

    @property
    def total(self) -> int:
        return (
            self.dense_weights
            + self.expert_weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.teacher
            + self.gathered
            + self.bucket
        )


def device_memory(
    config: ModelConfig,
    experts_per_token: float,
    *,
    precision: str,
    zero_stage: int,
    world_size: int,
    expert_parallel_size: int,
    context_parallel_size: int = 1,
    context_gather_size: int = 1,
    tensor_parallel_size: int = 1,
    micro_batch_size: int,
    seq_len: int,
    attention: Mapping[str, Any] | None = None,
    recompute_experts: bool = False,
    expert_precision: str = "native",
    grad_accum_dtype: str = "fp32",
    master_dtype: str = "fp32",
    trained: Trained | None = None,
    one_moment: tuple[int, int] = (0, 0),
    averaged: bool = False,
    layers: Sequence[int] | None = None,
    in_flight: float = 1,
    max_live: int = 10**9,
    bucket_size: int = 5 * 10**8,
) -> DeviceMemory:
    """Memory under ZeRO, expert, context and tensor parallelism; the last two share out the tokens
    of a row.

    Dense state is shared by all ranks, what tensor parallelism cuts by those that hold the same
    part, expert state by the world_size / expert_parallel_size ranks
    that hold the same experts. Optimiser state is 12 bytes a parameter (fp32 master weight and two
    moments), 8 at stage 0 in fp32, where the weights are the masters; with masters of bf16 10.
    Gradients are sums in
    grad_accum_dtype; the ones that backward makes, of the weights' dtype, live one parameter at a
    time. `one_moment` says how many dense parameters, and how many of all experts', have one moment
    instead of two, as those that Muon moves; `averaged`, that all have a moving average beside
    them. A stage-3 device also holds gathered weights, up to max_live elements
    (stage3_max_live_parameters), and gradients of up to bucket_size elements (reduce_bucket_size)
    that wait to be reduced.

    Of one stage of a pipeline `layers` are there, world_size is that of the stage, and activations
    are of as many micro-batches as are in flight (those of one lap of v count for 1 / v); a last
    stage that is lent the embedding has it and an fp32 sum of its gradient besides.
    trained: what of it is; None: everything.
    """
    layers = range(config.num_layers) if layers is None else layers
    is_last = config.num_layers - 1 in layers
    count = count_parameters(config, experts_per_token, attention, layers)
    trained = trained or Trained(count.dense, count.all_experts)
    width = 4 if precision == "fp32" else 2
    summed_width = 4 if grad_accum_dtype == "fp32" else 2
    expert_data_size = world_size // expert_parallel_size
    dense = count.dense + trained.dense_adapters
    experts = -(-(count.all_experts + trained.expert_adapters) // expert_parallel_size)
    # What is frozen has neither gradients nor moments, and its weights are no masters.
    moving, moving_experts = trained.dense, -(-trained.experts // expert_parallel_size)

    def share(parameters: int, over: int, from_stage: int) -> int:
        return -(-parameters // over) if zero_stage >= from_stage else parameters

    # What is cut is as much smaller as there are fewer ranks that share it out.
    others = count.cut - -(-count.cut // tensor_parallel_size)

    def share_dense(parameters: int, from_stage: int) -> int:
        whole = share(parameters, world_size, from_stage)
        return whole if zero_stage >= from_stage else whole - others

    tokens = micro_batch_size * -(-seq_len // (context_parallel_size * tensor_parallel_size))
    # of an assignment: pre-activations
    row_values = 0 if recompute_experts else 2 * config.expert_intermediate_size
    # and the row itself, where it travelled
    row_values += config.hidden_size if expert_parallel_size > 1 else 0
    per_state = (8 if zero_stage == 0 else 12) + (4 if averaged else 0)
    if master_dtype == "bf16":
        per_state -= 2
    lent = 0
    if is_last and 0 not in layers and (config.tie_embeddings or config.num_mtp_layers):
        lent = config.vocab_size * config.hidden_size // tensor_parallel_size
    over_dense, over_experts = (world_size, expert_data_size) if zero_stage >= 1 else (1, 1)
    return DeviceMemory(
        dense_weights=width * (share_dense(dense, 3) + lent),
        expert_weights=width * share(experts, expert_data_size, 3),
        gradients=summed_width
        * (share_dense(moving, 2) + share(moving_experts, expert_data_size, 2))
        + 4 * lent,
        optimizer=per_state * (share_dense(moving, 1) + share(moving_experts, expert_data_size, 1))
        - 4 * (one_moment[0] // over_dense + one_moment[1] // expert_parallel_size // over_experts),
        activations=_activation_bytes(
            config,
            tokens,
            width,
            width * experts_per_token * row_values,
            attention,
            context_parallel_size > 1,
            context_gather_size,
            layers,
            in_flight,
            seq_len,
            tensor_parallel_size,
        )
        + _adapted_bytes(config, trained, width, expert_parallel_size)
        + _rounded_bytes(
            config, width, expert_parallel_size, expert_precision, tokens * experts_per_token
        ),
        logits=_logit_bytes(config, tokens, precision, tensor_parallel_size) if is_last else 0,
        gathered=width * min(max_live, dense - others + experts) if zero_stage == 3 else 0,
        bucket=summed_width * min(bucket_size, moving - others + moving_experts)
        if zero_stage == 3
        else 0,
    )


def _adapted_bytes(
    config: ModelConfig, trained: Trained, width: int, expert_parallel_size: int
) -> int:
    """Of one layer's experts with their adapters added, and of the gradient of that sum: made
    anew for every layer.
    """
    if not trained.expert_adapters:
        return 0
    one = 3 * config.hidden_size * config.expert_intermediate_size
    return 2 * width * one * -(-config.num_experts // expert_parallel_size)


def _rounded_bytes(
    config: ModelConfig, width: int, expert_parallel_size: int, precision: str, num_rows: float
) -> int:
    """Of one layer's experts at their most in backward. Of gate_up a copy with its columns as rows,
    that copy scaled, and its 8-bit floats; or with fp8_all, at another time, 8-bit floats of all
    rows on both sides of gate_up's gradient, filled up to a tile of 128 for every expert.
    """
    if precision == "native":
        return 0
    local = -(-config.num_experts // expert_parallel_size)
    values = 2 * config.hidden_size * config.expert_intermediate_size
    matrices = (2 * width + 1) * values * local
    if precision == "fp8":
        return matrices
    row_values = config.hidden_size + 2 * config.expert_intermediate_size
    # A tile of a column has an fp32 scale besides.
    tiles = int(num_rows) // 128 + local
    return max(matrices, tiles * (128 + 4) * row_values)


def _logit_bytes(config: ModelConfig, tokens: int, precision: str, cut: int) -> int:
    """Of the logits at hand, and of the head's gradient, which bf16 adds up over chunks in fp32.
    cut: ranks that have parts of the vocabulary, each with logits of the tokens of all.
    """
    chunk = min(tokens, config.loss_chunk_size or tokens)
    summed = 0
    if chunk < tokens and precision != "fp32":
        summed = 4 * config.vocab_size * config.hidden_size // cut
    # All at once, the log-softmax of every module of multi-token prediction waits for backward.
    waiting = 4 * config.num_mtp_layers if chunk == tokens else 0
    return chunk * config.vocab_size * (LOGIT_BYTES + waiting) + summed


def cache_bytes_per_token(
    config: ModelConfig, width: int, attention: Mapping[str, Any] | None = None
) -> int:
    """What a token takes in the caches of all layers when generating, index keys included; sparse
    layers keep pooled entries besides. Of compressed attention, its share of entries and their
    keys.

    width: bytes of a value; attention: arguments of sparse, indexed, compressed or latent
        attention.
    """
    if is_compressed(attention):
        return int(width * entry_cache_values(config, attention))
    if is_latent(attention):
        values = attention["kv_lora_rank"] + attention["qk_rope_head_dim"]
    else:
        values = 2 * config.num_kv_heads * config.attention_head_dim
    index = 0
    if has_index(attention):
        number = len(index_layers(config.num_layers, attention))
        index = number * index_shape(config, attention)[1]
    return int((config.num_layers * values + index) * width)


def _entry_bytes(config: ModelConfig, width: int, attention: Mapping[str, Any]) -> int:
    """Of an entry of a key/value head: two means and a variance; in e4m3 each has an exponent."""
    if attention.get("entries_dtype") == "fp8":
        return 3 * (config.attention_head_dim + 1)
    return 3 * config.attention_head_dim * width


def cache_growth(
    config: ModelConfig, width: int, attention: Mapping[str, Any] | None = None
) -> int:
    """What each further token of a long document adds to the caches of all layers: where they are
    bounded, its share of the entries of sparse layers; else as cache_bytes_per_token.

    width, attention: as cache_bytes_per_token takes them.
    """
    if attention is None or attention.get("resident_blocks") is None:
        return cache_bytes_per_token(config, width, attention)
    sparse = len(sparse_layers(config.num_layers, attention))
    head = config.num_kv_heads * config.attention_head_dim * width
    entries = config.num_kv_heads * _entry_bytes(config, width, attention)
    entries /= attention["coarse_block_size"]
    states = config.num_kv_heads * RESIDENCE_BYTES / attention["block_size"]
    return int((config.num_layers - sparse) * 2 * head + sparse * (entries + states))


def cache_bytes(
    config: ModelConfig, width: int, length: int, attention: Mapping[str, Any] | None = None
) -> int:
    """Of the caches of all layers for a document of `length` tokens, the pooled entries of sparse
    layers included. Where attention.resident_blocks bounds them, sparse layers keep the tokens of
    so many blocks, of those of the window and of one interval, and of the first ones. Of compressed
    attention what its last tokens need is part of it.

    width, attention: as cache_bytes_per_token takes them.
    """
    found = length * cache_bytes_per_token(config, width, attention)
    if attention is not None and is_compressed(attention):
        live = min(length, 1 + live_cache_tokens(config, attention))
        return int(found + width * live * live_cache_values(config, attention))
    if attention is None or "coarse_block_size" not in attention:
        return found
    layers = len(sparse_layers(config.num_layers, attention))
    head = config.num_kv_heads * config.attention_head_dim * width
    block = attention["block_size"]
    # of blocks that have room to be complete
    entries = (length // block) * (block // attention["coarse_block_size"])
    found += layers * entries * config.num_kv_heads * _entry_bytes(config, width, attention)
    if attention.get("resident_blocks") is not None:
        names = {field.name for field in dataclasses.fields(SparseAttentionSpec)}
        spec = SparseAttentionSpec(**{n: v for n, v in attention.items() if n in names})
        kept = min(spec.resident_slots, -(-length // block)) * block
        found -= layers * 2 * head * (length - kept)
        found += layers * config.num_kv_heads * RESIDENCE_BYTES * -(-length // block)
    return int(found)


def _windowed_copies(
    config: ModelConfig, attention: Mapping[str, Any] | None, layers: Sequence[int]
) -> float:
    """How often windowed attention keeps a row of all heads besides, as a mean over the layers:
    keys and values, which it repeats for every query head, of the piece before as well where a
    window slides.
    """
    if attention is None or "window" not in attention:
        return 0.0
    windowed = number_in(layers, windowed_layers(config.num_layers, attention))
    whole = (len(layers) - windowed) * bool(attention["sinks"])
    return float((4 * windowed + 2 * whole) / len(layers))


def _attention_bytes(
    config: ModelConfig,
    width: int,
    attention: Mapping[str, Any] | None,
    layers: Sequence[int],
    seq_len: int,
) -> tuple[int, int]:
    """Of a token that attention keeps in its own dtype: values between its projections and its
    output, in values of `width` bytes; and rotary's fp32 copies.
    """
    heads = config.num_heads
    if is_compressed(attention):
        return _compressed_bytes(config, width, attention, layers, seq_len)
    if not is_latent(attention):
        q_width = heads * config.attention_head_dim
        kv_width = config.num_kv_heads * config.attention_head_dim
        rotary = 4 * (heads + config.num_kv_heads) * config.rotary_size
        copies = round(width * q_width * _windowed_copies(config, attention, layers))
        # the logits of learned entries: of every key and value
        if attention is not None and attention.get("entries") == "gated":
            sparse = number_in(layers, sparse_layers(config.num_layers, attention))
            copies += round(width * 2 * kv_width * sparse / len(layers))
        if has_index(attention):
            # layers that follow another one's choice score again, to teach it
            sparse = number_in(layers, sparse_layers(config.num_layers, attention))
            kept = _index_bytes(config, width, attention, seq_len)
            copies += round(kept * sparse / len(layers))
        return width * (2 * q_width + 2 * kv_width) + copies, rotary

    nope, rope = attention["qk_nope_head_dim"], attention["qk_rope_head_dim"]
    value = attention["v_head_dim"]
    # Latents before and after their norms, then queries, keys, values and outputs of all heads, in
    # the one head dimension that the kernels have.
    latents = 2 * (attention["q_lora_rank"] or 0) + 2 * attention["kv_lora_rank"] + 2 * rope
    per_head = 4 * max(nope + rope, value)
    return width * (latents + heads * per_head), 4 * (heads + 1) * rope


def _kept_key_bytes(config: ModelConfig, width: int, attention: Mapping[str, Any] | None) -> int:
    """Of another rank's token in one layer: its keys and values, and a latent that they are of."""
    if attention is None or not is_latent(attention):
        return width * 2 * config.num_kv_heads * config.attention_head_dim
    key = attention["qk_nope_head_dim"] + attention["qk_rope_head_dim"]
    latent = attention["kv_lora_rank"] + attention["qk_rope_head_dim"]
    values: int = latent + 2 * config.num_heads * max(key, attention["v_head_dim"])
    return width * values


def _compressed_bytes(
    config: ModelConfig,
    width: int,
    attention: Mapping[str, Any],
    layers: Sequence[int],
    seq_len: int,
) -> tuple[int, int]:
    """Of a token in compressed attention, as a mean over the layers: latents and keys before and
    after their norms, queries and outputs before and after they are turned, what entries are
    pooled from; of an index its queries, weights and rows with their gradients in fp32, and what it
    chose; and rotary's fp32 copies.
    """
    dim, rank, heads = config.attention_head_dim, attention["q_lora_rank"], config.num_heads
    between = attention["output_groups"] * attention["o_lora_rank"]
    kept = width * (2 * rank + 5 * heads * dim + 3 * dim + between) + 4 * heads
    more = 0.0
    for layer in entry_layers(config.num_layers, attention):
        if layer.number not in layers:
            continue
        if layer.makes_entries:
            more += width * dim * ((1 + layer.is_gated) * (1 + layer.overlaps) + 3 / layer.ratio)
        if layer.chooser is None:
            continue
        queries = attention["index_heads"] * (attention["index_head_dim"] + 1)
        keys = attention["index_head_dim"] / layer.ratio
        if layer.chooses:
            more += width * queries + 4 * min(attention["top_k"], seq_len // layer.ratio)
        if layer.chooses and layer.makes_entries:
            shapes = entry_index_matrices(config, attention, layer)[2:]
            more += width * (sum(rows for rows, _ in shapes) + 3 * keys)
        # Every layer teaches, and has the gradients of what it taught.
        more += 4 * (queries + keys)
    return round(kept + more / len(layers)), 0


def _index_bytes(
    config: ModelConfig, width: int, attention: Mapping[str, Any], seq_len: int
) -> int:
    """Of a token in a layer with an index: its queries and keys, what their norms were given and
    (RMSNorm) have made of it, their gradients in fp32, the blocks that were chosen, and the
    softmax's denominators.
    """
    heads, dim = index_shape(config, attention)
    rule = attention.get("rule", "msa")
    has_weights = rule == "dsa"
    values = (heads + 1) * dim + heads * has_weights
    norms = dim if has_weights else 2 * (heads + 1) * dim
    choices = config.num_kv_heads if rule == "msa" else 1
    chosen = min(attention["top_k"], -(-seq_len // attention["block_size"]))
    kept: int = width * (values + norms) + 4 * values + 4 * choices * chosen
    return kept + 4 * config.num_heads


def _stream_bytes(config: ModelConfig, width: int) -> int:
    """Of a token that reading, writing and mixing several residual streams keeps around attention,
    or around an MLP: the state, and in half precision as fp32; what was read and what is added; and
    of every step to rows and columns that sum to 1, the matrix and the sums.
    """
    number = config.num_residual_streams
    if number == 1:
        return 0
    state = (width + (4 if width < 4 else 0)) * config.residual_size
    steps = 4 * (2 * config.sinkhorn_steps + 1) * (number * number + number)
    return state + width * config.hidden_size + steps


def _activation_bytes(
    config: ModelConfig,
    tokens: int,
    width: int,
    routed: float,
    arguments: Mapping[str, Any] | None,
    shares_rows: bool,
    gather: int,
    here: Sequence[int],
    in_flight: float,
    seq_len: int,
    cut: int,
) -> int:
    """Bytes kept for backward, assuming balanced experts. here: layers of this stage; in_flight:
    micro-batches that it holds at a time.

    routed: bytes per token that the routed experts keep; arguments: of attention; shares_rows: with
    other ranks, so that what attention gives is kept twice, by heads and by tokens; gather: so many
    ranks gather keys and values, of which each then keeps those of all; cut: ranks that
    have parts of matrices, whose inputs are then the tokens of all.
    """
    hidden = config.hidden_size
    norm = 2 * width * hidden  # input and output
    gathered = (cut - 1) * width * hidden
    latents = 0
    if is_latent(arguments):  # made of all tokens on every rank
        widths = 2 * ((arguments["q_lora_rank"] or 0) + arguments["kv_lora_rank"])
        rope = arguments["qk_rope_head_dim"]
        latents = (cut - 1) * (width * (widths + 2 * rope) + 4 * rope)
    inside, rotary = _attention_bytes(config, width, arguments, here, seq_len)
    attention = norm + gathered + latents + rotary + inside + width * hidden
    attention += (gather - 1) * _kept_key_bytes(config, width, arguments)
    if shares_rows and not is_latent(arguments):
        attention += width * config.num_heads * config.attention_head_dim
    dense_mlp = norm + gathered + width * 4 * config.intermediate_size
    shared = width * 4 * config.num_shared_experts * config.expert_intermediate_size
    if config.shared_expert_gate:  # its sigmoid, and what that multiplies
        shared += width * (hidden + 1)
    moe = norm + 4 * hidden + routed + shared + 4 * 4 * config.num_experts
    is_last = config.num_layers - 1 in here
    num_mtp = config.num_mtp_layers if is_last else 0
    num_moe = number_in(here, config.moe_layers)
    num_moe += num_mtp * config.is_moe_layer(config.num_layers)
    num_layers = len(here) + num_mtp
    streams = _stream_bytes(config, width)
    attention, moe, dense_mlp = attention + streams, moe + streams, dense_mlp + streams
    layers = num_layers * attention + (num_layers - num_moe) * dense_mlp + num_moe * moe
    # A module of multi-token prediction has three norms more, two of them put side by side.
    layers += num_mtp * (3 * norm + 2 * width * hidden)
    at_work = 0.0
    if config.recompute == "block":
        layers = (num_layers + num_mtp) * width * config.residual_size
        at_work = attention + max(moe if num_moe else 0, dense_mlp)
    # Before the head stands a norm; what goes on to the next stage waits for its gradient.
    handed_on = width * config.residual_size
    layers += (number_of_runs(here) - is_last) * handed_on
    layers += norm + (gathered if not config.loss_chunk_size else 0) if is_last else 0
    layers += is_last * min(1, streams) * (handed_on + 4 * config.residual_size * (width < 4))
    return round(tokens * (in_flight * layers + at_work))
