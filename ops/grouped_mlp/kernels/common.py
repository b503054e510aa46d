"""What the kernels share: the map from row tiles to experts, the order of tiles, and the two matrix
products.

Rows are assignments in the order of `slots`; a row's token is slots[row] // TOP_K. Grids are upper
bounds: the number of rows is known on the device only, and superfluous programs return. Products
are in the dtype of the inputs with fp32 accumulators; "ieee" keeps fp32 inputs from being rounded
to tf32. Sums of 8-bit products leave sm_90's tensor cores, whose own have some 14 bits, after every
STEP of them (arXiv 2412.19437, section 3.3.2).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_map_kernel(
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles,
    EXPERTS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (EXPERTS + 1). tile_expert, tile_start: [tiles] int32, expert and first row; the last
    program marks the tiles that no expert needs with expert -1. SIZE: power of two >= EXPERTS.
    """
    expert = tl.program_id(0)
    index = tl.arange(0, SIZE)
    begin = tl.load(offsets_ptr + index, mask=index < EXPERTS, other=0)
    end = tl.load(offsets_ptr + index + 1, mask=index < EXPERTS, other=0)
    first = tl.sum(tl.where(index < expert, tl.cdiv(end - begin, ROWS), 0))

    # The tiles of this expert; the last program has what is left over of the grid.
    row = tl.load(offsets_ptr + expert)
    end_row = tl.load(offsets_ptr + tl.minimum(expert + 1, EXPERTS))
    real = expert < EXPERTS
    count = tl.where(real, tl.cdiv(end_row - row, ROWS), num_tiles - first)

    lane = tl.arange(0, CHUNK)
    for chunk in range(0, count, CHUNK):
        tile = chunk + lane
        tl.store(
            tile_expert_ptr + first + tile,
            tl.zeros([CHUNK], tl.int32) + tl.where(real, expert, -1),
            mask=tile < count,
        )
        tl.store(tile_start_ptr + first + tile, row + tile * ROWS, mask=tile < count)


@triton.jit
def ordered_tile(program, num_tiles, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile): columns of GROUP row tiles together, which share a weight tile and
    their rows in the L2.
    """
    first = program // (GROUP * COLUMN_TILES) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = program % (GROUP * COLUMN_TILES)
    return first + within % size, within // size


@triton.jit
def row_tile(
    tile_expert_ptr,
    tile_start_ptr,
    offsets_ptr,
    COLUMN_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(expert or -1, first row, rows [ROWS] int64, row to read instead [ROWS], whether a row
    exists, column tile).

    Rows behind the last one of the expert read that one again, so that loads need no mask.
    """
    tile, column_tile = ordered_tile(
        tl.program_id(0), tl.num_programs(0) // COLUMN_TILES, COLUMN_TILES, GROUP
    )

    expert = tl.load(tile_expert_ptr + tile)
    start = tl.load(tile_start_ptr + tile)
    row = start + tl.arange(0, ROWS)
    end = tl.load(offsets_ptr + tl.maximum(expert, 0) + 1)
    return (
        expert,
        start,
        row.to(tl.int64),
        tl.minimum(row, end - 1).to(tl.int64),
        row < end,
        column_tile,
    )


@triton.jit
def as_numbers(weight, dtype: tl.constexpr):
    """Weights as what the rows are. uint8 are the bits of finite e4m3, for devices before sm_89,
    which cannot convert it: as the exponent and mantissa of fp16 they are the number over 2^8,
    exactly, since fp16 has a bias of 15 where e4m3 has one of 7.
    """
    if weight.dtype == tl.uint8:
        bits = weight.to(tl.uint16)
        half = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).to(tl.float16, bitcast=True)
        return (half * 256.0).to(dtype)
    return weight.to(dtype)


@triton.jit
def row_product(
    rows,
    row_start,
    matrix,
    expert,
    column_start,
    column,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PAIRS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FP8: tl.constexpr,
):
    """[ROWS, COLUMNS] fp32: rows of DEPTH values times a tile of columns of an expert's matrix.

    rows: pointers [ROWS] to each row; with TMA and not GATHER, a descriptor of the rows, of which
        row_start is the first.
    matrix: [experts, DEPTH, WIDTH], TRANSPOSED: [experts, WIDTH, DEPTH], PAIRS: [experts, 2, WIDTH,
        DEPTH], the pointer or with TMA the descriptor; weights of 8 bits by their pointer alone.
    column: [COLUMNS], of the matrix; PAIRS: the first half of them of either part.
    FP8: both are e4m3; what they are scaled by is the caller's.
    """
    step = tl.arange(0, STEP)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    LOW: tl.constexpr = STEP if FP8 else 0

    # TMA loads whole tiles by their place and fills what lies outside with zeros. Rows that are
    # gathered have no place: they are read by their pointers all the same.
    if TMA:
        if GATHER:
            x_ptr = rows[:, None] + step[None, :]
        for k in range(0, DEPTH, STEP):
            if GATHER:
                if DEPTH % STEP == 0:
                    x = tl.load(x_ptr)
                else:
                    x = tl.load(x_ptr, mask=(step < DEPTH - k)[None, :], other=0.0)
                x_ptr += STEP
            else:
                x = rows.load([row_start, k])

            if PAIRS:
                w = matrix.load([expert, 0, column_start, k]).reshape(COLUMNS, STEP).T
            elif TRANSPOSED:
                w = matrix.load([expert, column_start, k]).reshape(COLUMNS, STEP).T
            else:
                w = matrix.load([expert, k, column_start]).reshape(STEP, COLUMNS)
            acc = tl.dot(x, w, acc, input_precision="ieee", max_num_imprecise_acc=LOW)
    else:
        # Without TMA the masks are compiled only for sizes that do not fill their tiles.
        x_ptr = rows[:, None] + step[None, :]
        EVEN: tl.constexpr = WIDTH % (COLUMNS // 2 if PAIRS else COLUMNS) == 0 and DEPTH % STEP == 0

        depth_stride: tl.constexpr = 1 if TRANSPOSED or PAIRS else WIDTH
        column_stride: tl.constexpr = DEPTH if TRANSPOSED or PAIRS else 1
        offset = column.to(tl.int64) * column_stride
        if PAIRS:
            offset += tl.where(tl.arange(0, COLUMNS) < COLUMNS // 2, 0, WIDTH * DEPTH)

        # Offsets are 64 bits wide: the experts together may hold more than 2^31 values.
        area: tl.constexpr = (2 if PAIRS else 1) * WIDTH * DEPTH
        w_ptr = (
            matrix
            + expert.to(tl.int64) * area
            + step.to(tl.int64)[:, None] * depth_stride
            + offset[None, :]
        )

        for k in range(0, DEPTH, STEP):
            if EVEN:
                x = tl.load(x_ptr)
                w = as_numbers(tl.load(w_ptr), x.dtype)
                acc = tl.dot(x, w, acc, input_precision="ieee", max_num_imprecise_acc=LOW)
            else:
                inside = step < DEPTH - k
                x = tl.load(x_ptr, mask=inside[None, :], other=0.0)
                w = tl.load(w_ptr, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
                w = as_numbers(w, x.dtype)
                acc = tl.dot(x, w, acc, input_precision="ieee", max_num_imprecise_acc=LOW)
            x_ptr += STEP
            w_ptr += STEP * depth_stride
    return acc


@triton.jit
def expert_product(
    left_ptr,
    right_ptr,
    rows,
    out_ptr,
    slots_ptr,
    offsets_ptr,
    GATHER_LEFT: tl.constexpr,
    TOP_K: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TMA: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """A tile of out [experts, LEFT, RIGHT]: sum over an expert's rows of left^T right, one of the
    two by rows, the other, whose rows are gathered, by tokens. With TMA the one by rows comes
    through its descriptor `rows`, without a mask: what stands behind the expert's last row is
    finite and meets zeros.
    """
    TILES: tl.constexpr = tl.cdiv(LEFT, ROWS) * tl.cdiv(RIGHT, COLUMNS)
    expert = tl.program_id(0) // TILES
    left_tile, right_tile = ordered_tile(
        tl.program_id(0) % TILES, tl.cdiv(LEFT, ROWS), tl.cdiv(RIGHT, COLUMNS), GROUP
    )

    # An expert without rows runs no step and stores zeros: its gradient is there all the same.
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

        if TMA and not GATHER_LEFT:
            left = rows.load([start, left_tile * ROWS]).T
        else:
            left_row = (token if GATHER_LEFT else row).to(tl.int64)
            left_live = live[None, :]
            if LEFT % ROWS:
                left_live = left_live & (left_column < LEFT)[:, None]
            left = tl.load(
                left_ptr + left_row[None, :] * LEFT + left_column[:, None],
                mask=left_live,
                other=0.0,
            )

        if TMA and GATHER_LEFT:
            right = rows.load([start, right_tile * COLUMNS])
        else:
            right_row = (row if GATHER_LEFT else token).to(tl.int64)
            right_live = live[:, None]
            if RIGHT % COLUMNS:
                right_live = right_live & (right_column < RIGHT)[None, :]
            right = tl.load(
                right_ptr + right_row[:, None] * RIGHT + right_column[None, :],
                mask=right_live,
                other=0.0,
            )

        acc = tl.dot(left, right, acc, input_precision="ieee")

    out = (
        out_ptr
        + expert.to(tl.int64) * LEFT * RIGHT
        + left_column.to(tl.int64)[:, None] * RIGHT
        + right_column[None, :]
    )
    live = (left_column < LEFT)[:, None] & (right_column < RIGHT)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=live)
