"""Bytes that a rank sends to others: what `launch.plan` prints before anything starts. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig
from model.cost.parameters import (
    count_parameters,
    is_latent,
    number_in,
    number_of_runs,
    sparse_layers,
)

PAYLOAD_WIDTH = {"bf16": 2.0, "fp8": 1.0 + 4 / 128}
"""Bytes of a value of a row that travels rounded, with its share of a scale."""
GATE_BYTES = 4


@dataclass(frozen=True)
class Exchange:
    """Bytes that a rank sends in one optimisation step, with experts evenly loaded. Heads, rows and
    stages are what comm/bytes counts; collectives over gradients and weights are taken as rings.
    """

    heads: int
    """Of attention, among the ranks of a context group that exchange heads."""
    rows: int
    """To the ranks of their experts and home again, with their gates."""
    dense_gradients: int
    """Reduced over the ranks that hold a parameter, here all of them."""
    expert_gradients: int
    """Likewise, of the routed experts over the ranks that hold the same ones."""
    dense_weights: int
    """Gathered from the ranks that own parts of them, under ZeRO."""
    expert_weights: int
    """Likewise, of the routed experts."""
    stages: int = 0
    """To other stages of the pipeline: hidden states, their gradients, and what an embedding that
    both ends need takes.
    """
    tensor: int = 0
    """Tokens gathered before cut matrices and summed behind them, among the ranks of a tensor
    group, and what the loss over parts of the vocabulary takes.
    """
    keys: int = 0
    """Keys and values, or latents, to the other ranks of a context group that gather them, and what
    reached them on the way back.
    """

    @property
    def gradients(self) -> int:
        return self.dense_gradients + self.expert_gradients

    @property
    def weights(self) -> int:
        return self.dense_weights + self.expert_weights

    @property
    def total(self) -> int:
        around = self.heads + self.keys + self.rows + self.stages + self.tensor
        return around + self.gradients + self.weights


def exchanged_bytes(
    config: ModelConfig,
    experts_per_token: float,
    *,
    precision: str,
    zero_stage: int,
    world_size: int,
    expert_parallel_size: int,
    context_parallel_size: int,
    tensor_parallel_size: int = 1,
    context_gather_size: int = 1,
    micro_batch_size: int,
    seq_len: int,
    num_micro_batches: int,
    attention: Mapping[str, Any] | None = None,
    payload: str = "native",
    grad_accum_dtype: str = "fp32",
    layers: Sequence[int] | None = None,
) -> Exchange:
    """What a layout sends. Of one stage of a pipeline: layers are there, and world_size is that of
    the stage.

    A layer's heads and rows travel forward, again where the block is recomputed, and their
    gradients the same way back. A sum over n ranks in a ring sends (1 - 1/n) of its bytes for each
    rank's part, and as much again where all get the whole. From stage 2 on gradients are reduced in
    every micro-batch; stage 3 gathers weights in every forward and backward pass.
    """
    layers = range(config.num_layers) if layers is None else layers
    is_first, is_last = 0 in layers, config.num_layers - 1 in layers
    num_mtp = config.num_mtp_layers if is_last else 0
    width = 4 if precision == "fp32" else 2
    tokens = micro_batch_size * seq_len // (context_parallel_size * tensor_parallel_size)
    passes = 3 if config.recompute == "block" else 2

    # Where latents are gathered, keys and values are made of them before heads are exchanged.
    gather = context_gather_size
    by_heads = _away(context_parallel_size // gather)
    times_made = gather if is_latent(attention) else 1
    heads = by_heads * tokens * _head_bytes(config, width, attention, times_made)
    heads *= len(layers) + num_mtp
    keys = (gather - 1) * tokens * (len(layers) + num_mtp) * _key_bytes(config, width, attention)
    if attention and not is_latent(attention) and "coarse_block_size" in attention:
        sparse = number_in(layers, sparse_layers(config.num_layers, attention))
        by_token = by_heads * tokens
        heads += by_token * sparse * _sparse_bytes(config, width, attention)

    # Forward rows may travel rounded to 8 bits; what comes back, and gradients, at most to bf16.
    there = PAYLOAD_WIDTH.get(payload, float(width))
    back = 2.0 if payload != "native" else float(width)
    of_rows = (passes - 1) * (there + back) + 2 * back
    num_moe = number_in(layers, config.moe_layers)
    num_moe += num_mtp * config.is_moe_layer(config.num_layers)
    visits = _away(expert_parallel_size) * tokens * experts_per_token * num_moe
    rows = visits * (config.hidden_size * of_rows + passes * GATE_BYTES)

    count = count_parameters(config, experts_per_token, attention, layers)
    dense = _away(world_size) * (count.dense - count.cut)
    dense += _away(world_size // tensor_parallel_size) * count.cut / tensor_parallel_size
    experts = _away(world_size // expert_parallel_size) * count.all_experts / expert_parallel_size
    summed = width if precision == "fp32" or grad_accum_dtype == "bf16" else 4
    times = num_micro_batches if zero_stage >= 2 else 1
    reduced = summed * times * (2 if zero_stage == 0 else 1)
    gathered = width * {0: 0, 1: 1, 2: 1, 3: 2 * num_micro_batches}[zero_stage]
    neighbours = 2 * number_of_runs(layers) - is_first - is_last
    stages = neighbours * num_micro_batches * tokens * config.residual_size * width
    if is_first != is_last and (config.tie_embeddings or config.num_mtp_layers):
        # the weight goes there, its gradient back in fp32
        table = config.vocab_size * config.hidden_size // tensor_parallel_size
        stages += table * (4 if is_last else width)
    return Exchange(
        heads=round(heads * passes * num_micro_batches),
        keys=keys * passes * num_micro_batches,
        rows=round(rows * num_micro_batches),
        dense_gradients=round(dense * reduced),
        expert_gradients=round(experts * reduced),
        dense_weights=round(dense * gathered),
        expert_weights=round(experts * gathered),
        stages=stages,
        tensor=num_micro_batches
        * _tensor_bytes(config, layers, tokens, width, tensor_parallel_size),
    )


LOSS_BYTES = 8 + 3 * 8
"""Of a token: its target, and in rings of 2 (1 - 1/n) parts the largest logit, the sum of
exponentials, and the target's logit, which are fp32.
"""


def _tensor_bytes(
    config: ModelConfig, layers: Sequence[int], tokens: int, width: int, cut: int
) -> int:
    """Of a micro-batch of so many own tokens. Everything travels to the other `cut` - 1 ranks, or
    from them, one way forward and the other way back.
    """
    is_first, is_last = 0 in layers, config.num_layers - 1 in layers
    num_mtp = config.num_mtp_layers if is_last else 0
    again = config.recompute == "block"
    num_dense = len(layers) - number_in(layers, config.moe_layers)
    dense_mtp = num_mtp * (not config.is_moe_layer(config.num_layers))

    # Recomputing a block ends before the sum behind its MLP, which nothing in it reads.
    moves = (len(layers) + num_mtp) * 2 * (2 + again)
    moves += num_dense * (4 + again) + dense_mtp * 2 * (2 + again)
    moves += 2 * (is_first + num_mtp)
    losses = num_mtp + is_last
    chunked = 0 < config.loss_chunk_size < tokens
    moves += losses * (2 + chunked)
    of_losses = losses * (LOSS_BYTES * (1 + chunked) + 4)
    # Norms of all heads together: a sum of squares of queries and of keys, in fp32.
    of_norms = 0
    if config.qk_norm == "hidden":
        of_norms = (len(layers) + num_mtp) * 2 * 8 * (2 + again)
    return (cut - 1) * tokens * (moves * config.hidden_size * width + of_losses + of_norms)


def _away(num_ranks: int) -> float:
    """The part of what is shared out evenly that is for others."""
    return 1 - 1 / num_ranks


def _head_bytes(
    config: ModelConfig, width: int, attention: Mapping[str, Any] | None, times_made: int
) -> int:
    """Of a token in one layer and direction: queries, keys, values and outputs of all heads.
    times_made: keys and values of so many tokens travel for one of a rank's own.
    """
    heads, kv_heads = config.num_heads, config.num_kv_heads
    key_dim = value_dim = config.attention_head_dim
    if is_latent(attention):
        key_dim = attention["qk_nope_head_dim"] + attention["qk_rope_head_dim"]
        value_dim = attention["v_head_dim"]
    return width * (heads + times_made * kv_heads) * (key_dim + value_dim)


def _key_bytes(config: ModelConfig, width: int, attention: Mapping[str, Any] | None) -> int:
    """Of a token in one layer and direction: its keys and values of all heads, or its latent."""
    if attention is not None and is_latent(attention):
        values: int = attention["kv_lora_rank"] + attention["qk_rope_head_dim"]
        return width * values
    return width * 2 * config.num_kv_heads * config.attention_head_dim


def _sparse_bytes(config: ModelConfig, width: int, attention: Mapping[str, Any]) -> int:
    """What a sparse layer sends of a token besides: its bias of coarse entries in fp32, or its
    gates.
    """
    biased = attention.get("offset") or attention.get("trust")
    gates = 3 * width if attention.get("merge") == "gated" else 0
    return config.num_heads * ((4 if biased and not gates else 0) + gates)
