"""What teaches an index whose blocks all have a teacher: the masses that a softmax gave to blocks,
by their tokens or by pooled entries, and the divergence of the index from the masses of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ops.sparse_attention.kernels.common import (
    LOG2E,
    entry_logits,
    load_rows,
    log2_denominator,
    tile_rows,
)

SMALLEST: tl.constexpr = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def index_masses_kernel(
    q_ptr,
    key_mean_ptr,
    key_var_ptr,
    bias_ptr,
    lse_ptr,
    counts_ptr,
    masses_ptr,
    first_token,
    num_queries,
    first_entry,
    head_stride,
    entry_stride,
    row_size,
    num_kv_heads,
    scale,
    max_variance,
    log2_tokens,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Grid (blocks / (BLOCKS * STEPS), Q / QUERIES, Hk). masses: [Hk, Q, row_size] fp32, of blocks
    of ENTRIES entries, of which a query has the first counts [Q] entries, summed over the heads of
    the group; nothing is written beyond.

    Queries are tokens first_token and on of q [T, Hk * GROUP, DIM], lse and bias [T, Hk * GROUP]
    fp32; entry 0 is first_entry of key_mean and key_var, rows of DIM, of which those of a head are
    entry_stride apart and those of an entry head_stride.
    """
    kv_head = tl.program_id(2)
    number = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    start = first_token + tl.program_id(1) * QUERIES
    end = first_token + num_queries
    count = tl.load(counts_ptr + number, mask=number < num_queries, other=0)
    first = tl.program_id(0) * (BLOCKS * STEPS)
    most = tl.max(count, 0)
    limit = tl.minimum(first + BLOCKS * STEPS, tl.cdiv(most, ENTRIES))

    query, index, live = tile_rows(start, end, kv_head, num_kv_heads * GROUP, QUERIES, HEADS, GROUP)
    q = load_rows(q_ptr, index, live, DIM)
    q_squared = q * q
    seen = tl.load(counts_ptr + tl.program_id(1) * QUERIES + query, mask=live, other=0)

    # What a logit has beside its products, with the denominator taken off.
    offset = log2_tokens - log2_denominator(lse_ptr, index, live)
    if bias_ptr is not None:
        offset += tl.load(bias_ptr + index, mask=live, other=0.0) * LOG2E

    head_offset = kv_head.to(tl.int64) * head_stride
    row = (kv_head.to(tl.int64) * num_queries + number) * row_size
    for block in range(first, limit, BLOCKS):
        entry = block * ENTRIES + tl.arange(0, BLOCKS * ENTRIES)
        inside = entry < most
        at = head_offset + (first_entry + entry).to(tl.int64) * entry_stride
        key_mean = load_rows(key_mean_ptr, at, inside, DIM)
        key_var = key_mean
        if ORDER == 2:
            key_var = load_rows(key_var_ptr, at, inside, DIM)
        logits, _ = entry_logits(
            q, q_squared, key_mean, key_var, scale, max_variance, offset[:, None], ORDER
        )

        probs = tl.where(entry[None, :] < seen[:, None], tl.exp2(logits), 0.0)
        mass = tl.sum(tl.reshape(probs, [QUERIES, HEADS, BLOCKS, ENTRIES]), 3)
        mass = tl.sum(mass, 1)
        candidate = block + tl.arange(0, BLOCKS)
        tl.store(
            masses_ptr + row[:, None] + candidate[None, :],
            mass,
            mask=candidate[None, :] * ENTRIES < count[:, None],
        )


@triton.jit
def index_divergence_kernel(
    scores_ptr,
    masses_ptr,
    counts_ptr,
    weights_ptr,
    divergence_ptr,
    num_queries,
    num_blocks,
    row_size,
    share,
    LEARNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (Q, C). scores: [C, Q, num_blocks] fp32; masses: [C, Q, row_size] fp32; the first counts
    [Q] blocks are candidates. divergence: [C, Q] fp32, KL(mass || softmax of the scores) in nats
    times share and weights [Q] fp32 (None: ones), 0 without candidates.

    LEARNS: the masses of the candidates become gradients of their scores.
    """
    query = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * num_queries + query
    count = tl.load(counts_ptr + query)
    weight = share
    if weights_ptr is not None:
        weight = share * tl.load(weights_ptr + query)
    place = tl.arange(0, CHUNK)

    # First pass: the denominators of both sides.
    peak = tl.full([], float("-inf"), tl.float32)
    denominator = tl.full([], 0.0, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for first in range(0, count, CHUNK):
        there = first + place < count
        score = tl.load(
            scores_ptr + row * num_blocks + first + place, mask=there, other=float("-inf")
        )
        new_peak = tl.maximum(peak, tl.max(score, 0))
        denominator = denominator * tl.exp(peak - new_peak) + tl.sum(tl.exp(score - new_peak), 0)
        peak = new_peak
        total += tl.sum(
            tl.load(masses_ptr + row * row_size + first + place, mask=there, other=0.0), 0
        )
    log_sum = peak + tl.log(denominator)
    inverse = 1.0 / tl.maximum(total, SMALLEST)

    # Second pass. Where nothing has a mass, nothing is taught: its targets sum up to 0, not to 1.
    divergence = tl.full([], 0.0, tl.float32)
    for first in range(0, count, CHUNK):
        there = first + place < count
        to = masses_ptr + row * row_size + first + place
        target = tl.load(to, mask=there, other=0.0) * inverse
        score = tl.load(scores_ptr + row * num_blocks + first + place, mask=there, other=0.0)
        student = score - log_sum
        own = tl.log(tl.where(target > 0.0, target, 1.0))
        divergence += tl.sum(tl.where(target > 0.0, target * (own - student), 0.0), 0)
        if LEARNS:
            grad = tl.exp(student) * (total * inverse) - target
            tl.store(to, grad * weight, mask=there)
    tl.store(divergence_ptr + row, divergence * weight)
