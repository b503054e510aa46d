"""Gradients, without atomics on floats: queries gather again; rows of keys go by tiles, each with
the list of the queries that saw any of it, cut into parts whose sums are added in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ops.gather_attention.kernels.columns import gather_step, heads_of, reach_of, rows_of_step
from ops.sparse_attention.kernels.backward import query_grad_step
from ops.sparse_attention.kernels.common import LOG2E, load_rows, log2_denominator


@triton.jit
def gather_query_grad_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    chosen_ptr,
    counts_ptr,
    base_ptr,
    window_start_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    num_queries,
    list_size,
    own_row,
    num_kv_heads,
    scale,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    SPAN: tl.constexpr,
    BY_HEAD: tl.constexpr,
):
    """Grid (T, Hk, GROUP / HEADS): dq [T, Hk * GROUP, DIM], by the loop of gather_attend_kernel."""
    query = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    choice = kv_head.to(tl.int64) * (1 if BY_HEAD else 0)
    reach, steps = reach_of(
        query,
        choice,
        choice * num_queries + query,
        num_queries,
        list_size,
        counts_ptr,
        base_ptr,
        window_start_ptr,
        own_row,
        COLUMNS,
        SPAN,
    )
    _, live, index = heads_of(query, kv_head, tl.program_id(2), num_kv_heads, GROUP, HEADS)
    q = load_rows(q_ptr, index, live, DIM)
    dout = load_rows(dout_ptr, index, live, DIM)
    denominator = log2_denominator(lse_ptr, index, live)
    delta = tl.load(delta_ptr + index, mask=live, other=0.0)

    grad = tl.zeros([HEADS, DIM], tl.float32)
    for step in range(steps):
        keys, values, seen = gather_step(
            step, reach, chosen_ptr, k_ptr, v_ptr, kv_head, num_kv_heads, COLUMNS, SPAN, DIM
        )
        grad = query_grad_step(
            q, dout, keys, values, seen[None, :] & live[:, None], denominator, delta, scale, grad
        )
    tl.store(
        dq_ptr + index[:, None] * DIM + tl.arange(0, DIM)[None, :],
        (grad * scale).to(dq_ptr.dtype.element_ty),
        mask=live[:, None],
    )


@triton.jit
def mark_rows_kernel(
    chosen_ptr,
    counts_ptr,
    base_ptr,
    window_start_ptr,
    bits_ptr,
    num_queries,
    list_size,
    own_row,
    first_tile,
    num_tiles,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (T, C). bits: [C, num_tiles, T] int32, zeros before: bit i of a word is set where the
    query sees row i of the tile of ROWS rows.

    Integer or: the result does not hang on the order of the additions.
    """
    query = tl.program_id(0)
    choice = tl.program_id(1).to(tl.int64)
    reach, steps = reach_of(
        query,
        choice,
        choice * num_queries + query,
        num_queries,
        list_size,
        counts_ptr,
        base_ptr,
        window_start_ptr,
        own_row,
        COLUMNS,
        SPAN,
    )
    for step in range(steps):
        row, seen = rows_of_step(step, reach, chosen_ptr, COLUMNS, SPAN)
        tile = row // ROWS - first_tile
        word = (tl.zeros([COLUMNS], tl.int32) + 1) << (row % ROWS)
        tl.atomic_or(
            bits_ptr + (choice * num_tiles + tile) * num_queries + query,
            word,
            mask=seen & (tile >= 0) & (tile < num_tiles),
            sem="relaxed",
        )


@triton.jit
def gather_key_grad_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    queries_ptr,
    words_ptr,
    counts_ptr,
    partial_ptr,
    num_rows,
    first_tile,
    num_tiles,
    num_parts,
    list_size,
    num_kv_heads,
    scale,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    BY_HEAD: tl.constexpr,
):
    """Grid (num_tiles * num_parts, Hk): fp32 sums of a part of a tile's queries, [1 or 2, Hk,
    num_tiles, num_parts, COLUMNS, DIM]: dk and dv, or their sum where keys are values.

    queries, words: [C, num_tiles, list_size] int32, the rising queries that see any row of a tile,
        and their bits; counts: [C, num_tiles]. HEADS: heads of a group, padded to a power of two.
    """
    tile = tl.program_id(0) // num_parts
    part = tl.program_id(0) % num_parts
    kv_head = tl.program_id(1).to(tl.int64)
    list_row = kv_head * (1 if BY_HEAD else 0) * num_tiles + tile

    # The keys stay; the queries of the part's share of the list pass by.
    column = tl.arange(0, COLUMNS)
    key = (first_tile + tile) * COLUMNS + column
    inside = key < num_rows
    at = key.to(tl.int64) * num_kv_heads + kv_head
    keys = load_rows(k_ptr, at, inside, DIM)
    values = keys
    if v_ptr is not None:
        values = load_rows(v_ptr, at, inside, DIM)
    count = tl.load(counts_ptr + list_row)
    share = tl.cdiv(count, num_parts)
    begin = part * share
    end = tl.minimum(begin + share, count)

    dk = tl.zeros([COLUMNS, DIM], tl.float32)
    dv = dk
    for first in range(begin * HEADS, end * HEADS, ROWS):
        number = first + tl.arange(0, ROWS)
        head = number % HEADS
        live = (number // HEADS < end) & (head < GROUP)
        listed = list_row * list_size + number // HEADS
        query = tl.load(queries_ptr + listed, mask=live, other=0)
        word = tl.load(words_ptr + listed, mask=live, other=0)
        index = query.to(tl.int64) * (num_kv_heads * GROUP) + kv_head * GROUP + head

        q = load_rows(q_ptr, index, live, DIM)
        dout = load_rows(dout_ptr, index, live, DIM)
        denominator = log2_denominator(lse_ptr, index, live)
        delta = tl.load(delta_ptr + index, mask=live, other=0.0)

        # A word has the causal mask in it, too: a query has bits of rows that it sees alone.
        logits = tl.dot(keys, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
        seen = ((word[None, :] >> column[:, None]) & 1) == 1
        probs = tl.where(seen & live[None, :], tl.exp2(logits - denominator[None, :]), 0.0)
        dlogits = probs * (tl.dot(values, tl.trans(dout), input_precision="ieee") - delta[None, :])
        dk += tl.dot((dlogits * scale).to(q.dtype), q, input_precision="ieee")
        if v_ptr is not None:
            dv += tl.dot(probs.to(dout.dtype), dout, input_precision="ieee")
        else:
            dk += tl.dot(probs.to(dout.dtype), dout, input_precision="ieee")

    to = ((kv_head * num_tiles + tile) * num_parts + part) * COLUMNS + column
    to = to[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(partial_ptr + to, dk)
    if v_ptr is not None:
        half = tl.num_programs(1).to(tl.int64) * num_tiles * num_parts * COLUMNS * DIM
        tl.store(partial_ptr + half + to, dv)
