"""What the kernels share: rows of a query tile, logits of coarse entries, one step of the running
softmax.

Logits are scaled by log2(e), so that exponentials are exp2; "log2" in a name says so. Matrix
products are in the dtype of the inputs with fp32 accumulators; "ieee" keeps fp32 inputs from being
rounded to tf32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_rows(
    start, end, kv_head, num_heads, QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr
):
    """Rows of a tile of queries [start, end): (query within the tile, row of [T * H] int64, whether
    it exists).
    """
    row = tl.arange(0, QUERIES * HEADS)
    query = row // HEADS
    head = row % HEADS
    index = (start + query).to(tl.int64) * num_heads + kv_head * GROUP + head
    return query, index, (start + query < end) & (head < GROUP)


@triton.jit
def load_rows(ptr, index, live, DIM: tl.constexpr):
    """[rows, DIM] of a row-major matrix, zero where not live."""
    return tl.load(
        ptr + index[:, None] * DIM + tl.arange(0, DIM)[None, :], mask=live[:, None], other=0.0
    )


@triton.jit
def load_tile(
    box,
    ptr,
    first,
    limit,
    head,
    num_heads,
    BOX: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """[ROWS, DIM]: rows `first` and on of one head of [n, num_heads, DIM]. By pointers those from
    `limit` on are zero; with BOX, which is for tiles that end before it or whose surplus rows reach
    no result, the tensor memory accelerator copies them as they lie, by the descriptor `box` of [n,
    num_heads * DIM].
    """
    if BOX:
        rows = box.load([tl.cast(first, tl.int32), tl.cast(head * DIM, tl.int32)])
    else:
        row = first + tl.arange(0, ROWS)
        rows = load_rows(ptr, row.to(tl.int64) * num_heads + head, row < limit, DIM)
    return rows


@triton.jit
def entry_logits(
    q, q_squared, key_mean, key_var, scale, max_variance, log2_tokens, ORDER: tl.constexpr
):
    """[rows, entries]: log2 logits without bias, and their variance term in natural units (no
    meaning for order 0).
    """
    logits = tl.dot(q, tl.trans(key_mean), input_precision="ieee") * (scale * LOG2E) + log2_tokens
    kappa = logits
    if ORDER == 2:
        kappa = tl.dot(q_squared, tl.trans(key_var), input_precision="ieee") * (0.5 * scale * scale)
        logits += tl.minimum(kappa, max_variance) * LOG2E
    return logits, kappa


@triton.jit
def softmax_step(logits, values, peak, mass, acc):
    """Take [rows, n] log2 logits and [n, DIM] values into a running softmax; rows may be without
    any entry (-inf).
    """
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink = tl.exp2(peak - finite)
    probs = tl.exp2(logits - finite[:, None])
    mass = mass * shrink + tl.sum(probs, 1)
    acc = acc * shrink[:, None] + tl.dot(probs.to(values.dtype), values, input_precision="ieee")
    return new_peak, mass, acc


@triton.jit
def log2_denominator(lse_ptr, index, live):
    """The softmax's denominator as log2; rows without entries get +inf, so that their probabilities
    are 0.
    """
    lse = tl.load(lse_ptr + index, mask=live, other=float("-inf")) * LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)
