"""The attentions by name."""

from __future__ import annotations

from model.attention.config.base import AttentionConfig
from model.attention.config.compressed import CompressedAttentionConfig
from model.attention.config.dense import DenseAttentionConfig
from model.attention.config.indexed import IndexedAttentionConfig
from model.attention.config.latent import MlaConfig
from model.attention.config.sparse import SparseAttentionConfig
from model.attention.config.windowed import WindowedAttentionConfig

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
