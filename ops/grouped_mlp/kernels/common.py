"""What the kernels share: the map from row tiles to experts, the order of tiles, and the two matrix products.

Rows are assignments in the order of `slots`; a row's token is slots[row] // TOP_K. Grids are upper bounds: the number of
rows is known on the device only, and superfluous programs return. Products are in the dtype of the inputs with fp32
accumulators; "ieee" keeps fp32 inputs from being rounded to tf32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_map_kernel(offsets_ptr, tile_expert_ptr, tile_start_ptr, num_tiles, EXPERTS: tl.constexpr, SIZE: tl.constexpr,
                    ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Grid (EXPERTS + 1). tile_expert, tile_start: [tiles] int32, expert and first row; the last program marks the tiles
    that no expert needs with expert -1. SIZE: power of two >= EXPERTS."""
    expert = tl.program_id(0)
    index = tl.arange(0, SIZE)
    begin = tl.load(offsets_ptr + index, mask=index < EXPERTS, other=0)
    end = tl.load(offsets_ptr + index + 1, mask=index < EXPERTS, other=0)
    first = tl.sum(tl.where(index < expert, tl.cdiv(end - begin, ROWS), 0))
    row = tl.load(offsets_ptr + expert)
    end_row = tl.load(offsets_ptr + tl.minimum(expert + 1, EXPERTS))
    real = expert < EXPERTS
    count = tl.where(real, tl.cdiv(end_row - row, ROWS), num_tiles - first)
    lane = tl.arange(0, CHUNK)
    for chunk in range(0, count, CHUNK):
        tile = chunk + lane
        tl.store(tile_expert_ptr + first + tile, tl.zeros([CHUNK], tl.int32) + tl.where(real, expert, -1), mask=tile < count)
        tl.store(tile_start_ptr + first + tile, row + tile * ROWS, mask=tile < count)


@triton.jit
def ordered_tile(program, num_tiles, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile): columns of GROUP row tiles together, which share a weight tile and their rows in the L2."""
    first = program // (GROUP * COLUMN_TILES) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = program % (GROUP * COLUMN_TILES)
    return first + within % size, within // size


@triton.jit
def row_tile(tile_expert_ptr, tile_start_ptr, offsets_ptr, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr,
             ROWS: tl.constexpr):
    """(expert or -1, rows [ROWS] int64, row to read instead [ROWS], whether a row exists, column tile).

    Rows behind the last one of the expert read that one again, so that loads need no mask.
    """
    tile, column_tile = ordered_tile(tl.program_id(0), tl.num_programs(0) // COLUMN_TILES, COLUMN_TILES, GROUP)
    expert = tl.load(tile_expert_ptr + tile)
    row = tl.load(tile_start_ptr + tile) + tl.arange(0, ROWS)
    end = tl.load(offsets_ptr + tl.maximum(expert, 0) + 1)
    return expert, row.to(tl.int64), tl.minimum(row, end - 1).to(tl.int64), row < end, column_tile


@triton.jit
def row_product(row_ptr, matrix_ptr, depth_stride: tl.constexpr, column_offset, column_live, DEPTH: tl.constexpr,
                EVEN: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] fp32: DEPTH values from each of row_ptr [ROWS] times the matrix with value (k, n) at
    k * depth_stride + column_offset[n]. EVEN: every column is live."""
    step = tl.arange(0, STEP)
    rows = row_ptr[:, None] + step[None, :]
    matrix = matrix_ptr + step.to(tl.int64)[:, None] * depth_stride + column_offset[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, DEPTH, STEP):
        if EVEN and DEPTH % STEP == 0:
            acc = tl.dot(tl.load(rows), tl.load(matrix), acc, input_precision="ieee")
        else:
            inside = step < DEPTH - k
            x = tl.load(rows, mask=inside[None, :], other=0.0)
            w = tl.load(matrix, mask=inside[:, None] & column_live[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        rows += STEP
        matrix += STEP * depth_stride
    return acc


@triton.jit
def expert_product(left_ptr, right_ptr, out_ptr, slots_ptr, offsets_ptr, GATHER_LEFT: tl.constexpr, TOP_K: tl.constexpr,
                   LEFT: tl.constexpr, RIGHT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   STEP: tl.constexpr):
    """A tile of out [experts, LEFT, RIGHT]: sum over an expert's rows of left^T right, one of the two by rows, the other,
    whose rows are gathered, by tokens."""
    TILES: tl.constexpr = tl.cdiv(LEFT, ROWS) * tl.cdiv(RIGHT, COLUMNS)
    expert = tl.program_id(0) // TILES
    left_tile, right_tile = ordered_tile(tl.program_id(0) % TILES, tl.cdiv(LEFT, ROWS), tl.cdiv(RIGHT, COLUMNS), GROUP)
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    left_column = left_tile * ROWS + tl.arange(0, ROWS)
    right_column = right_tile * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, STEP)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(begin, end, STEP):
        row = start + step
        live = row < end
        token = tl.load(slots_ptr + row, mask=live, other=0) // TOP_K
        left_row = (token if GATHER_LEFT else row).to(tl.int64)
        right_row = (row if GATHER_LEFT else token).to(tl.int64)
        left_live = live[None, :]
        right_live = live[:, None]
        if LEFT % ROWS:
            left_live = left_live & (left_column < LEFT)[:, None]
        if RIGHT % COLUMNS:
            right_live = right_live & (right_column < RIGHT)[None, :]
        left = tl.load(left_ptr + left_row[None, :] * LEFT + left_column[:, None], mask=left_live, other=0.0)
        right = tl.load(right_ptr + right_row[:, None] * RIGHT + right_column[None, :], mask=right_live, other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    out = out_ptr + expert.to(tl.int64) * LEFT * RIGHT + left_column.to(tl.int64)[:, None] * RIGHT + right_column[None, :]
    live = (left_column < LEFT)[:, None] & (right_column < RIGHT)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=live)
