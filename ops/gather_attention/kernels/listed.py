"""Attention to listed rows, in parts: one query with many rows would keep one program busy, and the
device idle. What the parts have is joined in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ops.gather_attention.kernels.columns import heads_of
from ops.sparse_attention.kernels.common import LOG2E, load_rows, softmax_step


@triton.jit
def listed_part_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    acc_ptr,
    peak_ptr,
    mass_ptr,
    first_query,
    num_queries,
    list_size,
    first_part,
    num_kv_heads,
    scale,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    BY_HEAD: tl.constexpr,
):
    """Grid (queries of this call, Hk * GROUP / HEADS, parts of this source). q: [T, Hk * GROUP,
    DIM]; k, v: [N, Hk, DIM], without v the keys are values; rows: [C, T, list_size] int32, -1 is
    nothing.

    acc: [parts of all sources, queries of this call, Hk * GROUP, DIM] fp32, a part's values by
    e^(logit - peak), unscaled; peak, in log2, and mass, their sum, likewise without DIM. PART: rows
    of a part, a multiple of COLUMNS.
    """
    BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    number = tl.program_id(0)
    query = first_query + number
    kv_head = tl.program_id(1) // BLOCKS
    block = tl.program_id(1) % BLOCKS
    choice = kv_head.to(tl.int64) * (1 if BY_HEAD else 0)
    list_row = (choice * num_queries + query) * list_size
    _, live, index = heads_of(query, kv_head, block, num_kv_heads, GROUP, HEADS)
    q = load_rows(q_ptr, index, live, DIM)

    peak = tl.full([HEADS], float("-inf"), tl.float32)
    mass = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, DIM], tl.float32)
    begin = tl.program_id(2) * PART
    for first in range(begin, tl.minimum(begin + PART, list_size), COLUMNS):
        place = first + tl.arange(0, COLUMNS)
        row = tl.load(rows_ptr + list_row + place, mask=place < list_size, other=-1)
        seen = row >= 0
        at = row.to(tl.int64) * num_kv_heads + kv_head
        keys = load_rows(k_ptr, at, seen, DIM)
        values = keys
        if v_ptr is not None:
            values = load_rows(v_ptr, at, seen, DIM)
        logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
        peak, mass, acc = softmax_step(
            tl.where(seen[None, :], logits, float("-inf")), values, peak, mass, acc
        )

    part = (first_part + tl.program_id(2)).to(tl.int64) * tl.num_programs(0)
    to = heads_of(part + number, kv_head, block, num_kv_heads, GROUP, HEADS)[2]
    tl.store(acc_ptr + to[:, None] * DIM + tl.arange(0, DIM)[None, :], acc, mask=live[:, None])
    tl.store(peak_ptr + to, peak, mask=live)
    tl.store(mass_ptr + to, mass, mask=live)


@triton.jit
def join_parts_kernel(
    acc_ptr,
    peak_ptr,
    mass_ptr,
    sink_ptr,
    out_ptr,
    num_rows,
    num_parts,
    num_heads,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Grid (num_rows / ROWS,), rows of queries and heads. acc: [num_parts, num_rows, DIM], peak and
    mass: [num_parts, num_rows]; sink: [num_heads] fp32, or None; out: [num_rows, DIM].
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < num_rows
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    if sink_ptr is not None:
        # The sink adds mass and no value.
        peak = tl.load(sink_ptr + row % num_heads, mask=live, other=0.0) * LOG2E
        mass += 1.0
    for part in range(num_parts):
        at = part * num_rows + row
        part_peak = tl.load(peak_ptr + at, mask=live, other=float("-inf"))
        new_peak = tl.maximum(peak, part_peak)
        finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - finite)
        weight = tl.exp2(part_peak - finite)
        mass = mass * shrink + tl.load(mass_ptr + at, mask=live, other=0.0) * weight
        acc = acc * shrink[:, None] + load_rows(acc_ptr, at, live, DIM) * weight[:, None]
        peak = new_peak

    # A row that sees nothing gives zero.
    out = acc * tl.where(mass > 0.0, 1.0 / mass, 0.0)[:, None]
    tl.store(
        out_ptr + row[:, None] * DIM + tl.arange(0, DIM)[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=live[:, None],
    )
