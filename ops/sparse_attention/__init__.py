"""Causal sparse attention: select, compress, correct, in one softmax. Examples: docs/library.md."""

from ops.sparse_attention.audit import RowAudit, audit_rows, mean_error_bound, sample_rows
from ops.sparse_attention.blocks import BlockTable, block_table
from ops.sparse_attention.cache import EntryCache
from ops.sparse_attention.entries import CoarseEntries
from ops.sparse_attention.estimator import Estimate, estimate
from ops.sparse_attention.interface import AttentionOutput, decode, select_backend, sparse_attention
from ops.sparse_attention.noise import token_hash
from ops.sparse_attention.spec import SelectionNoise, SparseAttentionSpec

__all__ = ["AttentionOutput", "BlockTable", "CoarseEntries", "EntryCache", "Estimate", "RowAudit", "SelectionNoise",
           "SparseAttentionSpec", "audit_rows", "block_table", "decode", "estimate", "mean_error_bound", "sample_rows",
           "select_backend", "sparse_attention", "token_hash"]
