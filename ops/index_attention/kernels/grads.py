"""Gradients of an index's scores, without atomics: queries read the keys that they chose; keys stay
while all queries pass by.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ops.index_attention.kernels.scores import load_narrow


@triton.jit
def index_query_grad_kernel(
    q_ptr,
    k_ptr,
    weights_ptr,
    columns_ptr,
    counts_ptr,
    grads_ptr,
    dq_ptr,
    dweights_ptr,
    num_queries,
    list_size,
    num_heads,
    scale,
    BY_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
):
    """Grid (Q, C, heads of a choice / HEADS). columns: [C, Q, list_size] int32 keys, of which the
    first counts [C, Q] are there; grads: likewise, fp32, of their scores; dq: [Q, num_heads, WIDTH]
    and dweights: [Q, num_heads] fp32. The rest as index_scores_kernel has it.
    """
    query = tl.program_id(0)
    choice = tl.program_id(1)
    list_row = choice.to(tl.int64) * num_queries + query
    number = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    if BY_HEAD:
        live = number < 1
        index = query.to(tl.int64) * num_heads + choice + number
    else:
        live = number < num_heads
        index = query.to(tl.int64) * num_heads + number
    q = load_narrow(q_ptr, index, live, WIDTH, DIM)
    weight = tl.full([HEADS], 1.0, tl.float32)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + index, mask=live, other=0.0).to(tl.float32)

    dq = tl.zeros([HEADS, DIM], tl.float32)
    dweight = tl.zeros([HEADS], tl.float32)
    count = tl.load(counts_ptr + list_row)
    for first in range(0, count, COLUMNS):
        place = first + tl.arange(0, COLUMNS)
        there = place < count
        key = tl.load(columns_ptr + list_row * list_size + place, mask=there, other=0)
        grad = tl.load(grads_ptr + list_row * list_size + place, mask=there, other=0.0) * scale
        keys = load_narrow(k_ptr, key.to(tl.int64), there, WIDTH, DIM)
        if BY_HEAD:
            into = tl.zeros([HEADS, COLUMNS], tl.float32) + grad[None, :]
        else:
            product = tl.dot(q, tl.trans(keys), input_precision="ieee")
            into = tl.where(product > 0.0, grad[None, :], 0.0)
            if dweights_ptr is not None:
                dweight += tl.sum(into * product, 1)
            into = into * weight[:, None]
        dq += tl.dot(into.to(keys.dtype), keys, input_precision="ieee")

    column = tl.arange(0, DIM)
    tl.store(
        dq_ptr + index[:, None] * WIDTH + column[None, :],
        dq,
        mask=live[:, None] & (column < WIDTH)[None, :],
    )
    if dweights_ptr is not None:
        tl.store(dweights_ptr + index, dweight, mask=live)


@triton.jit
def index_key_grad_kernel(
    q_ptr,
    k_ptr,
    weights_ptr,
    grads_ptr,
    dk_ptr,
    num_queries,
    num_keys,
    row_size,
    num_heads,
    first_position,
    tokens_of_key,
    scale,
    BY_HEAD: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
):
    """Grid (num_keys / KEYS,). grads: [C, Q, row_size] fp32, of every key's score, zero where there
    is none; dk: [num_keys, WIDTH] fp32, to which the sums over these queries are added.
    """
    first = tl.program_id(0) * KEYS
    key = first + tl.arange(0, KEYS)
    inside = key < num_keys
    keys = load_narrow(k_ptr, key.to(tl.int64), inside, WIDTH, DIM)

    # Queries that come before the first key of the tile have nothing for it.
    begin = tl.maximum((first + 1) * tokens_of_key - 1 - first_position, 0)
    dk = tl.zeros([KEYS, DIM], tl.float32)
    choices = num_heads if BY_HEAD else 1
    for start in range(begin, num_queries, QUERIES):
        query = start + tl.arange(0, QUERIES)
        live = query < num_queries
        for choice in range(choices):
            row = ((tl.zeros([QUERIES], tl.int64) + choice) * num_queries + query) * row_size
            grad = tl.load(
                grads_ptr + row[None, :] + key[:, None],
                mask=inside[:, None] & live[None, :],
                other=0.0,
            )
            # Products are due where any of the queries chose any of the keys.
            heads = 1 if BY_HEAD else num_heads
            some = tl.max(tl.max((grad != 0.0).to(tl.int32), 1), 0)
            for number in range(some * heads):
                index = query.to(tl.int64) * num_heads + choice + number
                q = load_narrow(q_ptr, index, live, WIDTH, DIM)
                into = grad * scale
                if not BY_HEAD:
                    product = tl.dot(keys, tl.trans(q), input_precision="ieee")
                    into = tl.where(product > 0.0, into, 0.0)
                    if weights_ptr is not None:
                        weight = tl.load(weights_ptr + index, mask=live, other=0.0)
                        into = into * weight.to(tl.float32)[None, :]
                dk += tl.dot(into.to(q.dtype), q, input_precision="ieee")

    column = tl.arange(0, DIM)
    to = dk_ptr + key.to(tl.int64)[:, None] * WIDTH + column[None, :]
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(to, tl.load(to, mask=mask, other=0.0) + dk, mask=mask)
