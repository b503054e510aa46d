"""Tiny models and batches shared by the worker scripts of this folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from model.attention.config.base import AttentionConfig
from model.attention.config.compressed import CompressedAttentionConfig
from model.attention.config.dense import DenseAttentionConfig
from model.attention.config.indexed import IndexedAttentionConfig
from model.attention.config.latent import MlaConfig
from model.attention.config.sparse import SparseAttentionConfig
from model.attention.config.windowed import WindowedAttentionConfig
from model.config import BalanceConfig, ExpertsConfig, ModelConfig, RopeScaling
from model.dispatch.config import AllToAllConfig
from model.moe.layer import ModelParts
from model.parallel.groups import ParallelGroups
from model.placement.record import Placement
from model.request import TokenBatch
from model.routers.config import RouterConfig, TopKConfig
from model.transformer import Transformer

VOCAB_SIZE = 64
LATENT = dict(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8)
LATENT_SHAPE = dict(num_kv_heads=4, qk_norm="none")
"""A tiny MlaConfig, and what it asks of tiny_config."""
COMPRESSED = dict(
    **dict(sliding_window=4, csa_ratio=3, hca_ratio=5, top_k=2, q_lora_rank=12),
    **dict(output_groups=2, o_lora_rank=8, rope_head_dim=4, index_heads=3, index_head_dim=6),
)
SHARED = COMPRESSED | dict(
    **dict(csa_ratio=2, late_csa_ratio=1, csa_overlap=False, slot_bias=False, entry_layers=2),
    **dict(index_layers=2, index_keys="projected", top_k_blocks=2, index_block_size=2),
)
"""Of three layers, the second reads the entries and the choice of the first."""
COMPRESSED_SHAPE = dict(num_kv_heads=1, qk_norm="none")
"""Likewise, of CompressedAttentionConfig."""


def tiny_config(**changes) -> ModelConfig:
    shape = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=32,
        num_experts=8,
        expert_intermediate_size=24,
        max_seq_len=64,
        num_dense_layers=1,
        num_shared_experts=1,
        qk_norm="head",
        init_std=0.1,
    )
    shape |= changes
    if isinstance(scaling := shape.get("rope_scaling"), dict):  # a case that came as JSON
        shape["rope_scaling"] = RopeScaling(**scaling)
    return ModelConfig(**shape)


def build(
    config: ModelConfig,
    balance: BalanceConfig,
    groups: ParallelGroups | None = None,
    seed: int = 7,
    router: type[RouterConfig] = TopKConfig,
    attention: dict | AttentionConfig | None = None,
    dispatcher: dict | None = None,
    experts: ExpertsConfig | None = None,
    placement: Placement | None = None,
    layers: Sequence[range] | None = None,
    settle: Callable[[nn.Parameter], None] | None = None,
    dtype: torch.dtype = torch.float32,
    **options,
) -> Transformer:
    """attention: a record, or fields of SparseAttentionConfig, IndexedAttentionConfig (with a
    rule), CompressedAttentionConfig (with csa_ratio), MlaConfig or (with a window)
    WindowedAttentionConfig; None: dense. dispatcher: fields of AllToAllConfig.
    """
    options = {"top_k": 2, **options} if router is TopKConfig else options
    attend: AttentionConfig = DenseAttentionConfig()
    if isinstance(attention, AttentionConfig):
        attend = attention
    elif attention is not None and "kv_lora_rank" in attention:
        attend = MlaConfig(**attention)
    elif attention is not None and "window" in attention:
        attend = WindowedAttentionConfig(**attention)
    elif attention is not None and "csa_ratio" in attention:
        attend = CompressedAttentionConfig(**attention)
    elif attention is not None and "rule" in attention:
        attend = IndexedAttentionConfig(**attention)
    elif attention is not None:
        attend = SparseAttentionConfig(**attention)
    parts = ModelParts(
        router(**options),
        attend,
        AllToAllConfig(**(dispatcher or {})),
        balance,
        experts or ExpertsConfig(),
        placement,
    )
    return Transformer(config, parts, groups, seed, layers, dtype, settle)


def batch(step: int, micro_step: int, rows: int, length: int = 16) -> dict:
    """Deterministic packed rows with uneven documents, masked targets and a padded tail; differs in
    every row.
    """
    gen = torch.Generator().manual_seed(1000 * step + micro_step)
    input_ids = torch.randint(0, VOCAB_SIZE, (rows, length), generator=gen)
    targets = torch.randint(0, VOCAB_SIZE, (rows, length), generator=gen)
    positions = torch.empty(rows, length, dtype=torch.int64)
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row in range(rows):
        cut = int(torch.randint(1, length - 4, (1,), generator=gen))
        positions[row] = torch.cat((torch.arange(cut), torch.arange(length - cut)))
        targets[row, cut - 1] = -100
        if row % 3 == 1:
            padded = int(torch.randint(1, 5, (1,), generator=gen))
            targets[row, -padded:] = -100
            mask[row, -padded:] = False
    token_ids = (step * 10 + micro_step) * rows * length + torch.arange(rows * length).view(
        rows, length
    )
    return {
        "input_ids": input_ids,
        "targets": targets,
        "positions": positions,
        "token_mask": mask,
        "token_ids": token_ids,
    }


def take(full: dict, start: int, stop: int) -> TokenBatch:
    """Rows start..stop of a batch, with cu_seqlens of their own."""
    part = {name: tensor[start:stop] for name, tensor in full.items()}
    starts = (part["positions"].flatten() == 0).nonzero().flatten()
    total = part["positions"].numel()
    cu_seqlens = torch.cat((starts, torch.tensor([total]))).to(torch.int32)
    return TokenBatch(**part, cu_seqlens=cu_seqlens, max_seqlen=int(cu_seqlens.diff().max()))
