"""Attention of decoding to rows that are listed for every query: plain torch on any device, or the
kernels.

Shape letters: as in problem.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.gather_attention.problem import Lookup

TILE_VALUES = 2**22
"""Numbers of the keys that are gathered at a time, or one query's."""


@torch.no_grad()
def attend_rows(problem: Lookup, backend: str) -> Tensor:
    """[T, H, d] in the dtype of q; zeros of a query that sees nothing. No gradient, nothing waits
    for the device. backend: as pick_backend gives it.
    """
    if backend == "triton":
        from ops.gather_attention import triton_backend

        return triton_backend.look_up(problem)
    out = torch.empty_like(problem.q)
    kv_heads = [source.k.shape[1] for source in problem.sources]
    by_query = sum(
        source.rows.shape[-1] * number
        for source, number in zip(problem.sources, kv_heads, strict=True)
    )
    size = max(1, TILE_VALUES // max(1, by_query * out.shape[-1]))
    for start in range(0, len(out), size):
        stop = min(start + size, len(out))
        out[start:stop] = _attend_tile(problem, start, stop)
    return out


def _attend_tile(problem: Lookup, start: int, stop: int) -> Tensor:
    """Of the queries [start, stop)."""
    real = torch.promote_types(problem.q.dtype, torch.float32)
    q = problem.q[start:stop].to(real)
    num_queries, num_heads, dim = q.shape
    logits, values = [], []
    for source in problem.sources:
        kv_heads = source.k.shape[1]
        rows = source.rows[:, start:stop]
        keys = _gathered(source.k, rows).to(real)
        values.append(keys if source.v is None else _gathered(source.v, rows).to(real))
        # [T, Hk, G, d] by [T, Hk, d, L]
        by_head = q.view(num_queries, kv_heads, -1, dim)
        found = (by_head @ keys.permute(0, 2, 3, 1)) * dim**-0.5
        nothing = (rows < 0).transpose(0, 1).unsqueeze(2)
        logits.append(found.masked_fill(nothing, -torch.inf))

    # A sink is a logit whose value nobody reads; -inf of all logits would not be a number.
    sizes = [x.shape[-1] for x in logits]
    if problem.sink is not None:
        sink = problem.sink.to(real).view(1, logits[0].shape[1], -1, 1)
        logits.append(sink.expand(num_queries, -1, -1, 1))
    joined = torch.cat(logits, -1)
    probs = joined.softmax(-1).masked_fill((joined == -torch.inf).all(-1, keepdim=True), 0.0)
    out = torch.zeros_like(q)
    first = 0
    for value, number in zip(values, sizes, strict=True):
        share = probs[..., first : first + number]
        out += (share @ value.transpose(1, 2)).flatten(1, 2)
        first += number
    return out


def _gathered(pool: Tensor, rows: Tensor) -> Tensor:
    """[T, L, Hk, d] of pool [N, Hk, d]; where nothing is listed row 0, which is there. rows: [C, T,
    L].
    """
    choices, num_queries, listed = rows.shape
    at, kv_heads = rows.clamp_min(0), pool.shape[1]
    if choices == 1:
        found = pool.index_select(0, at.flatten())
        return found.view(num_queries, listed, kv_heads, -1)
    head = torch.arange(kv_heads, device=at.device, dtype=at.dtype)
    at = at.permute(1, 2, 0) * kv_heads + head
    found = pool.flatten(0, 1).index_select(0, at.flatten())
    return found.view(num_queries, listed, kv_heads, -1)
