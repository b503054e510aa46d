"""Coarse entries of every block, under equal weights and under learned ones, and the gradients of
the latter. What is read of a token is read once, and what is written is written once.

Weights that are equal are 1 / TOKENS, a power of two, by which every product is exact: the two
kernels add up the same numbers in tiles of the same shape, and so give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _places(token, head, num_heads, channel, DIM: tl.constexpr):
    """Of [TOKENS, CHANNELS] in [T, num_heads, DIM]."""
    return (token.to(tl.int64) * num_heads + head)[:, None] * DIM + channel[None, :]


@triton.jit
def _mean(tokens, weights):
    """[CHANNELS] of tokens [TOKENS, CHANNELS]."""
    return tl.sum(weights * tokens, 0)


@triton.jit
def _variance(apart, weights):
    """[CHANNELS] of distances from the mean [TOKENS, CHANNELS]; squares are rounded before they are
    weighed, in either kernel.
    """
    return tl.sum(weights * (apart * apart), 0)


@triton.jit
def _weights(logits):
    """Softmax over tokens [TOKENS, CHANNELS]; exact where logits are equal."""
    found = tl.exp(logits - tl.max(logits, 0)[None, :])
    mass = tl.sum(found, 0)
    return found * tl.div_rn(tl.full(mass.shape, 1.0, tl.float32), mass)[None, :]


@triton.jit
def pool_kernel(
    k_ptr,
    v_ptr,
    block_start_ptr,
    block_end_ptr,
    key_mean_ptr,
    value_mean_ptr,
    key_var_ptr,
    num_blocks,
    num_kv_heads,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid (M, Hk, DIM / CHANNELS). k, v: [T, Hk, DIM]; entries: [Hk, M * ENTRIES, DIM], finite for
    incomplete blocks too.
    """
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    start = tl.load(block_start_ptr + block)
    end = tl.load(block_end_ptr + block)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    for entry in range(ENTRIES):
        token = start + entry * TOKENS + tl.arange(0, TOKENS)
        live = (token < end)[:, None]
        at = _places(token, kv_head, num_kv_heads, channel, DIM)
        keys = tl.load(k_ptr + at, mask=live, other=0.0).to(tl.float32)
        values = tl.load(v_ptr + at, mask=live, other=0.0).to(tl.float32)
        mean = _mean(keys, 1.0 / TOKENS)
        var = _variance(keys - mean[None, :], 1.0 / TOKENS)
        value_mean = _mean(values, 1.0 / TOKENS)
        to = ((kv_head.to(tl.int64) * num_blocks + block) * ENTRIES + entry) * DIM + channel
        tl.store(key_mean_ptr + to, mean.to(key_mean_ptr.dtype.element_ty))
        tl.store(key_var_ptr + to, var.to(key_var_ptr.dtype.element_ty))
        tl.store(value_mean_ptr + to, value_mean.to(value_mean_ptr.dtype.element_ty))


@triton.jit
def weigh_kernel(
    k_ptr,
    v_ptr,
    logits_ptr,
    block_start_ptr,
    block_end_ptr,
    key_mean_ptr,
    value_mean_ptr,
    key_var_ptr,
    num_blocks,
    num_kv_heads,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid (M * ENTRIES, Hk, DIM / CHANNELS). logits: [T, Hk, 2, DIM], of which those of incomplete
    blocks are not read; the rest as in pool_kernel.
    """
    entry = tl.program_id(0)
    block = entry // ENTRIES
    kv_head = tl.program_id(1)
    start = tl.load(block_start_ptr + block)
    end = tl.load(block_end_ptr + block)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    token = start + entry % ENTRIES * TOKENS + tl.arange(0, TOKENS)
    live = (token < end)[:, None]
    complete = live & (end - start == ENTRIES * TOKENS)

    at = _places(token, kv_head, num_kv_heads, channel, DIM)
    of_key = _places(token, 2 * kv_head, 2 * num_kv_heads, channel, DIM)
    keys = tl.load(k_ptr + at, mask=live, other=0.0).to(tl.float32)
    key_logits = tl.load(logits_ptr + of_key, mask=complete, other=0.0).to(tl.float32)

    weights = _weights(key_logits)
    key_mean = _mean(keys, weights)
    var = _variance(keys - key_mean[None, :], weights)
    values = tl.load(v_ptr + at, mask=live, other=0.0).to(tl.float32)
    value_logits = tl.load(logits_ptr + of_key + DIM, mask=complete, other=0.0).to(tl.float32)
    value_mean = _mean(values, _weights(value_logits))

    to = (kv_head.to(tl.int64) * num_blocks * ENTRIES + entry) * DIM + channel
    tl.store(key_mean_ptr + to, key_mean.to(key_mean_ptr.dtype.element_ty))
    tl.store(key_var_ptr + to, var.to(key_var_ptr.dtype.element_ty))
    tl.store(value_mean_ptr + to, value_mean.to(value_mean_ptr.dtype.element_ty))


@triton.jit
def weigh_grad_kernel(
    k_ptr,
    v_ptr,
    logits_ptr,
    block_start_ptr,
    block_end_ptr,
    dkey_mean_ptr,
    dvalue_mean_ptr,
    dkey_var_ptr,
    dk_ptr,
    dv_ptr,
    dlogits_ptr,
    num_blocks,
    num_kv_heads,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid as weigh_kernel. Gradients of entries [Hk, M * ENTRIES, DIM] -> those of k, v [T, Hk,
    DIM] and of logits [T, Hk, 2, DIM], zeros for tokens of incomplete blocks.
    """
    entry = tl.program_id(0)
    block = entry // ENTRIES
    kv_head = tl.program_id(1)
    start = tl.load(block_start_ptr + block)
    end = tl.load(block_end_ptr + block)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    token = start + entry % ENTRIES * TOKENS + tl.arange(0, TOKENS)
    live = (token < end)[:, None]
    whole = end - start == ENTRIES * TOKENS
    complete = live & whole

    at = _places(token, kv_head, num_kv_heads, channel, DIM)
    of_key = _places(token, 2 * kv_head, 2 * num_kv_heads, channel, DIM)
    keys = tl.load(k_ptr + at, mask=complete, other=0.0).to(tl.float32)
    key_logits = tl.load(logits_ptr + of_key, mask=complete, other=0.0).to(tl.float32)
    into = (kv_head.to(tl.int64) * num_blocks * ENTRIES + entry) * DIM + channel
    dmean = tl.load(dkey_mean_ptr + into, mask=whole, other=0.0).to(tl.float32)
    dvar = tl.load(dkey_var_ptr + into, mask=whole, other=0.0).to(tl.float32)

    # dk = a (dmean + 2 (k - mean) dvar), dlogits = a ((k - mean) dmean + ((k - mean)^2 - var) dvar)
    weights = _weights(key_logits)
    apart = keys - _mean(keys, weights)[None, :]
    var = _variance(apart, weights)
    dkeys = weights * (dmean[None, :] + 2.0 * apart * dvar[None, :])
    dlogits = weights * (apart * (dmean[None, :] + apart * dvar[None, :]) - (var * dvar)[None, :])
    tl.store(dk_ptr + at, dkeys.to(dk_ptr.dtype.element_ty), mask=live)
    tl.store(dlogits_ptr + of_key, dlogits.to(dlogits_ptr.dtype.element_ty), mask=live)

    values = tl.load(v_ptr + at, mask=complete, other=0.0).to(tl.float32)
    value_logits = tl.load(logits_ptr + of_key + DIM, mask=complete, other=0.0).to(tl.float32)
    dmean = tl.load(dvalue_mean_ptr + into, mask=whole, other=0.0).to(tl.float32)
    weights = _weights(value_logits)
    dvalues = weights * dmean[None, :]
    dlogits = dvalues * (values - _mean(values, weights)[None, :])
    tl.store(dv_ptr + at, dvalues.to(dv_ptr.dtype.element_ty), mask=live)
    tl.store(dlogits_ptr + of_key + DIM, dlogits.to(dlogits_ptr.dtype.element_ty), mask=live)
