"""Which rows of the keys a query sees: those of the spans it chose, then its window."""

from __future__ import annotations

import triton
import triton.language as tl

from ops.sparse_attention.kernels.common import load_rows


@triton.jit
def reach_of(
    query,
    choice,
    counts_row,
    num_queries,
    list_size,
    counts_ptr,
    base_ptr,
    window_start_ptr,
    own_row,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """(reach, steps of COLUMNS rows). reach: what rows_of_step takes, (list row, base, listed rows,
    steps of them, window start, own row).
    """
    own = own_row + query
    listed = tl.load(counts_ptr + counts_row) * SPAN
    listed_steps = tl.cdiv(listed, COLUMNS)
    window_start = own + 1
    if window_start_ptr is not None:
        window_start = tl.load(window_start_ptr + query)
    steps = listed_steps + tl.cdiv(own + 1 - window_start, COLUMNS)
    list_row = (choice * num_queries + query) * list_size
    return (list_row, tl.load(base_ptr + query), listed, listed_steps, window_start, own), steps


@triton.jit
def rows_of_step(step, reach, chosen_ptr, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """(rows [COLUMNS], whether the query sees each): spans first, without chosen_ptr those from
    number 0 on, then the window, in one loop, so that its body is compiled once.
    """
    list_row, base, listed, listed_steps, window_start, own = reach
    column = tl.arange(0, COLUMNS)
    place = step * COLUMNS + column
    in_list = step < listed_steps
    number = place // SPAN
    if chosen_ptr is not None:
        number = tl.load(chosen_ptr + list_row + number, mask=in_list & (place < listed), other=0)
    in_window = window_start + (step - listed_steps) * COLUMNS + column
    row = tl.where(in_list, base + number * SPAN + place % SPAN, in_window)
    # a query's own block may have been chosen, and reaches beyond it
    return row, (row <= own) & ((place < listed) | (step >= listed_steps))


@triton.jit
def gather_step(
    step,
    reach,
    chosen_ptr,
    k_ptr,
    v_ptr,
    kv_head,
    num_kv_heads,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    DIM: tl.constexpr,
):
    """(keys, values [COLUMNS, DIM] of a step's rows, whether the query sees each). Without v_ptr
    keys are values.
    """
    row, seen = rows_of_step(step, reach, chosen_ptr, COLUMNS, SPAN)
    at = row.to(tl.int64) * num_kv_heads + kv_head
    keys = load_rows(k_ptr, at, seen, DIM)
    values = keys
    if v_ptr is not None:
        values = load_rows(v_ptr, at, seen, DIM)
    return keys, values, seen


@triton.jit
def heads_of(query, kv_head, part, num_kv_heads, GROUP: tl.constexpr, HEADS: tl.constexpr):
    """The rows of a query's products, heads that share the keys, by parts of HEADS: (head of the
    group [HEADS], whether there is one, row of [T * H]).
    """
    head = part * HEADS + tl.arange(0, HEADS)
    index = query.to(tl.int64) * (num_kv_heads * GROUP) + kv_head * GROUP + head
    return head, head < GROUP, index
