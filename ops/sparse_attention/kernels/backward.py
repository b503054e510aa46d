"""Gradients, without atomics: queries by query tiles; keys, values and entries by parts of their
queries, whose fp32 partial sums a second kernel adds in order. Formulas: README, Backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ops.sparse_attention.kernels.common import (
    LOG2E,
    entry_logits,
    load_rows,
    load_tile,
    log2_denominator,
    tile_rows,
)


@triton.jit
def delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, num_rows, ROWS: tl.constexpr, DIM: tl.constexpr
):
    """Grid (T * H / ROWS). out, dout: [T * H, DIM]; delta = out . dout - dlse: [T * H] fp32."""
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = index < num_rows
    out = load_rows(out_ptr, index, live, DIM).to(tl.float32)
    delta = tl.sum(out * load_rows(dout_ptr, index, live, DIM).to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + index, mask=live, other=0.0)
    tl.store(delta_ptr + index, delta, mask=live)


@triton.jit
def query_grad_step(q, dout, keys, values, seen, denominator, delta, scale, grad):
    """Add sum_j dz k_j of one step's tokens to grad [rows, DIM]."""
    logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
    probs = tl.where(seen, tl.exp2(logits - denominator[:, None]), 0.0)
    dlogits = probs * (tl.dot(dout, tl.trans(values), input_precision="ieee") - delta[:, None])
    return grad + tl.dot(dlogits.to(keys.dtype), keys, input_precision="ieee")


@triton.jit
def query_grad_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_mean_ptr,
    value_mean_ptr,
    key_var_ptr,
    k_box,
    v_box,
    bias_ptr,
    bits_ptr,
    list_ptr,
    words_ptr,
    counts_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    tile_start_ptr,
    tile_end_ptr,
    tile_block_ptr,
    block_start_ptr,
    first_ptr,
    sink_end_ptr,
    local_start_ptr,
    dq_ptr,
    dbias_ptr,
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
    """Grid (tiles, Hk): dq [T, H, DIM] and dbias [T, H] fp32, by the loops of attend_kernel."""
    # The longest rows of a document start first.
    tile = num_tiles - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    start = tl.load(tile_start_ptr + first_tile + tile)
    end = tl.load(tile_end_ptr + first_tile + tile)
    if start >= end:
        return
    own = tl.load(tile_block_ptr + first_tile + tile)
    first = tl.load(first_ptr + own)

    query, index, live = tile_rows(start, end, kv_head, num_kv_heads * GROUP, QUERIES, HEADS, GROUP)
    token = start + query
    list_row = kv_head.to(tl.int64) * num_tiles + tile
    q = load_rows(q_ptr, index, live, DIM)
    dout = load_rows(dout_ptr, index, live, DIM)

    # Probabilities come from lse again, and dz = p (dp - delta).
    denominator = log2_denominator(lse_ptr, index, live)
    delta = tl.load(delta_ptr + index, mask=live, other=0.0)

    column = tl.arange(0, COLUMNS)
    grad = tl.zeros([QUERIES * HEADS, DIM], tl.float32)

    # First phase, the tail, where dz also flows through the variance term and into the bias.
    if COARSE:
        q_squared = q * q
        # of the variance terms, before the factor q
        grad_squared = tl.zeros([QUERIES * HEADS, DIM], tl.float32)
        dbias = tl.zeros([QUERIES * HEADS], tl.float32)
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
            logits, kappa = entry_logits(
                q, q_squared, key_mean, key_var, scale, max_variance, offset[:, None], ORDER
            )

            seen = inside[None, :] & live[:, None]
            if SELECTED:
                word = tl.load(
                    bits_ptr + list_row * num_blocks + entry // ENTRIES, mask=inside, other=0
                )
                seen = seen & (((word[None, :] >> query[:, None]) & 1) == 0)

            probs = tl.where(seen, tl.exp2(logits - denominator[:, None]), 0.0)
            dlogits = probs * (
                tl.dot(dout, tl.trans(values), input_precision="ieee") - delta[:, None]
            )
            grad += tl.dot(dlogits.to(key_mean.dtype), key_mean, input_precision="ieee")

            # Where kappa was cut at max_variance it has no slope.
            if ORDER == 2:
                dkappa = tl.where(kappa < max_variance, dlogits, 0.0)
                grad_squared += tl.dot(dkappa.to(key_var.dtype), key_var, input_precision="ieee")
            if dbias_ptr is not None:
                dbias += tl.sum(dlogits, 1)

        if ORDER == 2:
            # loaded once more, so that it takes no registers in the loop; the policy keeps the two
            # loads from being merged
            again = tl.load(
                q_ptr + index[:, None] * DIM + tl.arange(0, DIM)[None, :],
                mask=live[:, None],
                other=0.0,
                eviction_policy="evict_first",
            )
            grad += scale * again.to(tl.float32) * grad_squared

        if dbias_ptr is not None:
            tl.store(dbias_ptr + index, dbias, mask=live)

    # Second phase, the tokens of selected blocks.
    if SELECTED:
        count = tl.load(counts_ptr + list_row)
        for step in range(count * (BLOCK // COLUMNS)):
            at = list_row * list_size + step // (BLOCK // COLUMNS)
            word = tl.load(words_ptr + at)
            key = tl.load(block_start_ptr + tl.load(list_ptr + at))
            key += (step % (BLOCK // COLUMNS)) * COLUMNS
            keys = load_tile(k_box, k_ptr, key, end, kv_head, num_kv_heads, TMA, COLUMNS, DIM)
            values = load_tile(v_box, v_ptr, key, end, kv_head, num_kv_heads, TMA, COLUMNS, DIM)
            seen = ((((word >> query) & 1) == 1) & live)[:, None]
            grad = query_grad_step(q, dout, keys, values, seen, denominator, delta, scale, grad)

    # Third phase, the first blocks and then the window in one loop.
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
                seen = ((key + column)[None, :] <= token[:, None]) & live[:, None]
                grad = query_grad_step(q, dout, keys, values, seen, denominator, delta, scale, grad)

    # The scale is one factor of all that came through the keys: once, at the end.
    tl.store(
        dq_ptr + index[:, None] * DIM + tl.arange(0, DIM)[None, :],
        (grad * scale).to(dq_ptr.dtype.element_ty),
        mask=live[:, None],
    )


@triton.jit
def key_grad_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    chosen_by_ptr,
    chosen_from_ptr,
    forced_ptr,
    block_start_ptr,
    block_end_ptr,
    part_block_ptr,
    first_part_ptr,
    k_box,
    v_box,
    partial_ptr,
    num_tokens,
    num_blocks,
    num_parts,
    first_head,
    num_kv_heads,
    list_size,
    part_size,
    scale,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):
    """Grid (parts * BLOCK / COLUMNS, heads of this call). Sums over at most part_size queries of
    one block.

    A block's queries are forced[b] ones from its first token on, then chosen_by[head,
    chosen_from[head, b]:...[b + 1]].

    part_block: [Hk, parts] int32, M for unused parts; first_part: [Hk, M + 1]. partial: [heads,
        parts, 2, BLOCK, DIM] fp32, dk without its scale, and dv.
    """
    part = tl.program_id(0) // (BLOCK // COLUMNS)
    first_column = (tl.program_id(0) % (BLOCK // COLUMNS)) * COLUMNS
    kv_head = first_head + tl.program_id(1).to(tl.int64)
    block = tl.load(part_block_ptr + kv_head * num_parts + part)
    if block >= num_blocks:
        return

    # The keys stay in registers; queries pass by. Rows behind the block's end have sums of their
    # own, which nobody reads.
    start = tl.load(block_start_ptr + block)
    end = tl.load(block_end_ptr + block)
    first = start + first_column
    keys = load_tile(k_box, k_ptr, first, end, kv_head, num_kv_heads, TMA, COLUMNS, DIM)
    values = load_tile(v_box, v_ptr, first, end, kv_head, num_kv_heads, TMA, COLUMNS, DIM)
    column = first_column + tl.arange(0, COLUMNS)
    key = start + column
    inside = key < end

    # The part's own share of the block's queries, numbered across both kinds.
    forced = tl.load(forced_ptr + block)
    head_row = kv_head * (num_blocks + 1) + block
    chosen_from = tl.load(chosen_from_ptr + head_row)
    total = forced + tl.load(chosen_from_ptr + head_row + 1) - chosen_from
    begin = (part - tl.load(first_part_ptr + head_row)) * part_size
    total = tl.minimum(total, begin + part_size)

    row = tl.arange(0, QUERIES * HEADS)
    head = row % HEADS
    dk = tl.zeros([COLUMNS, DIM], tl.float32)
    dv = tl.zeros([COLUMNS, DIM], tl.float32)

    for first_query in range(begin, total, QUERIES):
        number = first_query + row // HEADS
        live = (number < total) & (head < GROUP)
        chosen = tl.load(
            chosen_by_ptr + kv_head * list_size + chosen_from + number - forced,
            mask=live & (number >= forced),
            other=0,
        )
        token = tl.where(number < forced, start + number, chosen)
        index = token.to(tl.int64) * (num_kv_heads * GROUP) + kv_head * GROUP + head

        q = load_rows(q_ptr, index, live, DIM)
        dout = load_rows(dout_ptr, index, live, DIM)
        denominator = log2_denominator(lse_ptr, index, live)
        delta = tl.load(delta_ptr + index, mask=live, other=0.0)

        # Only queries that are forced on the block can lie before a key of it: the causal mask is
        # theirs.
        logits = tl.dot(keys, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
        seen = inside[:, None] & live[None, :] & (key[:, None] <= token[None, :])
        probs = tl.where(seen, tl.exp2(logits - denominator[None, :]), 0.0)
        dv += tl.dot(probs.to(dout.dtype), dout, input_precision="ieee")
        dlogits = probs * (tl.dot(values, tl.trans(dout), input_precision="ieee") - delta[None, :])
        dk += tl.dot(dlogits.to(q.dtype), q, input_precision="ieee")

    # Parts of a block add up in a kernel of their own, in order: no atomics.
    first_row = (tl.program_id(1).to(tl.int64) * num_parts + part) * 2 * BLOCK
    to = (first_row + column)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(partial_ptr + to, dk)
    tl.store(partial_ptr + to + BLOCK * DIM, dv)


@triton.jit
def key_grad_sum_kernel(
    partial_ptr,
    first_part_ptr,
    k_ptr,
    key_mean_ptr,
    entry_grad_ptr,
    block_start_ptr,
    block_end_ptr,
    dk_ptr,
    dv_ptr,
    num_blocks,
    num_parts,
    first_head,
    num_kv_heads,
    grad_stride,
    scale,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
    ORDER: tl.constexpr,
    EXACT: tl.constexpr,
    COARSE: tl.constexpr,
):
    """Grid (M * BLOCK / COLUMNS, heads of this call). dk, dv: [T, Hk, DIM]: the parts in order,
    then what reaches the tokens through their entry.

    entry_grad: fp32 of key mean, value mean and variance, [Hk, M * ENTRIES, DIM] each, grad_stride
        apart.
    """
    block = tl.program_id(0) // (BLOCK // COLUMNS)
    column = (tl.program_id(0) % (BLOCK // COLUMNS)) * COLUMNS + tl.arange(0, COLUMNS)
    kv_head = first_head + tl.program_id(1).to(tl.int64)
    start = tl.load(block_start_ptr + block)
    end = tl.load(block_end_ptr + block)
    if start >= end:
        return

    dim = tl.arange(0, DIM)[None, :]
    dk = tl.zeros([COLUMNS, DIM], tl.float32)
    dv = tl.zeros([COLUMNS, DIM], tl.float32)

    # What reached the tokens' own logits.
    if EXACT:
        head_row = kv_head * (num_blocks + 1) + block
        part_stop = tl.load(first_part_ptr + head_row + 1)
        for part in range(tl.load(first_part_ptr + head_row), part_stop):
            at = ((tl.program_id(1).to(tl.int64) * num_parts + part) * 2 * BLOCK + column)[
                :, None
            ] * DIM + dim
            dk += tl.load(partial_ptr + at)
            dv += tl.load(partial_ptr + at + BLOCK * DIM)
        dk *= scale

    # What reached the entry, of which every token is one of TOKENS: through both means, and through
    # the variance, whose derivative by a key is 2 (k - mean) / TOKENS. Incomplete blocks have no
    # entry.
    row = (start + column).to(tl.int64) * num_kv_heads + kv_head
    inside = start + column < end
    if COARSE and end - start == BLOCK:
        entry = (kv_head * num_blocks + block) * ENTRIES + column // TOKENS
        at = entry[:, None] * DIM + dim
        dk += tl.load(entry_grad_ptr + at) / TOKENS
        dv += tl.load(entry_grad_ptr + grad_stride + at) / TOKENS
        if ORDER == 2:
            centred = load_rows(k_ptr, row, inside, DIM).to(tl.float32) - tl.load(
                key_mean_ptr + at
            ).to(tl.float32)
            dk += tl.load(entry_grad_ptr + 2 * grad_stride + at) * centred * (2.0 / TOKENS)

    to = row[:, None] * DIM + dim
    tl.store(dk_ptr + to, dk.to(dk_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(dv_ptr + to, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def entry_grad_kernel(
    q_ptr,
    key_mean_ptr,
    value_mean_ptr,
    key_var_ptr,
    bias_ptr,
    bits_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    tile_start_ptr,
    tile_end_ptr,
    tile_block_ptr,
    first_ptr,
    sink_end_ptr,
    local_start_ptr,
    part_chunk_ptr,
    first_part_ptr,
    chunk_low_ptr,
    chunk_high_ptr,
    partial_ptr,
    num_blocks,
    num_chunks,
    num_parts,
    num_tiles,
    first_tile,
    part_size,
    num_kv_heads,
    scale,
    max_variance,
    log2_tokens,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    ENTRIES: tl.constexpr,
    ORDER: tl.constexpr,
    EXACT: tl.constexpr,
    SELECTED: tl.constexpr,
):
    """Grid (parts, Hk). Sums of a chunk of COLUMNS entries over part_size of the query tiles
    [chunk_low, chunk_high).

    part_chunk: [parts] int32, the number of chunks for unused parts; first_part: [chunks + 1].
        TILE: queries of a tile, QUERIES of one step. partial: [Hk, parts, 3, COLUMNS, DIM] fp32, of
        key mean, value mean and variance without factors.
    """
    part = tl.program_id(0)
    kv_head = tl.program_id(1)
    chunk = tl.load(part_chunk_ptr + part)
    if chunk >= num_chunks:
        return
    tile_low = tl.load(chunk_low_ptr + chunk) + (part - tl.load(first_part_ptr + chunk)) * part_size
    tile_high = tl.minimum(tl.load(chunk_high_ptr + chunk), tile_low + part_size)

    # The entries stay in registers; tiles of queries pass by.
    column = tl.arange(0, COLUMNS)
    entry = chunk * COLUMNS + column
    inside = entry < num_blocks * ENTRIES
    entry_row = kv_head.to(tl.int64) * num_blocks * ENTRIES + entry
    key_mean = load_rows(key_mean_ptr, entry_row, inside, DIM)
    key_var = key_mean
    if ORDER == 2:
        key_var = load_rows(key_var_ptr, entry_row, inside, DIM)
    values = load_rows(value_mean_ptr, entry_row, inside, DIM)

    dmean = tl.zeros([COLUMNS, DIM], tl.float32)
    dvalue = tl.zeros([COLUMNS, DIM], tl.float32)
    dvar = tl.zeros([COLUMNS, DIM], tl.float32)
    for step in range(tile_low * (TILE // QUERIES), tile_high * (TILE // QUERIES)):
        tile = step // (TILE // QUERIES)
        part_of_tile = (step % (TILE // QUERIES)) * QUERIES

        # The range of entries in a tail is the same for all queries of a tile, as they lie in one
        # block.
        own = tl.load(tile_block_ptr + tile)
        low = tl.load(first_ptr + own) * ENTRIES
        high = own * ENTRIES
        if EXACT:
            low = tl.load(sink_end_ptr + own) * ENTRIES
            high = tl.load(local_start_ptr + own) * ENTRIES

        query, index, live = tile_rows(
            tl.load(tile_start_ptr + tile) + part_of_tile,
            tl.load(tile_end_ptr + tile),
            kv_head,
            num_kv_heads * GROUP,
            QUERIES,
            HEADS,
            GROUP,
        )
        q = load_rows(q_ptr, index, live, DIM)
        dout = load_rows(dout_ptr, index, live, DIM)

        denominator = log2_denominator(lse_ptr, index, live)
        delta = tl.load(delta_ptr + index, mask=live, other=0.0)
        offset = tl.full([QUERIES * HEADS], log2_tokens, tl.float32)
        if bias_ptr is not None:
            offset += tl.load(bias_ptr + index, mask=live, other=0.0) * LOG2E

        # Entries are the rows here and queries the columns: entry_logits is symmetric in the two.
        q_squared = q * q
        logits, kappa = entry_logits(
            key_mean, key_var, q, q_squared, scale, max_variance, offset[None, :], ORDER
        )

        seen = ((entry >= low) & (entry < high))[:, None] & live[None, :]
        if SELECTED:
            at = (
                kv_head.to(tl.int64) * num_tiles + tile - first_tile
            ) * num_blocks + entry // ENTRIES
            word = tl.load(bits_ptr + at, mask=inside, other=0)
            seen = seen & (((word[:, None] >> (part_of_tile + query)[None, :]) & 1) == 0)

        probs = tl.where(seen, tl.exp2(logits - denominator[None, :]), 0.0)
        dvalue += tl.dot(probs.to(dout.dtype), dout, input_precision="ieee")
        dlogits = probs * (tl.dot(values, tl.trans(dout), input_precision="ieee") - delta[None, :])
        dmean += tl.dot(dlogits.to(q.dtype), q, input_precision="ieee")

        # Where kappa was cut at max_variance it has no slope.
        if ORDER == 2:
            dkappa = tl.where(kappa < max_variance, dlogits, 0.0)
            dvar += tl.dot(dkappa.to(q.dtype), q_squared, input_precision="ieee")

    to = (
        (kv_head.to(tl.int64) * num_parts + part) * 3 * COLUMNS * DIM
        + column[:, None] * DIM
        + tl.arange(0, DIM)[None, :]
    )
    tl.store(partial_ptr + to, dmean)
    tl.store(partial_ptr + to + COLUMNS * DIM, dvalue)
    if ORDER == 2:
        tl.store(partial_ptr + to + 2 * COLUMNS * DIM, dvar)


@triton.jit
def entry_grad_sum_kernel(
    partial_ptr,
    first_part_ptr,
    entry_grad_ptr,
    num_entries,
    num_parts,
    num_kv_heads,
    scale,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    ORDER: tl.constexpr,
    ADD: tl.constexpr,
):
    """Grid (chunks, Hk, 3 or, for order 0, 2). entry_grad: [3, Hk, entries, DIM] fp32 (+)= the
    parts in order.
    """
    chunk = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    which = tl.program_id(2)
    column = tl.arange(0, COLUMNS)
    element = column[:, None] * DIM + tl.arange(0, DIM)[None, :]

    total = tl.zeros([COLUMNS, DIM], tl.float32)
    part_stop = tl.load(first_part_ptr + chunk + 1)
    for part in range(tl.load(first_part_ptr + chunk), part_stop):
        total += tl.load(
            partial_ptr + ((kv_head * num_parts + part) * 3 + which) * COLUMNS * DIM + element
        )

    # The derivatives of a logit by key mean and variance have factors, scale and scale^2 / 2, that
    # the parts left out.
    factor = tl.where(which == 0, scale, tl.where(which == 1, 1.0, 0.5 * scale * scale))

    entry = chunk * COLUMNS + column
    at = (
        entry_grad_ptr
        + ((which * num_kv_heads + kv_head) * num_entries + chunk * COLUMNS) * DIM
        + element
    )
    inside = (entry < num_entries)[:, None]

    # ADD: an earlier run of tiles left its sums there.
    total *= factor
    if ADD:
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total, mask=inside)
