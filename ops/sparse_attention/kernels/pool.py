"""Coarse entries of every block: means of keys and values, elementwise variance of keys."""

from __future__ import annotations

import triton
import triton.language as tl


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
):
    """Grid (M, Hk). k, v: [T, Hk, DIM]; entries: [Hk, M * ENTRIES, DIM], finite for incomplete
    blocks too.
    """
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    start = tl.load(block_start_ptr + block)
    end = tl.load(block_end_ptr + block)
    dim = tl.arange(0, DIM)
    for entry in range(ENTRIES):
        token = start + entry * TOKENS + tl.arange(0, TOKENS)
        live = (token < end)[:, None]
        at = (token.to(tl.int64) * num_kv_heads + kv_head)[:, None] * DIM + dim[None, :]
        keys = tl.load(k_ptr + at, mask=live, other=0.0).to(tl.float32)
        mean = tl.sum(keys, 0) / TOKENS
        centred = keys - mean[None, :]
        var = tl.sum(centred * centred, 0) / TOKENS
        value_mean = tl.sum(tl.load(v_ptr + at, mask=live, other=0.0).to(tl.float32), 0) / TOKENS
        to = ((kv_head.to(tl.int64) * num_blocks + block) * ENTRIES + entry) * DIM + dim
        tl.store(key_mean_ptr + to, mean.to(key_mean_ptr.dtype.element_ty))
        tl.store(key_var_ptr + to, var.to(key_var_ptr.dtype.element_ty))
        tl.store(value_mean_ptr + to, value_mean.to(value_mean_ptr.dtype.element_ty))
