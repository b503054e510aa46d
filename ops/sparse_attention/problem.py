"""What a back-end is given: one record for a packed batch, one for a decoding step.

Shape letters: T tokens, H heads, Hk key/value heads, d head dimension, M blocks, r entries of a
block, K selected blocks, N documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ops.sparse_attention.blocks import BlockTable
from ops.sparse_attention.entries import CoarseEntries
from ops.sparse_attention.spec import SparseAttentionSpec


class Problem(NamedTuple):
    """Attention of packed documents to their own past. What gets a gradient comes first."""

    q: Tensor
    """[T, H, d], contiguous."""
    k: Tensor
    """[T, Hk, d], contiguous."""
    v: Tensor
    """[T, Hk, d], contiguous."""
    bias: Tensor | None
    """[T, H], added to the logits of coarse entries."""
    sink: Tensor | None
    """[H], a logit of value zero."""
    selected: Tensor
    """[Hk, T, K] int32 candidates of each query in any order, without repeats, -1 for none."""
    entries: CoarseEntries | None
    """[Hk, M * r, d] each; None where no coarse entry takes part."""
    table: BlockTable
    spec: SparseAttentionSpec
    exact: bool
    """The window, first and selected blocks take part; else coarse entries stand for every complete
    past block.
    """
    coarse: bool
    """Coarse entries take part."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What save_for_backward keeps; of_tensors takes them back in this order."""
        entries = (None, None, None) if self.entries is None else self.entries
        return (self.q, self.k, self.v, self.bias, self.sink, self.selected, *self.table, *entries)

    @staticmethod
    def of_tensors(
        tensors: Sequence[Tensor], spec: SparseAttentionSpec, exact: bool, coarse: bool
    ) -> Problem:
        """The record whose `tensors` these are."""
        q, k, v, bias, sink, selected, *rest = tensors
        table, entries = rest[: len(BlockTable._fields)], rest[len(BlockTable._fields) :]
        return Problem(
            q=q,
            k=k,
            v=v,
            bias=bias,
            sink=sink,
            selected=selected,
            entries=None if entries[0] is None else CoarseEntries(*entries),
            table=BlockTable(*table),
            spec=spec,
            exact=exact,
            coarse=coarse,
        )


GRADIENTS = 5
"""The first fields of a Problem, which get a gradient."""


def nothing_selected(q: Tensor, kv_heads: int) -> Tensor:
    """[Hk, T, 0] int32 for the queries q [T, ...]."""
    return q.new_empty((kv_heads, len(q), 0), dtype=torch.int32)


class DecodeProblem(NamedTuple):
    """Attention of one new token a row to a cache of its document's tokens, its own included."""

    q: Tensor
    """[N, H, d]."""
    keys: Tensor
    """[N, at least length, Hk, d]."""
    values: Tensor
    """[N, at least length, Hk, d]."""
    entries: CoarseEntries
    """[N, Hk, max_blocks * r, d] each, valid for complete blocks."""
    length: int
    """Tokens of every document so far."""
    spec: SparseAttentionSpec
    bias: Tensor | None
    """[N, H], added to the logits of coarse entries."""
    sink: Tensor | None
    """[H], a logit of value zero."""
    exact: bool
    """As in Problem."""
    coarse: bool
    """As in Problem."""
    selected: Tensor | None = None
    """[N, Hk, K] candidates to use instead of selecting, by their places in the document, without
    repeats, -1 for none.
    """
