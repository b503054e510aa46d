"""Causal sparse attention: select, compress, correct, in one softmax."""

from ops.sparse_attention.interface import AttentionOutput, decode, select_backend, sparse_attention
from ops.sparse_attention.spec import SelectionNoise, SparseAttentionSpec

__all__ = ["AttentionOutput", "SelectionNoise", "SparseAttentionSpec", "decode", "select_backend", "sparse_attention"]
