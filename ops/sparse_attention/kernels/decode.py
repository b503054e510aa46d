"""One query per document against its cache, cut into many small programs: scores of the entries,
attention of each exact block and of each run of entries, and the combination of these parts in
order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ops.sparse_attention.kernels.common import LN2, LOG2E, entry_logits, load_rows, softmax_step


@triton.jit
def decode_score_kernel(
    q_ptr,
    key_mean_ptr,
    key_var_ptr,
    logits_ptr,
    kappa_ptr,
    num_entries,
    num_kv_heads,
    row_stride,
    head_stride,
    scale,
    max_variance,
    log_tokens,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Grid (chunks of entries, Hk, N). q: [N, H, DIM]; entries: [N, Hk, ..., DIM] of the given
    strides; logits (natural, without bias) and kappa: [N, H, num_entries] fp32.
    """
    entry = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    head = tl.arange(0, HEADS)
    index = row * (num_kv_heads * GROUP) + kv_head * GROUP + head
    live = head < GROUP
    inside = entry < num_entries

    q = load_rows(q_ptr, index, live, DIM)
    base = row * row_stride + kv_head.to(tl.int64) * head_stride
    key_mean = load_rows(key_mean_ptr + base, entry, inside, DIM)
    key_var = key_mean
    if ORDER == 2:
        key_var = load_rows(key_var_ptr + base, entry, inside, DIM)

    logits, kappa = entry_logits(
        q, q * q, key_mean, key_var, scale, max_variance, log_tokens * LOG2E, ORDER
    )

    # Natural logarithms, as ranking.choose_blocks takes them.
    at = index[:, None] * num_entries + entry[None, :]
    mask = live[:, None] & inside[None, :]
    tl.store(logits_ptr + at, logits * LN2, mask=mask)
    if kappa_ptr is not None:
        tl.store(kappa_ptr + at, tl.minimum(kappa, max_variance), mask=mask)


@triton.jit
def decode_attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    value_mean_ptr,
    logits_ptr,
    bias_ptr,
    exact_ptr,
    excluded_ptr,
    peak_ptr,
    mass_ptr,
    acc_ptr,
    length,
    num_exact,
    num_parts,
    num_blocks,
    num_entries,
    tail_low,
    tail_high,
    run_size,
    num_kv_heads,
    key_row_stride,
    key_token_stride,
    key_head_stride,
    entry_row_stride,
    entry_head_stride,
    scale,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Grid (parts, Hk, N). Part p < num_exact: block exact[n, head, p] of [N, Hk, num_exact] int32,
    -1 for none. The others have the entries [tail_low, tail_high) in runs of run_size, RUN at a
    time, but for those of excluded [N, Hk, blocks] int8.

    peak, mass: [N, H, parts] fp32 and acc: [N, H, parts, DIM] fp32, an unnormalised softmax (log2)
        of each part.
    """
    part = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    head = tl.arange(0, HEADS)
    index = row * (num_kv_heads * GROUP) + kv_head * GROUP + head
    live = head < GROUP

    peak = tl.full([HEADS], float("-inf"), tl.float32)
    mass = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, DIM], tl.float32)
    pair = row * num_kv_heads + kv_head

    # One exact block, token by token; the cache is read where it lies, by its strides.
    if part < num_exact:
        block = tl.load(exact_ptr + pair * num_exact + part)
        if block >= 0:
            q = load_rows(q_ptr, index, live, DIM)
            base = row * key_row_stride + kv_head.to(tl.int64) * key_head_stride
            dim = tl.arange(0, DIM)[None, :]
            for begin in range(0, BLOCK, COLUMNS):
                key = block * BLOCK + begin + tl.arange(0, COLUMNS)
                inside = key < length
                at = base + key.to(tl.int64)[:, None] * key_token_stride + dim
                keys = tl.load(k_ptr + at, mask=inside[:, None], other=0.0)
                values = tl.load(v_ptr + at, mask=inside[:, None], other=0.0)
                logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
                seen = inside[None, :] & live[:, None]
                peak, mass, acc = softmax_step(
                    tl.where(seen, logits, float("-inf")), values, peak, mass, acc
                )
    elif logits_ptr is not None:  # None: no entries, so no parts of this kind
        low = tail_low + (part - num_exact) * run_size
        high = tl.minimum(tail_high, low + run_size)

        # A run of entries, whose logits are there already: the kernel that scored them wrote them
        # for the choice.
        offset = tl.zeros([HEADS], tl.float32)
        if bias_ptr is not None:
            offset += tl.load(bias_ptr + index, mask=live, other=0.0)

        base = row * entry_row_stride + kv_head.to(tl.int64) * entry_head_stride
        for begin in range(low, high, RUN):
            entry = begin + tl.arange(0, RUN)
            inside = entry < high

            excluded = tl.load(
                excluded_ptr + pair * num_blocks + entry // ENTRIES, mask=inside, other=1
            )
            seen = (excluded == 0)[None, :] & live[:, None]
            logits = tl.load(
                logits_ptr + index[:, None] * num_entries + entry[None, :],
                mask=seen,
                other=float("-inf"),
            )
            values = load_rows(value_mean_ptr + base, entry, inside, DIM)
            peak, mass, acc = softmax_step(
                (logits + offset[:, None]) * LOG2E, values, peak, mass, acc
            )

    # A part without any entry stores a peak of -inf, to which the combination gives no weight.
    to = index * num_parts + part
    tl.store(peak_ptr + to, peak, mask=live)
    tl.store(mass_ptr + to, mass, mask=live)
    tl.store(acc_ptr + to[:, None] * DIM + tl.arange(0, DIM)[None, :], acc, mask=live[:, None])


@triton.jit
def decode_combine_kernel(
    peak_ptr, mass_ptr, acc_ptr, sink_ptr, out_ptr, lse_ptr, num_parts, num_heads, DIM: tl.constexpr
):
    """Grid (N * H). out: [N, H, DIM]; lse: [N, H] fp32."""
    index = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, DIM)
    peak = tl.full((), float("-inf"), tl.float32)
    if sink_ptr is not None:
        peak = tl.load(sink_ptr + index % num_heads) * LOG2E
    for part in range(num_parts):
        peak = tl.maximum(peak, tl.load(peak_ptr + index * num_parts + part))
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.zeros((), tl.float32)
    if sink_ptr is not None:
        mass = tl.exp2(tl.load(sink_ptr + index % num_heads) * LOG2E - finite)
    acc = tl.zeros([DIM], tl.float32)
    for part in range(num_parts):
        at = index * num_parts + part
        weight = tl.exp2(tl.load(peak_ptr + at) - finite)
        mass += weight * tl.load(mass_ptr + at)
        acc += weight * tl.load(acc_ptr + at * DIM + dim)
    acc = tl.where(mass > 0.0, acc / mass, 0.0)
    tl.store(out_ptr + index * DIM + dim, acc.to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + index, (peak + tl.log2(mass)) * LN2)
