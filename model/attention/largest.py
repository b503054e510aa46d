"""The largest attention logit of every head, exactly, by blocks: torch's fused kernels keep none.

It costs the products of queries and keys once more, a third of what dense attention takes forward,
and memory for QUERY_BLOCK x S logits of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_BLOCK = 256
"""Queries whose logits are in memory at a time."""


class LargestLogits:
    """Collects those of the layers of one forward pass, in their order."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []

    def see(self, found: Tensor) -> None:
        """found: [heads] of the next layer."""
        self.layers.append(found)


@torch.no_grad()
def largest_logits(
    q: Tensor,
    k: Tensor,
    documents: Tensor,
    mask: Tensor | None,
    scale: float,
    places: Tensor | None = None,
) -> Tensor:
    """max over pairs (i, j <= i) of one document of scale * q_i . k_j, by head.

    Args:
        q: [B, n, heads, dim], n = S where all tokens are queries; k: [B, S, kv_heads, dim],
            heads a multiple of kv_heads.
        documents: [B * S] int64, equal for tokens of one document; a document lies in one row.
        mask: [B * S] bool, False for padding, which counts in no pair; None: there is none.
        places: [B, n] int64, which tokens of its row the queries are; None: all.

    Returns:
        [heads] fp32; -inf of no pair at all.
    """
    batch, num_queries, heads, _ = q.shape
    length = k.shape[1]
    groups = heads // k.shape[2]
    of_row = documents.view(batch, 1, 1, length)
    there = None if mask is None else mask.view(batch, 1, 1, length)
    order = torch.arange(length, device=q.device)
    found = torch.full((heads,), -torch.inf, device=q.device)
    for first in range(0, num_queries, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, num_queries)
        if places is not None:
            some = places[:, first:last]
            found = torch.maximum(found, _of_some(q, k, of_row, there, scale, first, some))
            continue
        queries = q[:, first:last].transpose(1, 2).float()
        keys = k[:, :last].transpose(1, 2).float().repeat_interleave(groups, 1)
        logits = queries @ keys.mT
        allowed = (order[:last] <= order[first:last, None]) & (
            of_row[..., :last] == of_row[..., first:last].mT
        )
        if there is not None:
            allowed = allowed & there[..., :last] & there[..., first:last].mT
        logits.masked_fill_(~allowed, -torch.inf)
        found = torch.maximum(found, logits.amax((0, 2, 3)) * scale)
    return found


def _of_some(
    q: Tensor,
    k: Tensor,
    of_row: Tensor,
    there: Tensor | None,
    scale: float,
    first: int,
    places: Tensor,
) -> Tensor:
    """[heads], of the queries from `first` on, whose tokens are `places` [B, m]."""
    queries = q[:, first : first + places.shape[1]].transpose(1, 2).float()
    keys = k.transpose(1, 2).float().repeat_interleave(q.shape[2] // k.shape[2], 1)
    at = places[:, None, :, None]
    own = of_row.expand(-1, 1, places.shape[1], -1).gather(3, at)
    allowed = (torch.arange(k.shape[1], device=q.device) <= at) & (of_row == own)
    if there is not None:
        allowed &= there & there.expand(-1, 1, places.shape[1], -1).gather(3, at)
    logits = (queries @ keys.mT).masked_fill_(~allowed, -torch.inf)
    return logits.amax((0, 2, 3)) * scale
