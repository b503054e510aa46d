"""Entries of closed windows and their gradients: every number is read once, and written once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _candidates(
    content_ptr,
    gates_ptr,
    bias_ptr,
    first_token,
    there,
    content_stride,
    gates_stride,
    slot,
    channel,
    row_size,
    SIZE: tl.constexpr,
):
    """(values, logits, whether they are there) of a window's tokens, [SLOTS, CHANNELS] fp32 each;
    -inf where there is none. channel: [CHANNELS] of a row of row_size.
    """
    live = (slot < SIZE)[:, None] & (channel < row_size)[None, :] & there
    token = (first_token + slot).to(tl.int64)[:, None]
    at = channel[None, :]
    values = tl.load(content_ptr + token * content_stride + at, mask=live, other=0.0)
    gates = tl.load(gates_ptr + token * gates_stride + at, mask=live, other=float("-inf"))
    bias = tl.load(bias_ptr + slot[:, None] * row_size + at, mask=live, other=0.0)
    return values.to(tl.float32), gates.to(tl.float32) + bias.to(tl.float32), live


@triton.jit
def gated_pool_kernel(
    content_ptr,
    gates_ptr,
    bias_ptr,
    starts_ptr,
    follows_ptr,
    entries_ptr,
    num_windows,
    width,
    content_stride,
    gates_stride,
    OVERLAP: tl.constexpr,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Grid (windows / RUN, width / CHANNELS). content, gates: rows of tokens, of width or (OVERLAP)
    2 width channels; bias: [SIZE, likewise]; starts: [M] int64; follows: [M] int8; entries: [M,
    width].
    """
    slot = tl.arange(0, SLOTS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width
    row_size = width * 2 if OVERLAP else width
    late = tl.where(inside, channel + row_size - width, row_size)
    first = tl.program_id(0) * RUN
    for window in range(first, tl.minimum(first + RUN, num_windows)):
        start = tl.load(starts_ptr + window)
        values, logits, _ = _candidates(
            content_ptr,
            gates_ptr,
            bias_ptr,
            start,
            start >= 0,
            content_stride,
            gates_stride,
            slot,
            late,
            row_size,
            SIZE,
        )
        peak = tl.max(logits, 0)
        if OVERLAP:
            # The window before gives its first channels, where it is of the same document.
            early_values, early_logits, _ = _candidates(
                content_ptr,
                gates_ptr,
                bias_ptr,
                start - SIZE,
                tl.load(follows_ptr + window) > 0,
                content_stride,
                gates_stride,
                slot,
                tl.where(inside, channel, row_size),
                row_size,
                SIZE,
            )
            peak = tl.maximum(peak, tl.max(early_logits, 0))
        weights = tl.exp(logits - peak[None, :])
        mass = tl.sum(weights, 0)
        total = tl.sum(weights * values, 0)
        if OVERLAP:
            weights = tl.exp(early_logits - peak[None, :])
            mass += tl.sum(weights, 0)
            total += tl.sum(weights * early_values, 0)
        tl.store(
            entries_ptr + (tl.zeros([CHANNELS], tl.int64) + window) * width + channel,
            (total / mass).to(entries_ptr.dtype.element_ty),
            mask=inside,
        )


@triton.jit
def _store_grads(
    dcontent_ptr,
    dgates_ptr,
    first_token,
    slot,
    channel,
    row_size,
    live,
    dcontent,
    dgates,
):
    to = (first_token + slot).to(tl.int64)[:, None] * row_size + channel[None, :]
    tl.store(dcontent_ptr + to, dcontent.to(dcontent_ptr.dtype.element_ty), mask=live)
    tl.store(dgates_ptr + to, dgates.to(dgates_ptr.dtype.element_ty), mask=live)


@triton.jit
def gated_pool_grad_kernel(
    content_ptr,
    gates_ptr,
    bias_ptr,
    starts_ptr,
    follows_ptr,
    dentries_ptr,
    dcontent_ptr,
    dgates_ptr,
    dbias_ptr,
    num_windows,
    width,
    content_stride,
    gates_stride,
    OVERLAP: tl.constexpr,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Grid as gated_pool_kernel. dcontent, dgates: [T, row], contiguous, written where an entry has
    a share (unpooled_kernel writes the rest); dbias: [programs of the first axis, SIZE, row] fp32,
    sums over their windows.
    """
    slot = tl.arange(0, SLOTS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width
    row_size = width * 2 if OVERLAP else width
    early = tl.where(inside, channel, row_size)
    late = tl.where(inside, channel + row_size - width, row_size)
    first = tl.program_id(0) * RUN
    late_sum = tl.zeros([SLOTS, CHANNELS], tl.float32)
    early_sum = late_sum
    for window in range(first, tl.minimum(first + RUN, num_windows)):
        start = tl.load(starts_ptr + window)
        grad = tl.load(
            dentries_ptr + (tl.zeros([CHANNELS], tl.int64) + window) * width + channel,
            mask=inside,
            other=0.0,
        ).to(tl.float32)
        values, logits, live = _candidates(
            content_ptr,
            gates_ptr,
            bias_ptr,
            start,
            start >= 0,
            content_stride,
            gates_stride,
            slot,
            late,
            row_size,
            SIZE,
        )
        peak = tl.max(logits, 0)
        if OVERLAP:
            early_values, early_logits, early_live = _candidates(
                content_ptr,
                gates_ptr,
                bias_ptr,
                start - SIZE,
                tl.load(follows_ptr + window) > 0,
                content_stride,
                gates_stride,
                slot,
                early,
                row_size,
                SIZE,
            )
            peak = tl.maximum(peak, tl.max(early_logits, 0))
        weights = tl.exp(logits - peak[None, :])
        mass = tl.sum(weights, 0)
        total = tl.sum(weights * values, 0)
        if OVERLAP:
            early_weights = tl.exp(early_logits - peak[None, :])
            mass += tl.sum(early_weights, 0)
            total += tl.sum(early_weights * early_values, 0)

        # dc = a de, dz = a (c - e) de
        share = tl.where(inside, grad / mass, 0.0)
        entry = total / mass
        into = weights * share[None, :]
        dgates = into * (values - entry[None, :])
        late_sum += tl.where(live, dgates, 0.0)
        _store_grads(dcontent_ptr, dgates_ptr, start, slot, late, row_size, live, into, dgates)
        if OVERLAP:
            into = early_weights * share[None, :]
            dgates = into * (early_values - entry[None, :])
            early_sum += tl.where(early_live, dgates, 0.0)
            _store_grads(
                dcontent_ptr,
                dgates_ptr,
                start - SIZE,
                slot,
                early,
                row_size,
                early_live,
                into,
                dgates,
            )

    to = (tl.program_id(0).to(tl.int64) * SIZE + slot)[:, None] * row_size
    mask = (slot < SIZE)[:, None] & inside[None, :]
    tl.store(dbias_ptr + to + late[None, :], late_sum, mask=mask)
    if OVERLAP:
        tl.store(dbias_ptr + to + early[None, :], early_sum, mask=mask)


@triton.jit
def unpooled_kernel(
    starts_ptr,
    follows_ptr,
    dcontent_ptr,
    dgates_ptr,
    num_tokens,
    num_windows,
    width,
    OVERLAP: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid (M + 1,): zeros for tokens between one window and the next, which are in none, and for
    the first channels of a window that none follows.
    """
    window = tl.program_id(0)
    before = tl.load(starts_ptr + window - 1, mask=window > 0, other=0)
    closed = tl.where(window > 0, before + SIZE, 0)
    end = tl.load(starts_ptr + window, mask=window < num_windows, other=0)
    end = tl.where(window < num_windows, end, num_tokens)
    follows = tl.load(follows_ptr + window, mask=window < num_windows, other=0)
    row_size = width * 2 if OVERLAP else width
    nothing = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for first in range(tl.where(follows > 0, end, before), end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        for low in range(0, row_size, CHANNELS):
            channel = low + tl.arange(0, CHANNELS)
            live = (token < end)[:, None] & (channel < row_size)[None, :]
            if OVERLAP:
                live = live & ((token >= closed)[:, None] | (channel < width)[None, :])
            else:
                live = live & (token >= closed)[:, None]
            to = token.to(tl.int64)[:, None] * row_size + channel[None, :]
            tl.store(dcontent_ptr + to, nothing.to(dcontent_ptr.dtype.element_ty), mask=live)
            tl.store(dgates_ptr + to, nothing.to(dgates_ptr.dtype.element_ty), mask=live)
