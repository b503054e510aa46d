"""What a tile of queries selected: a word of query bits per block, and the list of the blocks that
have any.

Tiles are numbered from first_tile, as a call may be cut into runs of tiles
(triton_backend.tile_runs).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mark_kernel(
    selected_ptr,
    tile_start_ptr,
    tile_end_ptr,
    bits_ptr,
    num_tokens,
    num_blocks,
    num_tiles,
    first_tile,
    QUERIES: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Grid (tiles, Hk). selected: [Hk, T, TOP_K] int32, -1 for none; bits: [Hk, tiles, M] int32,
    zeros before.

    Integer or: the result does not hang on the order of the additions.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    start = tl.load(tile_start_ptr + first_tile + tile)
    end = tl.load(tile_end_ptr + first_tile + tile)
    query = tl.arange(0, QUERIES)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    at = (kv_head * num_tokens + start + query) * TOP_K + slot
    block = tl.load(selected_ptr + at, mask=(start + query < end) & (slot < TOP_K), other=-1)
    word = (tl.zeros([QUERIES, SLOTS], tl.int32) + 1) << query
    tl.atomic_or(
        bits_ptr + (kv_head * num_tiles + tile) * num_blocks + block,
        word,
        mask=block >= 0,
        sem="relaxed",
    )


@triton.jit
def list_kernel(
    bits_ptr,
    tile_block_ptr,
    sink_end_ptr,
    local_start_ptr,
    blocks_ptr,
    words_ptr,
    counts_ptr,
    num_blocks,
    num_tiles,
    first_tile,
    list_size,
    CHUNK: tl.constexpr,
):
    """Grid (tiles, Hk). blocks, words: [Hk, tiles, list_size] int32: rising blocks, their query
    bits; counts: [Hk, tiles].

    list_size is at least the number of blocks that one tile can select.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    own = tl.load(tile_block_ptr + first_tile + tile)
    low = tl.load(sink_end_ptr + own)
    high = tl.load(local_start_ptr + own)

    # Only blocks between the first ones and the window can have been selected. The prefix sum keeps
    # the list in rising order without atomics.
    row = kv_head * num_tiles + tile
    count = 0
    for begin in range(low, high, CHUNK):
        block = begin + tl.arange(0, CHUNK)
        word = tl.load(bits_ptr + row * num_blocks + block, mask=block < high, other=0)
        present = (word != 0).to(tl.int32)
        to = row * list_size + count + tl.cumsum(present, 0) - 1
        tl.store(blocks_ptr + to, block, mask=present > 0)
        tl.store(words_ptr + to, word, mask=present > 0)
        count += tl.sum(present, 0)
    tl.store(counts_ptr + row, count)
