"""Attention of one query's heads to the rows that it sees, and the masses of what it chose."""

from __future__ import annotations

import triton
import triton.language as tl

from ops.gather_attention.kernels.columns import gather_step, heads_of, reach_of, rows_of_step
from ops.sparse_attention.kernels.common import (
    LN2,
    LOG2E,
    load_rows,
    log2_denominator,
    softmax_step,
)


@triton.jit
def gather_attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    chosen_ptr,
    counts_ptr,
    base_ptr,
    window_start_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    first_query,
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
    """Grid (queries of this call, Hk, GROUP / HEADS). q, out: [T, Hk * GROUP, DIM]; k, v: [N, Hk,
    DIM], without v the keys are values; lse: [T, Hk * GROUP] fp32; chosen: [C, T, list_size];
    counts: [C, queries of this call].
    """
    # The longest lists of a document start first.
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    query = first_query + number
    kv_head = tl.program_id(1)
    choice = kv_head.to(tl.int64) * (1 if BY_HEAD else 0)
    reach, steps = reach_of(
        query,
        choice,
        choice * tl.num_programs(0) + number,
        num_queries,
        list_size,
        counts_ptr,
        base_ptr,
        window_start_ptr,
        own_row,
        COLUMNS,
        SPAN,
    )
    head, live, index = heads_of(query, kv_head, tl.program_id(2), num_kv_heads, GROUP, HEADS)
    q = load_rows(q_ptr, index, live, DIM)

    peak = tl.full([HEADS], float("-inf"), tl.float32)
    mass = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, DIM], tl.float32)
    for step in range(steps):
        keys, values, seen = gather_step(
            step, reach, chosen_ptr, k_ptr, v_ptr, kv_head, num_kv_heads, COLUMNS, SPAN, DIM
        )
        logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
        peak, mass, acc = softmax_step(
            tl.where(seen[None, :], logits, float("-inf")), values, peak, mass, acc
        )

    # The sink adds mass and no value.
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + kv_head * GROUP + head, mask=live, other=0.0) * LOG2E
        new_peak = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - new_peak)
        acc = acc * shrink[:, None]
        mass = mass * shrink + tl.exp2(sink - new_peak)
        peak = new_peak

    # A row that sees nothing gives zero, and has no logarithm.
    out = acc * tl.where(mass > 0.0, 1.0 / mass, 0.0)[:, None]
    tl.store(
        out_ptr + index[:, None] * DIM + tl.arange(0, DIM)[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=live[:, None],
    )
    tl.store(lse_ptr + index, (peak + tl.log2(mass)) * LN2, mask=live)


@triton.jit
def gather_masses_kernel(
    q_ptr,
    k_ptr,
    chosen_ptr,
    counts_ptr,
    base_ptr,
    lse_ptr,
    masses_ptr,
    first_query,
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
    """Grid (queries of this call, C). masses: [C, queries of this call, list_size] fp32: what the
    softmax gave to every span that is there, summed over the heads that share the choice, in their
    order.
    """
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    query = first_query + number
    choice = tl.program_id(1).to(tl.int64)
    counts_row = choice * tl.num_programs(0) + number
    reach = reach_of(
        query,
        choice,
        counts_row,
        num_queries,
        list_size,
        counts_ptr,
        base_ptr,
        None,
        own_row,
        COLUMNS,
        SPAN,
    )[0]
    listed, listed_steps = reach[2], reach[3]
    first_head = choice if BY_HEAD else choice * 0
    num_heads = 1 if BY_HEAD else num_kv_heads

    # A pass takes whole spans: several in one step, or one in several.
    SPANS: tl.constexpr = COLUMNS // SPAN if COLUMNS > SPAN else 1
    STEPS: tl.constexpr = SPAN // COLUMNS if SPAN > COLUMNS else 1
    BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    for first in range(0, listed_steps, STEPS):
        total = tl.zeros([COLUMNS], tl.float32)
        for part in range(STEPS * num_heads * BLOCKS):
            row, seen = rows_of_step(
                first + part // (num_heads * BLOCKS), reach, chosen_ptr, COLUMNS, SPAN
            )
            kv_head = first_head + part // BLOCKS % num_heads
            _, live, index = heads_of(query, kv_head, part % BLOCKS, num_kv_heads, GROUP, HEADS)
            q = load_rows(q_ptr, index, live, DIM)
            keys = load_rows(k_ptr, row.to(tl.int64) * num_kv_heads + kv_head, seen, DIM)
            denominator = log2_denominator(lse_ptr, index, live)
            logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
            probs = tl.exp2(logits - denominator[:, None])
            total += tl.sum(tl.where(seen[None, :] & live[:, None], probs, 0.0), 0)

        found = tl.sum(tl.reshape(total, [SPANS, COLUMNS // SPANS]), 1)
        slot = first * COLUMNS // SPAN + tl.arange(0, SPANS)
        tl.store(masses_ptr + counts_row * list_size + slot, found, mask=slot < listed // SPAN)
