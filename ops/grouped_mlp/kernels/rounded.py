"""Gradients of weights from rows that are rounded to 8 bits: a kernel that rounds tiles of rows and
transposes them, and the product of such tiles. Definition: rounded_tiles in fp8.py.

A tile is STEP rows of one expert; the last one of an expert is filled up with zeros. Expert e's
first tile has the number offsets[e] // STEP + e, its others follow: no two experts meet, since one
with n rows has at most n / STEP rounded down tiles more than one, and no kernel has to add up the
experts before it. Some numbers stay unused, and what stands there is neither written nor read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ops.grouped_mlp.kernels.common import ordered_tile


@triton.jit
def round_tiles_kernel(
    values_ptr,
    slots_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    low_ptr,
    scales_ptr,
    WIDTH: tl.constexpr,
    GATHER: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Grid (row tiles * cdiv(WIDTH, COLUMNS)). values: [R, WIDTH] by rows, with GATHER [T, WIDTH]
    by tokens. low: e4m3 [tiles, WIDTH, STEP], rows last as tensor cores want what is summed over;
    scales: [tiles, WIDTH] fp32. The bits are those of fp8.round_rows.
    """
    COLUMN_TILES: tl.constexpr = tl.cdiv(WIDTH, COLUMNS)
    tile = tl.program_id(0) // COLUMN_TILES
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return

    start = tl.load(tile_start_ptr + tile)
    begin = tl.load(offsets_ptr + expert)
    row = start + tl.arange(0, STEP)
    live = row < tl.load(offsets_ptr + expert + 1)
    column = tl.program_id(0) % COLUMN_TILES * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    if GATHER:
        row = tl.load(slots_ptr + row, mask=live, other=0) // TOP_K
    values = tl.load(
        values_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :],
        mask=live[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)

    # Without its sign, the bits of a float are in the order of its size, and NaN is above all.
    largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    # 448 is 1.75 * 2^8: a mantissa from there on needs the next power of two.
    exponent = (largest >> 23) - 127 - 8 + ((largest & 0x7FFFFF) >= 0x600000).to(tl.int32)
    # What is 0 when it is divided by 448 has the scale 1.
    exponent = tl.where(largest <= 224, 0, tl.maximum(exponent, -126))
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(largest >= 0x7F800000, float("nan"), scale)
    low = (values * tl.where(largest >= 0x7F800000, float("nan"), inverse)[None, :]).to(
        low_ptr.dtype.element_ty
    )

    place = (begin // STEP + expert + (start - begin) // STEP).to(tl.int64) * WIDTH + column
    tl.store(scales_ptr + place, scale, mask=inside)
    tl.store(
        low_ptr + place[:, None] * STEP + tl.arange(0, STEP)[None, :],
        low.T,
        mask=inside[:, None],
    )


@triton.jit
def tiles_product_kernel(
    left_ptr,
    left,
    left_scales,
    right_ptr,
    right,
    right_scales,
    offsets_ptr,
    out_ptr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid (experts * tiles of [LEFT, RIGHT]). out[e] = sum over the expert's rows of left^T right,
    both as round_tiles_kernel leaves them. left, right: descriptors of left_ptr and right_ptr, None
    without TMA. A tile of rows is a product that starts at zero and is added to the sum in fp32,
    times the scales of its columns: no sum stays in the tensor cores for longer.
    """
    TILES: tl.constexpr = tl.cdiv(LEFT, ROWS) * tl.cdiv(RIGHT, COLUMNS)
    expert = tl.program_id(0) // TILES
    left_tile, right_tile = ordered_tile(
        tl.program_id(0) % TILES, tl.cdiv(LEFT, ROWS), tl.cdiv(RIGHT, COLUMNS), GROUP
    )
    begin = tl.load(offsets_ptr + expert)
    count = tl.cdiv(tl.load(offsets_ptr + expert + 1) - begin, STEP)
    first = begin // STEP + expert

    left_column = left_tile * ROWS + tl.arange(0, ROWS)
    right_column = right_tile * COLUMNS + tl.arange(0, COLUMNS)
    left_inside, right_inside = left_column < LEFT, right_column < RIGHT
    step = tl.arange(0, STEP)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(first, first + count):
        left_place = tl.cast(tile, tl.int64) * LEFT + left_column
        right_place = tl.cast(tile, tl.int64) * RIGHT + right_column
        if TMA:
            x = left.load([tile, left_tile * ROWS, 0]).reshape(ROWS, STEP)
            y = right.load([tile, right_tile * COLUMNS, 0]).reshape(COLUMNS, STEP).T
        else:
            x = tl.load(
                left_ptr + left_place[:, None] * STEP + step[None, :],
                mask=left_inside[:, None],
                other=0.0,
            )
            y = tl.load(
                right_ptr + right_place[None, :] * STEP + step[:, None],
                mask=right_inside[None, :],
                other=0.0,
            )
        left_scale = tl.load(left_scales + left_place, mask=left_inside, other=0.0)
        right_scale = tl.load(right_scales + right_place, mask=right_inside, other=0.0)
        part = tl.dot(x, y, input_precision="ieee")
        acc += part * left_scale[:, None] * right_scale[None, :]

    # An expert without rows ran no step and stores zeros: its gradient is there all the same.
    out = (
        out_ptr
        + expert.to(tl.int64) * LEFT * RIGHT
        + left_column.to(tl.int64)[:, None] * RIGHT
        + right_column[None, :]
    )
    tl.store(
        out, acc.to(out_ptr.dtype.element_ty), mask=left_inside[:, None] & right_inside[None, :]
    )
