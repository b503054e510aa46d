"""The op in decoding: new tokens of several rows against what a cache holds of their documents.

The index reads a key of each token, and attention the chosen tokens alone.

Shape letters: as in tile.py; S new tokens of a row, L tokens that one of them may choose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ops.gather_attention import Lookup, Source, attend_rows, pick_backend
from ops.index_attention.spec import IndexSpec
from ops.index_attention.tile import (
    attend,
    block_scores,
    blocks_mask,
    choose,
    real_dtype,
    tokens_mask,
)

HELD_VALUES = 2**25
"""Numbers of a run's largest tensors, or of those of one token of each row."""


@torch.no_grad()
def attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_queries: Tensor,
    index_keys: Tensor,
    index_weights: Tensor | None,
    position: Tensor,
    spec: IndexSpec,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """What indexed_attention gives for these tokens, up to rounding. No gradient, and nothing waits
    for the device.

    Args:
        q: [b, S, H, d]; k, v: [b, N, Hk, d], the rows' own tokens among them, and after their last
            one anything finite. index_queries: [b, S, I, w]; index_keys: [b, N, w], with rule=qsa
            [b, N // block_size, w]; index_weights: [b, S, I] with rule=dsa.
        position: [b, S] int64 of the new tokens in their documents.
        rows: [b, N] int64: where those tokens are in pools that all rows share, k and v [pool, Hk,
            d], index_keys [pool, w] but with rule=qsa; None: there are no pools.
        backend: as indexed_attention takes it.

    Returns:
        [b, S, H, d] in the dtype of q.
    """
    new, num_heads, dim = q.shape[1:]
    heads, width = index_queries.shape[2:]
    picked = pick_backend(backend, q.device, q.dtype, dim, spec.block_size, width)
    if picked == "triton":
        index_keys = index_keys.to(index_queries.dtype)
    elif rows is not None and not spec.pools_keys:
        index_keys = read_rows(index_keys, rows)
    num_tokens = k.shape[1] if rows is None else rows.shape[1]

    # A mask reads every token once for all new ones, a list reads its own for each.
    listed = min(spec.top_k * spec.block_size, num_tokens) + spec.pools_keys * (spec.block_size - 1)
    gathers = picked == "triton" or new * listed < num_tokens
    if rows is not None and not gathers:
        k, v, rows = read_rows(k, rows), read_rows(v, rows), None
    numbers = num_tokens * (1 if picked == "triton" else 2 * heads)
    numbers += 2 * listed * (k.shape[-2] if spec.by_head else 1)
    if not gathers:
        numbers += num_heads * num_tokens
    size = max(1, HELD_VALUES // max(1, len(q) * numbers))

    out = torch.empty_like(q)
    for start in range(0, new, size):
        at = slice(start, start + size)
        weights = None if index_weights is None else index_weights[:, at]
        of_keys = None if spec.pools_keys else rows
        scores = held_scores(
            index_queries[:, at], index_keys, weights, position[:, at], spec, of_keys, picked
        )
        how = chooser(picked)(scores, position[:, at], spec), position[:, at], spec
        if gathers:
            out[:, at] = _attend_listed(q[:, at], k, v, *how, rows, picked)
        else:
            out[:, at] = _attend_masked(q[:, at], k, v, *how)
    return out


def held_scores(
    queries: Tensor,
    keys: Tensor,
    weights: Tensor | None,
    position: Tensor,
    spec: IndexSpec,
    rows: Tensor | None,
    backend: str,
) -> Tensor:
    """[b, C, S, M] as block_scores gives them. keys: [b, n, w], or for kernels [pool, w] with rows
    [b, n].
    """
    if backend == "triton":
        from ops.index_attention import triton_backend

        if rows is None:
            keys, rows = as_pool(keys)
        return triton_backend.held_scores(queries, keys, weights, rows, position, spec)
    real = real_dtype(queries.dtype)
    of_heads = None if weights is None else weights.to(real)
    return block_scores(queries.to(real), keys.to(real), of_heads, position, spec)


def chooser(backend: str) -> Callable[[Tensor, Tensor, IndexSpec], Tensor]:
    """Who takes the best of scores: `choose` of plain torch, or of the kernels."""
    if backend == "triton":
        from ops.index_attention import triton_backend

        return triton_backend.choose
    return choose


def as_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """(pool [n, ...], rows [b, N] int64) of x [b, N, ...], whose rows may have been cut out of
    longer ones: nothing is copied then.
    """
    batch, number = x.shape[:2]
    inner = x[:1, :1].numel()
    if inner == 0 or x.stride(0) % inner or (number and not x[0].is_contiguous()):
        x = x.contiguous()
    step = number if batch == 1 else x.stride(0) // max(1, inner)
    size = (batch - 1) * step + number
    pool = x.as_strided((size, *x.shape[2:]), x.stride()[1:])
    first = step * torch.arange(batch, device=x.device).unsqueeze(1)
    return pool, first + torch.arange(number, device=x.device)


def read_rows(pool: Tensor, rows: Tensor) -> Tensor:
    """[b, N, ...] of pool [n, ...]; rows: [b, N] int64."""
    return pool.index_select(0, rows.flatten()).view(*rows.shape, *pool.shape[1:])


def rows_of(places: Tensor, rows: Tensor) -> Tensor:
    """Where places [b, ...] of rows' documents are in a pool, int32, -1 of negative ones. rows: [b,
    N] int64.
    """
    at = rows.gather(1, places.clamp(0, max(0, rows.shape[1] - 1)).flatten(1)).view_as(places)
    return torch.where(places < 0, -1, at).to(torch.int32)


def _attend_masked(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, position: Tensor, spec: IndexSpec
) -> Tensor:
    """Against all of k, v [b, N, Hk, d]."""
    real, groups = real_dtype(q.dtype), q.shape[2] // k.shape[2]
    number = k.shape[1] // spec.block_size
    if not spec.pools_keys:
        number = -(-k.shape[1] // spec.block_size)
    seen = tokens_mask(blocks_mask(chosen, number), position, k.shape[1], spec)
    out = attend(q.to(real).unflatten(2, (-1, groups)), k.to(real), v.to(real), seen).out
    return out.flatten(2, 3).to(q.dtype)


def _attend_listed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    position: Tensor,
    spec: IndexSpec,
    rows: Tensor | None,
    backend: str,
) -> Tensor:
    """Of k, v [b, N, Hk, d], or of pools with rows, the tokens that are attended to alone."""
    if rows is None:
        (k, rows), v = as_pool(k), as_pool(v)[0]
    listed = rows_of(_tokens_of(chosen, position, spec), rows).transpose(0, 1)
    source = Source(k, v, listed.flatten(1, 2).contiguous())
    found = attend_rows(Lookup(q.flatten(0, 1).contiguous(), (source,)), backend)
    return found.view(q.shape)


def _tokens_of(chosen: Tensor, position: Tensor, spec: IndexSpec) -> Tensor:
    """[b, C, S, L] int64, the tokens of a document that are attended to, -1 for none. chosen: [b,
    C, S, K]; position: [b, S].
    """
    slot = torch.arange(spec.block_size, device=chosen.device)
    tokens = chosen.long().unsqueeze(-1) * spec.block_size + slot
    own = position[:, None, :, None]
    # a query's own block may have been chosen, and reaches beyond it
    tokens = torch.where(chosen.unsqueeze(-1) < 0, -1, tokens).flatten(3)
    if spec.pools_keys:
        complete = (own + 1) // spec.block_size * spec.block_size
        tokens = torch.cat((tokens, complete + slot[:-1]), -1)
    return tokens.masked_fill(tokens > own, -1)
