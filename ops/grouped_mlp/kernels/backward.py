"""Gradients, without atomics. Formulas: arXiv 2512.14080; the weights' gradient is <grad_out
W_down, act>, so that the output rows are neither kept nor computed again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ops.grouped_mlp.kernels.common import expert_product, row_product, row_tile


@triton.jit
def act_grad_columns(
    grad_act,
    first_column,
    weight,
    row,
    read_row,
    stored,
    pre_ptr,
    grad_pre_ptr,
    act_ptr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store what follows from grad_act [ROWS, COLUMNS] before the weight, and return its part
    <grad_act, act> [ROWS]. Rows to store that do not exist have a weight of 0.

    Halves of the columns come one after the other, SPLITS times over: what they need at once must
    fit the registers.
    """
    if SPLITS > 0:
        first, second = tl.split(grad_act.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))
        part = act_grad_columns(
            first,
            first_column,
            weight,
            row,
            read_row,
            stored,
            pre_ptr,
            grad_pre_ptr,
            act_ptr,
            WIDTH,
            ROWS,
            COLUMNS // 2,
            SPLITS - 1,
        )
        part += act_grad_columns(
            second,
            first_column + COLUMNS // 2,
            weight,
            row,
            read_row,
            stored,
            pre_ptr,
            grad_pre_ptr,
            act_ptr,
            WIDTH,
            ROWS,
            COLUMNS // 2,
            SPLITS - 1,
        )
    else:
        column = first_column + tl.arange(0, COLUMNS)
        inside = (column < WIDTH)[None, :]

        # Forward kept the pre-activations alone: activations and their slopes come from them.
        pre = pre_ptr + read_row[:, None] * 2 * WIDTH + column[None, :]
        gate = tl.load(pre, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(pre + WIDTH, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid

        # The weights' gradient takes grad_act as it is, the rest takes it times the weight.
        part = tl.sum(grad_act * silu * up, 1)
        grad_act *= weight[:, None]

        store = stored[:, None] & inside
        act = weight[:, None] * silu * up
        tl.store(
            act_ptr + row[:, None] * WIDTH + column[None, :],
            act.to(act_ptr.dtype.element_ty),
            mask=store,
        )

        # SiLU's derivative is sigmoid + silu (1 - sigmoid).
        grad_gate = grad_act * up * (sigmoid + silu * (1.0 - sigmoid))
        grad_pre = grad_pre_ptr + row[:, None] * 2 * WIDTH + column[None, :]
        tl.store(grad_pre, grad_gate.to(grad_pre_ptr.dtype.element_ty), mask=store)
        tl.store(grad_pre + WIDTH, (grad_act * silu).to(grad_pre_ptr.dtype.element_ty), mask=store)
    return part


@triton.jit
def act_grad_kernel(
    grad_ptr,
    down,
    grad_scales,
    down_scales,
    pre_ptr,
    weights_ptr,
    slots_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    grad_pre_ptr,
    act_ptr,
    partial_ptr,
    num_rows,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    FP8: tl.constexpr = False,
):
    """Grid (row tiles * cdiv(WIDTH, COLUMNS)). grad: [T, HIDDEN]; pre, grad_pre: [R, 2 * WIDTH];
    act: [R, WIDTH], times the weight; partial: [column tiles, R] fp32, this tile's part of the
    weights' gradient. With FP8 grad and down are e4m3, grad_scales [T], and of down its columns
    were rounded: it is [experts, WIDTH, HIDDEN], with down_scales [experts, WIDTH]. Behind the last
    row of all, the tile is filled with zeros: expert_product reads that far.
    """
    expert, start, row, read_row, live, column_tile = row_tile(
        tile_expert_ptr, tile_start_ptr, offsets_ptr, tl.cdiv(WIDTH, COLUMNS), GROUP, ROWS
    )
    if expert < 0:
        return

    # A row that does not exist has weight 0, so that what is stored for it is zero.
    slot = tl.load(slots_ptr + read_row)
    weight = tl.where(live, tl.load(weights_ptr + slot), 0.0)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)

    grad_act = row_product(
        grad_ptr + (slot // TOP_K).to(tl.int64) * HIDDEN,
        0,
        down,
        expert,
        column_tile * COLUMNS,
        column,
        True,
        FP8,
        False,
        HIDDEN,
        WIDTH,
        TMA,
        STEP,
        ROWS,
        COLUMNS,
        FP8,
    )
    if FP8:
        scale = down_scales + expert.to(tl.int64) * WIDTH + column
        grad_act *= tl.load(grad_scales + slot // TOP_K)[:, None]
        grad_act *= tl.load(scale, mask=column < WIDTH, other=0.0)[None, :]

    # expert_product steps over whole tiles and may read rows behind the last one, which must be
    # finite.
    behind = (row >= tl.load(offsets_ptr + EXPERTS)) & (row < num_rows)
    part = act_grad_columns(
        grad_act,
        column_tile * COLUMNS,
        weight,
        row,
        read_row,
        live | behind,
        pre_ptr,
        grad_pre_ptr,
        act_ptr,
        WIDTH,
        ROWS,
        COLUMNS,
        SPLITS,
    )
    tl.store(partial_ptr + column_tile.to(tl.int64) * num_rows + row, part, mask=live)


@triton.jit
def weights_grad_kernel(
    partial_ptr, inverse_ptr, out_ptr, num_rows, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (cdiv(T * K, BLOCK)). out [T * K] fp32: the parts of a row in order, 0 where a slot is
    unused.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(inverse_ptr + index, mask=index < num_rows, other=-1)
    part = partial_ptr + row
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(PARTS):
        acc += tl.load(part, mask=row >= 0, other=0.0)
        part += num_rows
    tl.store(out_ptr + index, acc, mask=index < num_rows)


@triton.jit
def row_grad_kernel(
    grad_pre_ptr,
    grad_pre,
    gate_up,
    grad_scales,
    gate_up_scales,
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
    slot a token, by tokens. grad_pre: the descriptor of grad_pre_ptr, None without TMA. With FP8
    grad_pre and gate_up are e4m3, grad_scales [R], and of gate_up its columns were rounded: it is
    [experts, HIDDEN, 2 * WIDTH], with gate_up_scales [experts, HIDDEN].
    """
    expert, start, row, read_row, live, column_tile = row_tile(
        tile_expert_ptr, tile_start_ptr, offsets_ptr, tl.cdiv(HIDDEN, COLUMNS), GROUP, ROWS
    )
    if expert < 0:
        return

    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    rows = grad_pre if TMA else grad_pre_ptr + read_row * 2 * WIDTH
    acc = row_product(
        rows,
        start,
        gate_up,
        expert,
        column_tile * COLUMNS,
        column,
        False,
        FP8,
        False,
        2 * WIDTH,
        HIDDEN,
        TMA,
        STEP,
        ROWS,
        COLUMNS,
        FP8,
    )
    if FP8:
        scale = gate_up_scales + expert.to(tl.int64) * HIDDEN + column
        acc *= tl.load(grad_scales + read_row)[:, None]
        acc *= tl.load(scale, mask=column < HIDDEN, other=0.0)[None, :]

    # With one slot a token, a slot's number is its token's.
    if SCATTER:
        row = tl.load(slots_ptr + read_row).to(tl.int64)
    tl.store(
        out_ptr + row[:, None] * HIDDEN + column[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (column < HIDDEN)[None, :],
    )


@triton.jit
def gate_up_grad_kernel(
    grad_pre_ptr,
    grad_pre,
    hidden_ptr,
    slots_ptr,
    offsets_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid (experts * tiles of [2 * WIDTH, HIDDEN]). out[e] = sum over the expert's rows of
    grad_pre^T hidden.
    """
    expert_product(
        grad_pre_ptr,
        hidden_ptr,
        grad_pre,
        out_ptr,
        slots_ptr,
        offsets_ptr,
        False,
        TOP_K,
        2 * WIDTH,
        HIDDEN,
        TMA,
        GROUP,
        ROWS,
        COLUMNS,
        STEP,
    )


@triton.jit
def down_grad_kernel(
    grad_ptr,
    act_ptr,
    act,
    slots_ptr,
    offsets_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid (experts * tiles of [HIDDEN, WIDTH]). out[e] = sum over the expert's rows of grad^T act,
    act times the weight.
    """
    expert_product(
        grad_ptr,
        act_ptr,
        act,
        out_ptr,
        slots_ptr,
        offsets_ptr,
        True,
        TOP_K,
        HIDDEN,
        WIDTH,
        TMA,
        GROUP,
        ROWS,
        COLUMNS,
        STEP,
    )
