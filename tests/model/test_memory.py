"""The plan's memory agrees with what tensors really take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from common import (
    COMPRESSED,
    COMPRESSED_SHAPE,
    LATENT,
    LATENT_SHAPE,
    SHARED,
    batch,
    build,
    take,
    tiny_config,
)

from model.attention.config.compressed import CompressedAttentionConfig
from model.attention.config.indexed import IndexedAttentionConfig
from model.attention.config.sparse import SparseAttentionConfig
from model.config import BalanceConfig
from model.cost.memory import device_memory
from model.cost.parameters import count_parameters
from model.parallel.groups import ParallelGroups
from model.parallel.heads import HeadExchange
from model.request import TokenBatch, part_of
from ops.compile.launch import record_launches
from ops.grouped_mlp.fp8 import TILE
from ops.testing import kept_for_backward

SETTINGS = dict(
    precision="fp32",
    zero_stage=0,
    world_size=1,
    expert_parallel_size=1,
    micro_batch_size=8,
    seq_len=16,
)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("hidden_size", [16, 64])
def test_activation_estimate_is_near_what_backward_keeps(recompute, hidden_size):
    config = tiny_config(hidden_size=hidden_size, recompute=recompute, num_layers=4)
    model = build(config, BalanceConfig(aux_loss_coeff=0.01, z_loss_coeff=0.01))
    full = take(batch(0, 0, 8), 0, 8)._replace(token_mask=None)
    with kept_for_backward(*model.parameters()) as kept:
        output = model(full)
    measured = sum(kept.values())
    memory = device_memory(config, 2.0, **SETTINGS)
    # block inputs are held by the checkpoint, the one block at work is not measured here
    if recompute == "block":
        assert (
            memory.activations
            < device_memory(
                tiny_config(hidden_size=hidden_size, num_layers=4), 2.0, **SETTINGS
            ).activations
            / 1.5
        )
    else:
        # kept: the logits and their log-softmax, fp32
        logits = 8 * 8 * 16 * config.vocab_size
        assert 0.7 < (memory.activations + logits) / measured < 1.4
    assert output.loss_sum.requires_grad


@pytest.mark.parametrize("attention", [None, LATENT], ids=["dense", "latent"])
def test_a_rank_that_shares_rows_keeps_its_part_of_them(attention, monkeypatch):
    """As much of the same number of tokens as a rank alone, but for what attention gives."""
    monkeypatch.setattr(HeadExchange, "_exchanged", lambda _, parts: parts.clone())
    config = tiny_config(hidden_size=64, num_layers=4, **(LATENT_SHAPE if attention else {}))
    settings = dict(attention=attention) if attention else {}
    measured, planned = [], []
    for context in (1, 2):
        groups = replace(ParallelGroups.single(), context_size=context)
        model = build(config, BalanceConfig(), groups, attention=attention)
        length = 16 * context
        ids = torch.zeros(8, length, dtype=torch.int64)
        positions = torch.arange(length).expand(8, length)
        ends = torch.arange(0, 8 * length + 1, length, dtype=torch.int32)
        inputs = TokenBatch(ids, ids, positions, ends, length)
        if context > 1:
            inputs = part_of(inputs, 0, 16)
        with kept_for_backward(*model.parameters()) as kept:
            model(inputs)
        measured.append(sum(kept.values()))
        shared = {"context_parallel_size": context, "seq_len": length}
        planned.append(device_memory(config, 2.0, **{**SETTINGS, **shared, **settings}).activations)
    assert planned[1] - planned[0] == pytest.approx(
        measured[1] - measured[0], abs=0.005 * measured[0]
    )


def test_learned_entries_keep_their_logits_for_backward():
    sparse = dict(block_size=4, coarse_block_size=2, top_k=1, window_size=4, audit_rows=0.0)
    config = tiny_config(hidden_size=64, num_layers=4)
    measured, planned = [], []
    for entries in ("mean", "gated"):
        attention = {**sparse, "entries": entries, "dense_layers": (0,)}
        model = build(config, BalanceConfig(), attention=attention)
        with kept_for_backward(*model.parameters()) as kept:
            model(take(batch(0, 0, 8), 0, 8)._replace(token_mask=None))
        measured.append(sum(kept.values()))
        arguments = SparseAttentionConfig(**attention).arguments
        planned.append(device_memory(config, 2.0, **SETTINGS, attention=arguments).activations)
    logits = 3 * 8 * 16 * 2 * config.num_kv_heads * config.attention_head_dim * 4
    assert planned[1] - planned[0] == logits
    assert logits <= measured[1] - measured[0] < 1.5 * logits


@pytest.mark.parametrize("rule", ["dsa", "msa", "qsa"])
def test_an_index_keeps_what_the_plan_says(rule):
    indexed = dict(rule=rule, top_k=4, dense_layers=(0,), audit_rows=0.0, dense_steps=0)
    indexed |= {"dsa": {"index_heads": 3}, "msa": {"block_size": 4}}.get(
        rule, {"block_size": 2, "index_heads": 3}
    )
    config = tiny_config(hidden_size=64, num_layers=4)
    measured, planned = [], []
    for attention in (None, indexed):
        model = build(config, BalanceConfig(), attention=attention)
        with kept_for_backward(*model.parameters()) as kept:
            model(take(batch(0, 0, 8), 0, 8)._replace(token_mask=None))
        measured.append(sum(kept.values()))
        arguments = None if attention is None else IndexedAttentionConfig(**attention).arguments
        planned.append(device_memory(config, 2.0, **SETTINGS, attention=arguments).activations)
    more = planned[1] - planned[0]
    assert measured[1] - measured[0] == pytest.approx(more, rel=0.3)


@pytest.mark.parametrize("kind", ["csa", "hca", "window", "csa2"])
def test_compressed_attention_keeps_what_the_plan_says(kind):
    chosen = SHARED if kind == "csa2" else {**COMPRESSED, "layer_kinds": (kind,) * 4}
    settings = CompressedAttentionConfig(**chosen, dense_steps=0, audit_rows=0.0)
    config = tiny_config(hidden_size=64, num_layers=4, **COMPRESSED_SHAPE)
    measured, planned = [], []
    for attention in (None, settings):
        model = build(config, BalanceConfig(), attention=attention)
        with kept_for_backward(*model.parameters()) as kept:
            model(take(batch(0, 0, 8), 0, 8)._replace(token_mask=None))
        measured.append(sum(kept.values()))
        arguments = None if attention is None else attention.arguments
        planned.append(device_memory(config, 2.0, **SETTINGS, attention=arguments).activations)
    more = planned[1] - planned[0]
    assert measured[1] - measured[0] == pytest.approx(more, rel=0.3)


@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_bf16_weights_take_the_dtype_they_are_added_up_in(stage, dtype, width):
    config, settings = tiny_config(), {**SETTINGS, "precision": "bf16", "zero_stage": stage}
    count = count_parameters(config, 2)
    memory = device_memory(config, 2, **settings, grad_accum_dtype=dtype)
    assert memory.gradients == width * (count.dense + count.experts)
    assert memory.dense_weights + memory.expert_weights == 2 * (count.dense + count.experts)


@pytest.mark.parametrize("stage", [1, 2])
def test_masters_of_bf16_save_their_own_bytes(stage):
    config, settings = tiny_config(), {**SETTINGS, "precision": "bf16", "zero_stage": stage}
    count = count_parameters(config, 2)
    whole, rounded = (
        device_memory(config, 2, **settings, master_dtype=dtype) for dtype in ("fp32", "bf16")
    )
    assert whole.total - rounded.total == 2 * (count.dense + count.experts)
    assert rounded.optimizer == 10 * (count.dense + count.experts)


@pytest.mark.parametrize(
    ("stage", "dense_over", "expert_over"),
    [
        (0, (1, 1, 1), (1, 1, 1)),
        (1, (1, 1, 8), (1, 1, 2)),
        (2, (1, 8, 8), (1, 2, 2)),
        (3, (8, 8, 8), (2, 2, 2)),
    ],
)
def test_zero_stages_share_weights_gradients_and_optimizer(stage, dense_over, expert_over):
    config = tiny_config()
    count = count_parameters(config, 2)
    memory = device_memory(
        config, 2, **{**SETTINGS, "zero_stage": stage, "world_size": 8, "expert_parallel_size": 4}
    )
    experts = count.experts / 4
    state = 8 if stage == 0 else 12
    assert memory.dense_weights == pytest.approx(4 * count.dense / dense_over[0], abs=8)
    assert memory.expert_weights == pytest.approx(4 * experts / expert_over[0], abs=8)
    assert memory.gradients == pytest.approx(
        4 * (count.dense / dense_over[1] + experts / expert_over[1]), abs=16
    )
    assert memory.optimizer == pytest.approx(
        state * (count.dense / dense_over[2] + experts / expert_over[2]), abs=32
    )


def test_rows_in_8_bits_are_counted_as_the_kernels_take_them():
    """Of one layer, for every expert of a token once, on both sides of gate_up's gradient."""
    backend = pytest.importorskip("ops.grouped_mlp.triton_backend")
    config = tiny_config(num_experts=2)
    planned = {
        precision: device_memory(config, 2.0, **SETTINGS, expert_precision=precision).activations
        for precision in ("native", "fp8", "fp8_all")
    }
    num_tokens, width = SETTINGS["micro_batch_size"] * SETTINGS["seq_len"], 4
    slots = torch.empty(2 * num_tokens, dtype=torch.int32, device="meta")
    offsets = torch.empty(config.num_experts + 1, dtype=torch.int32, device="meta")
    taken = 0
    with record_launches(90):
        tiles = backend._tile_map(slots, offsets, TILE)
        for values, gather in (
            (torch.empty(num_tokens, config.hidden_size, device="meta"), True),
            (torch.empty(len(slots), 2 * config.expert_intermediate_size, device="meta"), False),
        ):
            parts = backend._round_tiles(values, gather, slots, offsets, tiles, 2)
            taken += sum(part.numel() * part.element_size() for part in parts)
    matrix = 2 * config.hidden_size * config.expert_intermediate_size * config.num_experts
    assert planned["fp8"] - planned["native"] == (2 * width + 1) * matrix
    assert planned["fp8_all"] - planned["native"] == taken > (2 * width + 1) * matrix
