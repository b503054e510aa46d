"""Causal sparse attention: select, compress, correct, in one softmax. Examples: docs/library.md."""

from typing import TYPE_CHECKING

from ops.lazy import lazily
from ops.sparse_attention.spec import SelectionNoise, SparseAttentionSpec

if TYPE_CHECKING:
    from ops.sparse_attention.audit import RowAudit, audit_rows, mean_error_bound, sample_rows
    from ops.sparse_attention.blocks import BlockTable, block_table
    from ops.sparse_attention.cache import EntryCache
    from ops.sparse_attention.entries import CoarseEntries
    from ops.sparse_attention.estimator import Estimate, estimate
    from ops.sparse_attention.interface import (
        AttentionOutput,
        backend_for,
        decode,
        pool_entries,
        select_backend,
        sparse_attention,
    )
    from ops.sparse_attention.noise import token_hash
    from ops.sparse_attention.paged import decode_pages

__all__ = [
    "AttentionOutput",
    "BlockTable",
    "CoarseEntries",
    "EntryCache",
    "Estimate",
    "RowAudit",
    "SelectionNoise",
    "SparseAttentionSpec",
    "audit_rows",
    "backend_for",
    "block_table",
    "decode",
    "decode_pages",
    "estimate",
    "mean_error_bound",
    "pool_entries",
    "sample_rows",
    "select_backend",
    "sparse_attention",
    "token_hash",
]

__getattr__ = lazily(
    __name__,
    {
        "AttentionOutput": "interface",
        "BlockTable": "blocks",
        "CoarseEntries": "entries",
        "EntryCache": "cache",
        "Estimate": "estimator",
        "RowAudit": "audit",
        "audit_rows": "audit",
        "backend_for": "interface",
        "block_table": "blocks",
        "decode": "interface",
        "decode_pages": "paged",
        "estimate": "estimator",
        "mean_error_bound": "audit",
        "pool_entries": "interface",
        "sample_rows": "audit",
        "select_backend": "interface",
        "sparse_attention": "interface",
        "token_hash": "noise",
    },
)
