"""Which rows of the keys a query sees: those of the spans it chose, then its window."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def seen_by(
    query,
    counts_row,
    counts_ptr,
    base_ptr,
    window_start_ptr,
    own_row,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """(base, listed rows, steps of COLUMNS rows of them, window start, own row, steps in all)."""
    own = own_row + query
    listed = tl.load(counts_ptr + counts_row) * SPAN
    listed_steps = tl.cdiv(listed, COLUMNS)
    window_start = own + 1
    if window_start_ptr is not None:
        window_start = tl.load(window_start_ptr + query)
    steps = listed_steps + tl.cdiv(own + 1 - window_start, COLUMNS)
    return tl.load(base_ptr + query), listed, listed_steps, window_start, own, steps


@triton.jit
def rows_of_step(
    step,
    chosen_ptr,
    list_row,
    base,
    listed,
    listed_steps,
    window_start,
    own,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """(rows [COLUMNS], whether the query sees each): spans first, then the window, in one loop, so
    that its body is compiled once.
    """
    column = tl.arange(0, COLUMNS)
    place = step * COLUMNS + column
    in_list = step < listed_steps
    number = tl.load(
        chosen_ptr + list_row + place // SPAN, mask=in_list & (place < listed), other=0
    )
    in_window = window_start + (step - listed_steps) * COLUMNS + column
    row = tl.where(in_list, base + number * SPAN + place % SPAN, in_window)
    # a query's own block may have been chosen, and reaches beyond it
    return row, (row <= own) & ((place < listed) | (step >= listed_steps))
