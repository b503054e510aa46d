"""The best candidate blocks of every query and key/value head, streaming: nothing of size T x M is
written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ops.sparse_attention.kernels.common import LN2, LOG2E, entry_logits, load_rows, tile_rows

NO_KEY: tl.constexpr = tl.constexpr(-(2**62))
FULL: tl.constexpr = tl.constexpr(2**62 + (2**62 - 1))
LAST_BLOCK: tl.constexpr = tl.constexpr(2**31 - 1)
LOG2_LARGEST: tl.constexpr = tl.constexpr(92.33248261689366)
SMALLEST: tl.constexpr = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _mix(x):
    """noise.mix on uint32, bit for bit."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gumbel(hashed, counter):
    """noise.gumbel of uint32 hashes and counters."""
    uniform = ((_mix(hashed + counter) >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def _sortable(x):
    """fp32 -> int64 in [0, 2^32) with the same order."""
    bits = x.to(tl.int32, bitcast=True)
    # as signed integers these are in order
    flipped = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return flipped.to(tl.int64) + 2147483648


@triton.jit
def _add_to_denominator(
    q,
    q_squared,
    key_mean_ptr,
    key_var_ptr,
    entry,
    seen,
    peak,
    denominator,
    scale,
    max_variance,
    log2_tokens,
    DIM: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Take the entries `entry` that are `seen` into the running sums of the rows; at least one
    is.
    """
    key_mean = load_rows(key_mean_ptr, entry, seen, DIM)
    key_var = key_mean
    if ORDER == 2:
        key_var = load_rows(key_var_ptr, entry, seen, DIM)
    logits, _ = entry_logits(
        q, q_squared, key_mean, key_var, scale, max_variance, log2_tokens, ORDER
    )
    logits = tl.where(seen[None, :], logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    denominator = denominator * tl.exp2(peak - new_peak) + tl.sum(
        tl.exp2(logits - new_peak[:, None]), 1
    )
    return new_peak, denominator


@triton.jit
def rank_kernel(
    q_ptr,
    key_mean_ptr,
    key_var_ptr,
    super_mean_ptr,
    super_var_ptr,
    hashed_ptr,
    tile_start_ptr,
    tile_end_ptr,
    tile_block_ptr,
    tile_super_ptr,
    super_first_ptr,
    first_ptr,
    sink_end_ptr,
    local_start_ptr,
    keys_ptr,
    mass_ptr,
    num_tokens,
    num_blocks,
    num_supers,
    num_kv_heads,
    scale,
    max_variance,
    log2_tokens,
    log2_super_tokens,
    temperature,
    first_drawing_head,
    num_drawing_heads,
    trust,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    FANOUT: tl.constexpr,
    ORDER: tl.constexpr,
    SCORE: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Grid (tiles, Hk). keys: [Hk, T, TOP_K] int64 falling, -1 beyond the candidates; mass: [Hk, T]
    fp32.

    Two passes over the entries, BLOCKS blocks of ENTRIES at a time: the softmax's denominator, then
    scores, which are put into the SLOTS >= TOP_K best seen so far one by one while a row has a
    better one than its worst. With FANOUT > 0 the first pass has super-blocks of so many blocks in
    the place of their entries, and the denominator is an estimate.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    start = tl.load(tile_start_ptr + tile)
    end = tl.load(tile_end_ptr + tile)
    if start >= end:
        return
    own = tl.load(tile_block_ptr + tile)
    first = tl.load(first_ptr + own)
    low = tl.load(sink_end_ptr + own)
    high = tl.load(local_start_ptr + own)

    # Logits have a row per query and head, scores a row per query: the heads of a group choose
    # together.
    query, index, live = tile_rows(start, end, kv_head, num_kv_heads * GROUP, QUERIES, HEADS, GROUP)
    q = load_rows(q_ptr, index, live, DIM)
    q_squared = q * q

    head_offset = kv_head.to(tl.int64) * num_blocks * ENTRIES
    column = tl.arange(0, BLOCKS * ENTRIES)
    token = start + tl.arange(0, QUERIES)
    slot = tl.arange(0, SLOTS).to(tl.int64)

    # Slots hold distinct values from the start, so that replacing the worst replaces one slot;
    # those beyond TOP_K are full and never the worst.
    best = tl.zeros([QUERIES, SLOTS], tl.int64) + tl.where(slot < TOP_K, -1 - slot, FULL)[None, :]
    candidate_mass = tl.zeros([QUERIES], tl.float32)

    # First pass: the denominator over every past entry, as the share of a candidate is one of the
    # whole past.
    if low < high:
        peak = tl.full([QUERIES * HEADS], float("-inf"), tl.float32)
        denominator = tl.zeros([QUERIES * HEADS], tl.float32)
        single = first
        if FANOUT > 0:
            # Whole super-blocks of the past; what follows the last one counts block by block.
            super_own = tl.load(tile_super_ptr + tile)
            super_first = tl.load(super_first_ptr + super_own)
            single = first + (super_own - super_first) * FANOUT
            super_offset = kv_head.to(tl.int64) * num_supers
            for begin in range(super_first, super_own, BLOCKS * ENTRIES):
                entry = begin + column
                peak, denominator = _add_to_denominator(
                    q,
                    q_squared,
                    super_mean_ptr,
                    super_var_ptr,
                    super_offset + entry,
                    entry < super_own,
                    peak,
                    denominator,
                    scale,
                    max_variance,
                    log2_super_tokens,
                    DIM,
                    ORDER,
                )

        for block in range(single, own, BLOCKS):
            entry = block * ENTRIES + column
            peak, denominator = _add_to_denominator(
                q,
                q_squared,
                key_mean_ptr,
                key_var_ptr,
                head_offset + entry,
                entry < own * ENTRIES,
                peak,
                denominator,
                scale,
                max_variance,
                log2_tokens,
                DIM,
                ORDER,
            )

        log2_sum = peak + tl.log2(denominator)
        if hashed_ptr is not None:
            hashed = tl.load(hashed_ptr + token, mask=token < end, other=0).to(tl.uint32)

        # Second pass: the candidates' scores, which need the denominator to be whole.
        for block in range(low, high, BLOCKS):
            entry = block * ENTRIES + column
            seen = entry < high * ENTRIES
            key_mean = load_rows(key_mean_ptr, head_offset + entry, seen, DIM)
            key_var = key_mean
            if ORDER == 2:
                key_var = load_rows(key_var_ptr, head_offset + entry, seen, DIM)
            logits, kappa = entry_logits(
                q, q_squared, key_mean, key_var, scale, max_variance, log2_tokens, ORDER
            )

            counts = seen[None, :] & live[:, None]
            log2_share = logits - log2_sum[:, None]
            if FANOUT > 0:
                log2_share = tl.minimum(log2_share, LOG2_LARGEST)
            probs = tl.where(counts, tl.exp2(log2_share), 0.0)
            mass = tl.sum(tl.reshape(probs, [QUERIES, HEADS, BLOCKS, ENTRIES]), 3)
            mass = tl.sum(mass, 1)
            candidate_mass += tl.sum(mass, 1)

            value = mass
            if SCORE == "max":
                entries = tl.reshape(
                    tl.where(counts, logits, float("-inf")), [QUERIES * HEADS, BLOCKS, ENTRIES]
                )
                top = tl.max(entries, 2)
                finite = tl.where(top == float("-inf"), 0.0, top)
                total = top + tl.log2(tl.sum(tl.exp2(entries - finite[:, :, None]), 2))
                value = tl.max(tl.reshape(total, [QUERIES, HEADS, BLOCKS]), 1) * LN2
            elif SCORE == "error_gain":
                gain = probs * (1.0 - tl.exp2(tl.minimum(kappa, max_variance) * -LOG2E) + trust)
                value = tl.sum(tl.sum(tl.reshape(gain, [QUERIES, HEADS, BLOCKS, ENTRIES]), 3), 1)
            if SCORE != "max":
                value = tl.log(tl.maximum(value, SMALLEST))

            # The counter starts at the document's first block: packing does not change what is
            # drawn.
            candidate = block + tl.arange(0, BLOCKS)
            if hashed_ptr is not None:
                drawing_head = first_drawing_head + kv_head
                counter = (1 + (candidate - first) * num_drawing_heads + drawing_head).to(tl.uint32)
                value += temperature * _gumbel(hashed[:, None], counter[None, :])

            # Score and block are one integer: the better score first, and the lower block among
            # equals.
            keys = (_sortable(value) << 31) | (-candidate + LAST_BLOCK).to(tl.int64)[None, :]
            keys = tl.where((candidate < high)[None, :], keys, NO_KEY)

            # A row's candidates enter one at a time until none beats its worst; most chunks have
            # none.
            worst = tl.min(best, 1)
            found = tl.max(keys, 1)
            while tl.sum((found > worst).to(tl.int32), 0) > 0:
                taken = (found > worst)[:, None]
                best = tl.where(taken & (best == worst[:, None]), found[:, None], best)
                keys = tl.where(taken & (keys == found[:, None]), NO_KEY, keys)
                worst = tl.min(best, 1)
                found = tl.max(keys, 1)

    # The best leave in falling order; what stands for an empty slot is negative.
    best = tl.where((slot < TOP_K)[None, :], best, NO_KEY)
    to = (kv_head.to(tl.int64) * num_tokens + token) * TOP_K
    for rank in range(TOP_K):
        found = tl.max(best, 1)
        best = tl.where(best == found[:, None], NO_KEY, best)
        tl.store(keys_ptr + to + rank, tl.maximum(found, -1), mask=token < end)
    tl.store(mass_ptr + kv_head.to(tl.int64) * num_tokens + token, candidate_mass, mask=token < end)
