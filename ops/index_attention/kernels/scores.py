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
