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
    q: Tensor, k: Tensor, documents: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """max over pairs (i, j <= i) of one document of scale * q_i . k_j, by head.

    Args:
        q: [B, S, heads, dim]; k: [B, S, kv_heads, dim], heads a multiple of kv_heads.
        documents: [B * S] int64, equal for tokens of one document; a document lies in one row.
        mask: [B * S] bool, False for padding, which counts in no pair; None: there is none.

    Returns:
        [heads] fp32; -inf of no pair at all.
    """
    batch, length, heads, _ = q.shape
    groups = heads // k.shape[2]
    of_row = documents.view(batch, 1, 1, length)
    there = None if mask is None else mask.view(batch, 1, 1, length)
    order = torch.arange(length, device=q.device)
    found = torch.full((heads,), -torch.inf, device=q.device)
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
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
