"""Up-projection with SwiGLU, down-projection, and the sum over a token's experts. Letters:
README.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ops.grouped_mlp.kernels.common import row_product, row_tile


@triton.jit
def up_kernel(
    hidden_ptr,
    gate_up,
    hidden_scales,
    gate_up_scales,
    slots_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    act_ptr,
    pre_ptr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    FP8: tl.constexpr = False,
):
    """Grid (row tiles * cdiv(WIDTH, COLUMNS)). act [R, WIDTH] and pre [R, 2 * WIDTH], either may be
    None.

    One product of 2 * COLUMNS columns, of gate and then of up, is split in registers: a thread has
    both. gate_up_scales: [experts, 2 * WIDTH], None where the weights are not of 8 bits. FP8:
    hidden is e4m3 as well, and hidden_scales are [T].
    """
    expert, start, row, read_row, live, column_tile = row_tile(
        tile_expert_ptr, tile_start_ptr, offsets_ptr, tl.cdiv(WIDTH, COLUMNS), GROUP, ROWS
    )
    if expert < 0:
        return

    token = tl.load(slots_ptr + read_row) // TOP_K
    pair_column = column_tile * COLUMNS + tl.arange(0, 2 * COLUMNS) % COLUMNS
    acc = row_product(
        hidden_ptr + token.to(tl.int64) * HIDDEN,
        0,
        gate_up,
        expert,
        column_tile * COLUMNS,
        pair_column,
        True,
        True,
        True,
        HIDDEN,
        WIDTH,
        TMA,
        STEP,
        ROWS,
        2 * COLUMNS,
        FP8,
    )
    if FP8:
        acc *= tl.load(hidden_scales + token)[:, None]

    # The columns are those of gate and then of up; split takes a last axis of two.
    gate, up = tl.split(acc.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1))
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    store = live[:, None] & (column < WIDTH)[None, :]
    if gate_up_scales is not None:
        scale = gate_up_scales + expert.to(tl.int64) * 2 * WIDTH + column
        gate *= tl.load(scale, mask=column < WIDTH, other=0.0)[None, :]
        up *= tl.load(scale + WIDTH, mask=column < WIDTH, other=0.0)[None, :]

    if act_ptr is not None:
        act = gate * tl.sigmoid(gate) * up
        tl.store(
            act_ptr + row[:, None] * WIDTH + column[None, :],
            act.to(act_ptr.dtype.element_ty),
            mask=store,
        )

    if pre_ptr is not None:
        pre = pre_ptr + row[:, None] * 2 * WIDTH + column[None, :]
        tl.store(pre, gate.to(pre_ptr.dtype.element_ty), mask=store)
        tl.store(pre + WIDTH, up.to(pre_ptr.dtype.element_ty), mask=store)


@triton.jit
def down_kernel(
    act_ptr,
    act,
    down,
    act_scales,
    down_scales,
    weights_ptr,
    slots_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    SCATTER: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    FP8: tl.constexpr = False,
):
    """Grid (row tiles * cdiv(HIDDEN, COLUMNS)). out: [R, HIDDEN] by rows; with SCATTER, for one
    slot a token, by tokens and times the weight. act: the descriptor of act_ptr, None without TMA.
    down_scales: [experts, HIDDEN], None where the weights are not of 8 bits. FP8: act is e4m3
    as well, and act_scales are [R].
    """
    expert, start, row, read_row, live, column_tile = row_tile(
        tile_expert_ptr, tile_start_ptr, offsets_ptr, tl.cdiv(HIDDEN, COLUMNS), GROUP, ROWS
    )
    if expert < 0:
        return

    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    rows = act if TMA else act_ptr + read_row * WIDTH
    acc = row_product(
        rows,
        start,
        down,
        expert,
        column_tile * COLUMNS,
        column,
        False,
        True,
        False,
        WIDTH,
        HIDDEN,
        TMA,
        STEP,
        ROWS,
        COLUMNS,
        FP8,
    )

    if FP8:
        acc *= tl.load(act_scales + read_row)[:, None]
    if down_scales is not None:
        scale = down_scales + expert.to(tl.int64) * HIDDEN + column
        acc *= tl.load(scale, mask=column < HIDDEN, other=0.0)[None, :]

    # With one slot a token, a slot's number is its token's, and no sum over slots follows that
    # could weigh it.
    if SCATTER:
        row = tl.load(slots_ptr + read_row).to(tl.int64)
        acc *= tl.load(weights_ptr + row)[:, None]
    tl.store(
        out_ptr + row[:, None] * HIDDEN + column[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (column < HIDDEN)[None, :],
    )


@triton.jit
def combine_kernel(
    rows_ptr,
    inverse_ptr,
    weights_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (T, cdiv(HIDDEN, COLUMNS)). out[t] = sum over slots, in order, of rows [R, HIDDEN] at
    inverse [T, TOP_K], times weights [T, TOP_K] unless None.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([COLUMNS], tl.float32)
    for slot in tl.static_range(TOP_K):
        row = tl.load(inverse_ptr + token * TOP_K + slot).to(tl.int64)
        values = tl.load(
            rows_ptr + row * HIDDEN + column, mask=(row >= 0) & (column < HIDDEN), other=0.0
        ).to(tl.float32)
        if weights_ptr is not None:
            values *= tl.load(weights_ptr + token * TOP_K + slot)
        acc += values
    tl.store(
        out_ptr + token * HIDDEN + column, acc.to(out_ptr.dtype.element_ty), mask=column < HIDDEN
    )
