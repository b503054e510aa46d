"""What one tile of queries computes: which entries it sees, and one softmax over window, entries
and sink. Batched, so that training (a document at a time) and decoding (a row each) are one
definition.

Shape letters: b rows, Q queries, H heads, c channels of a head, N tokens, E entries, I index heads,
w their width. A key is its value, and the same for all heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.compressed_attention.spec import CompressedSpec
from ops.gather_attention import Lookup, Source, attend_rows, pick_backend
from ops.index_attention.cached import (
    HELD_VALUES,
    as_pool,
    chooser,
    held_scores,
    read_rows,
    rows_of,
)
from ops.index_attention.spec import IndexSpec
from ops.index_attention.tile import blocks_mask, choose, real_dtype

NEVER = float("-inf")


def window_mask(position: Tensor, kv_position: Tensor, window: int) -> Tensor:
    """[b, Q, N] bool. position [b, Q], kv_position [b, N]: int64 in their documents, of keys that
    are not there negative.
    """
    query, key = position.unsqueeze(-1), kv_position.unsqueeze(-2)
    return (key <= query) & (key > query - window) & (key >= 0)


def entries_mask(position: Tensor, num_entries: int, ratio: int) -> Tensor:
    """[b, Q, E] bool: entries that are closed at the query."""
    entry = torch.arange(num_entries, device=position.device)
    return entry < ((position + 1) // ratio).unsqueeze(-1)


def choose_entries(
    scores: Tensor,
    position: Tensor,
    spec: CompressedSpec,
    choose: Callable[[Tensor, Tensor, IndexSpec], Tensor] = choose,
) -> Tensor:
    """The best entries of every query, [b, Q, K] in the dtype and order of `choose`, -1 where there
    are no more; equal scores go to the lower entry. scores: [b, 1, Q, E], -inf of what is not
    closed.

    With spec.top_k_blocks they are the best of those that are in the best blocks, where a block
    counts as its best entry does and equal ones go to the lower block. choose: of
    ops/index_attention, by plain torch or by kernels.
    """
    if spec.top_k_blocks is not None:
        size = spec.index_block_size
        missing = -scores.shape[-1] % size
        blocks = F.pad(scores.detach(), (0, missing), value=NEVER).unflatten(-1, (-1, size))
        opening = IndexSpec("qsa", spec.ratio * size, spec.top_k_blocks)
        opened = choose(blocks.max(-1).values, position, opening)
        inside = blocks_mask(opened, blocks.shape[-2]).repeat_interleave(size, -1)
        scores = scores.masked_fill(~inside[..., : scores.shape[-1]], NEVER)
    return choose(scores, position, spec.ranking)[:, 0]


class Attended(NamedTuple):
    """Of one tile."""

    out: Tensor
    """[b, Q, H, c]."""
    probs: Tensor
    """[b, H, Q, N + E]; what they lack to 1 is the sink's."""
    lse: Tensor
    """[b, H, Q], logarithm of the softmax's denominator, the sink's part included."""


def attend(q: Tensor, columns: Tensor, seen: Tensor, sinks: Tensor) -> Attended:
    """q [b, Q, H, c], columns [b, N + E, c], seen [b, Q, N + E] bool, sinks [H]; of one dtype."""
    logits = masked_logits(q, columns, seen)
    lse = torch.logaddexp(logits.logsumexp(-1), sinks.view(1, -1, 1))
    probs = (logits - lse.unsqueeze(-1)).exp()
    return Attended(torch.einsum("bhqn,bnc->bqhc", probs, columns), probs, lse)


def masked_logits(q: Tensor, columns: Tensor, seen: Tensor) -> Tensor:
    """[b, H, Q, N + E], -inf of what is not seen."""
    logits: Tensor = torch.einsum("bqhc,bnc->bhqn", q, columns) * q.shape[-1] ** -0.5
    return logits.masked_fill(~seen.unsqueeze(1), NEVER)


@torch.no_grad()
def choose_held(
    queries: Tensor,
    keys: Tensor,
    weights: Tensor,
    position: Tensor,
    spec: CompressedSpec,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Entries for new tokens of several rows, [b, S, K] as attend_held takes them.

    Args:
        queries: [b, S, I, w]; weights: [b, S, I]; position: [b, S] int64.
        keys: [b, E, w], after those of the closed entries anything finite; with rows [b, E] int64
            they are in a pool [n, w].
        backend: as compressed_attention takes it.
    """
    width = queries.shape[-1]
    picked = pick_backend(backend, queries.device, queries.dtype, None, 1, width)
    if picked == "triton":
        keys = keys.to(queries.dtype)
    elif rows is not None:
        keys, rows = read_rows(keys, rows), None
    number = keys.shape[1] if rows is None else rows.shape[1]
    by_query = number * (2 if picked == "triton" else 2 * queries.shape[2])
    size = max(1, HELD_VALUES // max(1, len(queries) * by_query))
    found = []
    for start in range(0, queries.shape[1], size):
        at = slice(start, start + size)
        scores = held_scores(
            queries[:, at], keys, weights[:, at], position[:, at], spec.ranking, rows, picked
        )
        found.append(choose_entries(scores, position[:, at], spec, chooser(picked)))
    return torch.cat(found, 1)


@torch.no_grad()
def attend_held(
    q: Tensor,
    kv: Tensor,
    kv_position: Tensor,
    entries: Tensor | None,
    chosen: Tensor | None,
    sinks: Tensor,
    position: Tensor,
    spec: CompressedSpec,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """New tokens of several rows against what a cache holds: what compressed_attention gives for
    them, up to rounding. No gradient, and nothing waits for the device.

    Args:
        q: [b, S, H, c]; kv: [b, N, c] of what their windows may see, tokens that follow each other
            at kv_position [b, N] int64, below 0 for what is not there; entries: [b, E, c] from a
            document's first one on, and after the closed ones anything finite.
        chosen: [b, S, K] entries that they see, -1 for none; None: every closed one.
        sinks: [H]; position: [b, S] int64 of the new tokens.
        rows: [b, E] int64: where entries are in a pool that all rows share, which `entries` [n, c]
            then is. backend: as compressed_attention takes it.

    Returns:
        [b, S, H, c] in the dtype of q.
    """
    real, new = real_dtype(q.dtype), q.shape[1]
    picked = pick_backend(backend, q.device, q.dtype, q.shape[-1], 1)
    number = 0
    if entries is not None:
        number = entries.shape[1] if rows is None else rows.shape[1]
    # A mask reads every entry once for all new tokens, a list reads its own for each.
    if picked == "triton" or (chosen is not None and new * chosen.shape[-1] < number):
        return _attend_listed(
            q, kv, kv_position, entries, chosen, sinks, position, spec, rows, picked
        )

    columns, seen = kv.to(real), window_mask(position, kv_position, spec.window)
    if entries is not None:
        if rows is not None:
            entries = read_rows(entries, rows)
        if chosen is None:
            visible = entries_mask(position, number, spec.ratio)
        else:
            visible = blocks_mask(chosen, number)
        columns, seen = torch.cat((columns, entries.to(real)), 1), torch.cat((seen, visible), 2)
    size = max(1, HELD_VALUES // max(1, len(q) * q.shape[2] * columns.shape[1]))
    out = torch.empty_like(q)
    for start in range(0, new, size):
        at = slice(start, start + size)
        out[:, at] = attend(q[:, at].to(real), columns, seen[:, at], sinks.to(real)).out
    return out


def _attend_listed(
    q: Tensor,
    kv: Tensor,
    kv_position: Tensor,
    entries: Tensor | None,
    chosen: Tensor | None,
    sinks: Tensor,
    position: Tensor,
    spec: CompressedSpec,
    rows: Tensor | None,
    backend: str,
) -> Tensor:
    """Of the entries those that are seen alone, a run of new tokens at a time."""
    kv, of_tokens = as_pool(kv)
    back = torch.arange(1 - spec.window, 1, device=q.device)
    number, listed = 0, spec.window
    if entries is not None:
        if rows is None:
            entries, rows = as_pool(entries)
        assert rows is not None
        number = rows.shape[1]
        entry = torch.arange(number, device=q.device)
        listed += number if chosen is None else chosen.shape[-1]

    out = torch.empty_like(q)
    size = max(1, HELD_VALUES // max(1, 2 * len(q) * listed))
    for start in range(0, q.shape[1], size):
        at = slice(start, start + size)
        own = position[:, at].unsqueeze(-1)
        place = own + back - kv_position[:, :1].unsqueeze(-1)
        absent = (own + back < 0) | (place >= of_tokens.shape[1])
        places = [(kv, of_tokens, place.masked_fill(absent, -1))]
        if entries is not None and rows is not None and number:
            if chosen is not None:
                seen = chosen[:, at].long()
            else:
                seen = torch.where(entry < (own + 1) // spec.ratio, entry, -1)
            places.append((entries, rows, seen))
        sources = [
            Source(pool.unsqueeze(1), None, rows_of(x, of_pool).flatten(0, 1).unsqueeze(0))
            for pool, of_pool, x in places
        ]
        queries = q[:, at].flatten(0, 1).contiguous()
        found = attend_rows(Lookup(queries, tuple(sources), sinks), backend)
        out[:, at] = found.unflatten(0, (len(q), -1))
    return out
