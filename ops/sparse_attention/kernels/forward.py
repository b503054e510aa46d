"""Attention of a tile of queries of one key/value head: coarse entries, selected blocks, window and
first blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ops.sparse_attention.kernels.common import (
    LN2,
    LOG2E,
    entry_logits,
    load_rows,
    load_tile,
    softmax_step,
    tile_rows,
)


@triton.jit
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_mean_ptr,
    value_mean_ptr,
    key_var_ptr,
    k_box,
    v_box,
    bias_ptr,
    sink_ptr,
    bits_ptr,
    list_ptr,
    words_ptr,
    counts_ptr,
    tile_start_ptr,
    tile_end_ptr,
    tile_block_ptr,
    block_start_ptr,
    first_ptr,
    sink_end_ptr,
    local_start_ptr,
    out_ptr,
    lse_ptr,
    tail_mass_ptr,
    selected_mass_ptr,
    num_blocks,
    num_tiles,
    first_tile,
    list_size,
    num_kv_heads,
    scale,
    max_variance,
    log2_tokens,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    ORDER: tl.constexpr,
    EXACT: tl.constexpr,
    COARSE: tl.constexpr,
    SELECTED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Grid (tiles, Hk). q, out: [T, Hk * GROUP, DIM]; k, v: [T, Hk, DIM]; lse and masses: [T, Hk *
    GROUP] fp32. k_box, v_box: with TMA descriptors of k and v (common.load_tile).

    Coarse entries come first: their share of the denominator, and then the selected blocks', stand
    by themselves, as each phase counts its own mass against the shared peak.
    """
    # the longest rows of a document start first
    tile = num_tiles - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    start = tl.load(tile_start_ptr + first_tile + tile)
    end = tl.load(tile_end_ptr + first_tile + tile)
    if start >= end:
        return
    own = tl.load(tile_block_ptr + first_tile + tile)
    first = tl.load(first_ptr + own)

    # The rows of a tile are its queries by the heads of the group, so that a key serves all of them
    # at once.
    query, index, live = tile_rows(start, end, kv_head, num_kv_heads * GROUP, QUERIES, HEADS, GROUP)
    token = start + query
    list_row = kv_head.to(tl.int64) * num_tiles + tile
    q = load_rows(q_ptr, index, live, DIM)

    column = tl.arange(0, COLUMNS)
    peak = tl.full([QUERIES * HEADS], float("-inf"), tl.float32)
    tail = tl.zeros([QUERIES * HEADS], tl.float32)
    acc = tl.zeros([QUERIES * HEADS, DIM], tl.float32)

    # First phase, the tail: entries of the blocks between the first ones and the window (without
    # the exact branch, of every complete past block), but for those that the query selected.
    if COARSE:
        q_squared = q * q
        head_offset = kv_head.to(tl.int64) * num_blocks * ENTRIES
        low = first * ENTRIES
        high = own * ENTRIES
        if EXACT:
            low = tl.load(sink_end_ptr + own) * ENTRIES
            high = tl.load(local_start_ptr + own) * ENTRIES
        offset = tl.full([QUERIES * HEADS], log2_tokens, tl.float32)
        if bias_ptr is not None:
            offset += tl.load(bias_ptr + index, mask=live, other=0.0) * LOG2E

        for begin in range(low, high, COLUMNS):
            entry = begin + column
            inside = entry < high
            key_mean = load_rows(key_mean_ptr, head_offset + entry, inside, DIM)
            key_var = key_mean
            if ORDER == 2:
                key_var = load_rows(key_var_ptr, head_offset + entry, inside, DIM)
            values = load_rows(value_mean_ptr, head_offset + entry, inside, DIM)
            logits, _ = entry_logits(
                q, q_squared, key_mean, key_var, scale, max_variance, offset[:, None], ORDER
            )

            # A query's own bit in a block's word says that it has the block's tokens instead.
            seen = inside[None, :] & live[:, None]
            if SELECTED:
                word = tl.load(
                    bits_ptr + list_row * num_blocks + entry // ENTRIES, mask=inside, other=0
                )
                seen = seen & (((word[None, :] >> query[:, None]) & 1) == 0)
            peak, tail, acc = softmax_step(
                tl.where(seen, logits, float("-inf")), values, peak, tail, acc
            )

    # Second phase, the tokens of the blocks that any query of the tile selected. `acc` goes on
    # under the shared peak, the mass starts at zero.
    tail_peak = peak
    chosen = tl.zeros([QUERIES * HEADS], tl.float32)
    if SELECTED:
        count = tl.load(counts_ptr + list_row)
        for step in range(count * (BLOCK // COLUMNS)):
            at = list_row * list_size + step // (BLOCK // COLUMNS)
            word = tl.load(words_ptr + at)
            key = tl.load(block_start_ptr + tl.load(list_ptr + at))
            key += (step % (BLOCK // COLUMNS)) * COLUMNS
            keys = load_tile(k_box, k_ptr, key, end, kv_head, num_kv_heads, TMA, COLUMNS, DIM)
            values = load_tile(v_box, v_ptr, key, end, kv_head, num_kv_heads, TMA, COLUMNS, DIM)
            logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)

            # Selected blocks are complete and past, so that the query's bit is all the mask there
            # is.
            seen = (((word >> query) & 1) == 1) & live
            peak, chosen, acc = softmax_step(
                tl.where(seen[:, None], logits, float("-inf")), values, peak, chosen, acc
            )

    # Third phase, the first blocks and then the window in one loop: one body, compiled once.
    chosen_peak = peak
    rest = tl.zeros([QUERIES * HEADS], tl.float32)
    if EXACT:
        sink_start = tl.load(block_start_ptr + first)
        sink_steps = (tl.load(sink_end_ptr + own) - first) * (BLOCK // COLUMNS)
        window_start = tl.load(block_start_ptr + tl.load(local_start_ptr + own))
        steps = sink_steps + tl.cdiv(end - window_start, COLUMNS)
        # Only the last step, which there always is, can reach beyond `end`. With TMA it is a pass
        # of its own, by pointers.
        cut = steps - 1 if TMA else 0
        for BOX in tl.static_range(TMA, -1, -1):
            for step in range(0 if BOX else cut, cut if BOX else steps):
                key = step * COLUMNS + tl.where(
                    step < sink_steps, sink_start, window_start - sink_steps * COLUMNS
                )
                keys = load_tile(k_box, k_ptr, key, end, kv_head, num_kv_heads, BOX, COLUMNS, DIM)
                values = load_tile(v_box, v_ptr, key, end, kv_head, num_kv_heads, BOX, COLUMNS, DIM)
                logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)

                seen = ((key + column)[None, :] <= token[:, None]) & live[:, None]
                peak, rest, acc = softmax_step(
                    tl.where(seen, logits, float("-inf")), values, peak, rest, acc
                )

    # The sink adds mass and no value.
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + index % (num_kv_heads * GROUP), mask=live, other=0.0) * LOG2E
        new_peak = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - new_peak)
        acc = acc * shrink[:, None]
        rest = rest * shrink + tl.exp2(sink - new_peak)
        peak = new_peak

    # Each phase's mass is brought from the peak it ended with to the last one. A row may have no
    # entry at all: any finite peak does for it, and its output is zero.
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    tail = tail * tl.exp2(tail_peak - finite)
    chosen = chosen * tl.exp2(chosen_peak - finite)
    total = tail + chosen + rest
    inverse = tl.where(total > 0.0, 1.0 / total, 0.0)
    out = acc * inverse[:, None]

    tl.store(
        out_ptr + index[:, None] * DIM + tl.arange(0, DIM)[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=live[:, None],
    )
    tl.store(lse_ptr + index, (peak + tl.log2(total)) * LN2, mask=live)
    tl.store(tail_mass_ptr + index, tail * inverse, mask=live)
    tl.store(selected_mass_ptr + index, chosen * inverse, mask=live)
