"""What the kernels are asked for, in one record.

Shape letters: T queries, H heads, Hk key/value heads, d head dimension, N rows of keys, C choices
(Hk where every key/value head has its own, else 1), K spans that a query may choose, L rows that
are listed for one.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Gather(NamedTuple):
    """Every query t sees

        rows base_t + span * chosen_ti + 0 .. span - 1   of the spans that it chose, or
        rows base_t .. base_t + span * first_t - 1       where the first ones are seen, and
        rows window_start_t .. own_row + t               where there is a window,

    none beyond own_row + t and none twice, in one softmax with its head's sink.
    """

    q: Tensor
    """[T, H, d] in fp32, bf16 or fp16, contiguous like all tensors here."""
    k: Tensor
    """[N, Hk, d] in the dtype of q."""
    v: Tensor | None
    """[N, Hk, d] in the dtype of q; None: keys are values."""
    chosen: Tensor | None
    """[C, T, K] int32, numbers of spans; those that are there come first, then -1. None: nothing
    chooses.
    """
    base: Tensor
    """[T] int32, first row of span 0 of the query's document; rises."""
    span: int
    """Rows of a span, a power of two."""
    own_row: int = 0
    """Row of the first query's own token; those of the others follow it."""
    window_start: Tensor | None = None
    """[T] int32, first row of the window; own_row + t + 1 where it is empty; rises."""
    sink: Tensor | None = None
    """[H], logits without a value."""
    first: Tensor | None = None
    """[T] int32, without `chosen`: how many spans from number 0 on are seen; None: none."""


class Source(NamedTuple):
    """Rows of one pool, and which of them every query sees."""

    k: Tensor
    """[N, Hk, d] in the dtype of the queries, contiguous."""
    v: Tensor | None
    """Likewise; None: keys are values."""
    rows: Tensor
    """[C, T, L] int32, in any order; -1, anywhere, is nothing."""


class Lookup(NamedTuple):
    """Queries of decoding: each sees the rows that are listed for it, of one pool or of several, in
    one softmax with its head's sink. A row that is listed twice counts twice.
    """

    q: Tensor
    """[T, H, d] in fp32, bf16 or fp16, in plain torch fp64 as well; contiguous."""
    sources: tuple[Source, ...]
    sink: Tensor | None = None
    """[H], logits without a value."""
