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
from ops.index_attention.spec import IndexSpec
from ops.index_attention.tile import block_scores, blocks_mask, choose, real_dtype

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
    queries: Tensor, keys: Tensor, weights: Tensor, position: Tensor, spec: CompressedSpec
) -> Tensor:
    """Entries for new tokens of several rows, [b, S, K] int64 as attend_held takes them. queries:
    [b, S, I, w]; keys: [b, E, w], after those of the closed entries anything finite; weights: [b,
    S, I]; position: [b, S] int64.
    """
    real = real_dtype(queries.dtype)
    queries, keys, weights = (x.to(real) for x in (queries, keys, weights))
    scores = block_scores(queries, keys, weights, position, spec.ranking)
    return choose_entries(scores, position, spec)


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
) -> Tensor:
    """New tokens of several rows against what a cache holds: what compressed_attention gives for
    them, up to rounding. No gradient.

    Args:
        q: [b, S, H, c]; kv: [b, N, c] of what their windows may see, at kv_position [b, N] int64,
            below 0 for what is not there; entries: [b, E, c] from a document's first one on, and
            after the closed ones anything finite.
        chosen: [b, S, K] entries that they see, -1 for none; None: every closed one.
        sinks: [H]; position: [b, S] int64 of the new tokens.

    Returns:
        [b, S, H, c] in the dtype of q.
    """
    real = real_dtype(q.dtype)
    columns, seen = kv.to(real), window_mask(position, kv_position, spec.window)
    if entries is not None:
        if chosen is None:
            visible = entries_mask(position, entries.shape[1], spec.ratio)
        else:
            visible = blocks_mask(chosen, entries.shape[1])
        columns, seen = torch.cat((columns, entries.to(real)), 1), torch.cat((seen, visible), 2)
    return attend(q.to(real), columns, seen, sinks.to(real)).out.to(q.dtype)
