"""Scores of an index: products of its heads with its keys, made one number for each block."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_narrow(ptr, index, live, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """[rows, DIM] of a row-major matrix of WIDTH <= DIM columns; zero where not live, and in the
    columns that are not there.
    """
    column = tl.arange(0, DIM)
    return tl.load(
        ptr + index[:, None] * WIDTH + column[None, :],
        mask=live[:, None] & (column < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def index_scores_kernel(
    q_ptr,
    k_ptr,
    weights_ptr,
    scores_ptr,
    best_ptr,
    num_queries,
    num_keys,
    num_blocks,
    num_heads,
    first_position,
    tokens_of_key,
    scale,
    BY_HEAD: tl.constexpr,
    SPAN: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
):
    """Grid (blocks / BLOCKS, queries / QUERIES, C). q: [Q, num_heads, WIDTH]; k: [num_keys, WIDTH];
    weights: [Q, num_heads], or None; scores: [C, Q, num_blocks] fp32, -inf where no key is seen.

    A block is worth the largest of its SPAN keys; best: [C, Q, num_blocks] int32, the lowest key
    that is, or None. Key j is seen from position tokens_of_key * (j + 1) - 1 on. BY_HEAD: a head
    for each choice; else the heads' sum, of their products above zero, in the heads' order.
    """
    BLOCKS: tl.constexpr = KEYS // SPAN if KEYS > SPAN else 1
    STEPS: tl.constexpr = SPAN // KEYS if SPAN > KEYS else 1
    choice = tl.program_id(2)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    live = query < num_queries
    num_seen = (first_position + query + 1) // tokens_of_key
    most_seen = (first_position + tl.program_id(1) * QUERIES + QUERIES) // tokens_of_key
    first_head = choice if BY_HEAD else choice * 0
    heads = 1 if BY_HEAD else num_heads

    peak = tl.full([QUERIES, BLOCKS], float("-inf"), tl.float32)
    best = tl.zeros([QUERIES, BLOCKS], tl.int32)
    for step in range(STEPS):
        first = (tl.program_id(0) * STEPS + step) * KEYS
        key = first + tl.arange(0, KEYS)
        keys = load_narrow(k_ptr, key.to(tl.int64), key < num_keys, WIDTH, DIM)

        # A tile that lies after its queries has no products.
        total = tl.zeros([QUERIES, KEYS], tl.float32)
        for number in range(tl.where(first < most_seen, heads, 0)):
            index = query.to(tl.int64) * num_heads + first_head + number
            q = load_narrow(q_ptr, index, live, WIDTH, DIM)
            product = tl.dot(q, tl.trans(keys), input_precision="ieee")
            if not BY_HEAD:
                # not a number stays what it is
                product = tl.where(product < 0.0, 0.0, product)
                if weights_ptr is not None:
                    weight = tl.load(weights_ptr + index, mask=live, other=0.0).to(tl.float32)
                    product = product * weight[:, None]
            total += product
        seen = (key[None, :] < num_seen[:, None]) & (key < num_keys)[None, :]
        values = tl.where(seen, total * scale, float("-inf"))

        if SPAN == 1:
            peak = values
        else:
            values = tl.reshape(values, [QUERIES, BLOCKS, KEYS // BLOCKS])
            if best_ptr is not None:
                top, place = tl.max(values, 2, return_indices=True)
                place += first + (tl.arange(0, BLOCKS) * (KEYS // BLOCKS))[None, :]
                best = tl.where(top > peak, place, best)
                peak = tl.maximum(peak, top)
            else:
                peak = tl.maximum(peak, tl.max(values, 2))

    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    to = (choice.to(tl.int64) * num_queries + query)[:, None] * num_blocks + block[None, :]
    inside = live[:, None] & (block < num_blocks)[None, :]
    tl.store(scores_ptr + to, peak, mask=inside)
    if best_ptr is not None:
        tl.store(best_ptr + to, best, mask=inside)


@triton.jit
def held_scores_kernel(
    q_ptr,
    k_ptr,
    rows_ptr,
    weights_ptr,
    position_ptr,
    scores_ptr,
    num_new,
    num_keys,
    num_blocks,
    num_heads,
    tokens_of_key,
    scale,
    BY_HEAD: tl.constexpr,
    SPAN: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
):
    """As index_scores_kernel, of new tokens of several rows against what a cache holds; a product's
    rows are the heads of one query.

    Grid (blocks / BLOCKS, b * num_new). q: [b * num_new, num_heads, WIDTH]; k: [pool, WIDTH]; rows:
    [b, num_keys] int64, where the keys of a row are in the pool; weights: [b * num_new, num_heads],
    or None; position: [b * num_new] int64; scores: [b, C, num_new, num_blocks] fp32.
    """
    BLOCKS: tl.constexpr = KEYS // SPAN if KEYS > SPAN else 1
    STEPS: tl.constexpr = SPAN // KEYS if SPAN > KEYS else 1
    query = tl.program_id(1).to(tl.int64)
    batch = query // num_new
    num_seen = ((tl.load(position_ptr + query) + 1) // tokens_of_key).to(tl.int32)
    head = tl.arange(0, HEADS)

    of_head = tl.full([HEADS, BLOCKS], float("-inf"), tl.float32)
    peak = tl.full([BLOCKS], float("-inf"), tl.float32)
    for step in range(STEPS):
        first = (tl.program_id(0) * STEPS + step) * KEYS
        key = first + tl.arange(0, KEYS)
        seen = (key < num_keys) & (key < num_seen)
        row = tl.load(rows_ptr + batch * num_keys + key, mask=seen, other=0)
        keys = load_narrow(k_ptr, row, seen, WIDTH, DIM)

        # A tile that lies after its query has no products.
        total = tl.zeros([KEYS], tl.float32)
        for begin in range(0, tl.where(first < num_seen, num_heads, 0), HEADS):
            live = begin + head < num_heads
            index = query * num_heads + begin + head
            q = load_narrow(q_ptr, index, live, WIDTH, DIM)
            product = tl.dot(q, tl.trans(keys), input_precision="ieee")
            if BY_HEAD:
                values = tl.where(seen[None, :], product * scale, float("-inf"))
                values = tl.reshape(values, [HEADS, BLOCKS, KEYS // BLOCKS])
                of_head = tl.maximum(of_head, tl.max(values, 2))
            else:
                # not a number stays what it is
                product = tl.where(product < 0.0, 0.0, product)
                if weights_ptr is not None:
                    weight = tl.load(weights_ptr + index, mask=live, other=0.0).to(tl.float32)
                    product = product * weight[:, None]
                total += tl.sum(product, 0)
        if not BY_HEAD:
            peak = tl.where(seen, total * scale, float("-inf"))

    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    if BY_HEAD:
        to = (batch * num_heads + head) * num_new + query % num_new
        tl.store(
            scores_ptr + to[:, None] * num_blocks + block[None, :],
            of_head,
            mask=(head < num_heads)[:, None] & inside[None, :],
        )
    else:
        tl.store(scores_ptr + query * num_blocks + block, peak, mask=inside)
