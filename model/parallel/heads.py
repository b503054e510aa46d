"""Context parallelism by heads: a rank has a part of every row and all heads, attention wants whole
rows and can do with some of the heads (DeepSpeed-Ulysses, arXiv 2309.14509).

Heads are independent of each other in every attention here, sparse ones included, where a group of
query heads chooses blocks by its own key/value head. So nothing is approximated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ops.all_to_all import Hop, Meter, begin_rows, end_rows


@dataclass(frozen=True)
class HeadExchange:
    """The exchange of a context group, and this rank's place in it."""

    group: Any
    rank: int
    size: int
    meter: Meter = field(default_factory=Meter)
    """Counts what all layers send and wait for."""

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """This rank's tokens of all heads -> all tokens of this rank's heads. Collective.

        Args:
            tensors: [B, s, heads, ...] each, of one dtype, travelling together; their numbers of
                heads may differ, and all are multiples of `size`.

        Returns:
            [B, s * size, heads / size, ...] each; tokens in the order of the ranks.
        """
        batch, length = tensors[0].shape[:2]
        shapes = [(x.shape[2] // self.size, *x.shape[3:]) for x in tensors]
        # By the rank that gets them, which has a run of the heads of every tensor.
        parts = [x.reshape(batch, length, self.size, -1).movedim(2, 0) for x in tensors]
        received = self._exchanged(torch.cat(parts, -1))
        whole = received.movedim(0, 1).reshape(batch, self.size * length, -1)
        split = whole.split([x.shape[-1] for x in parts], -1)
        return tuple(x.unflatten(-1, shape) for x, shape in zip(split, shapes, strict=True))

    def to_tokens(self, heads: Tensor) -> Tensor:
        """The way back: [B, s * size, heads / size, ...] -> [B, s, heads, ...]. Collective."""
        batch, length, own = heads.shape[:3]
        parts = heads.reshape(batch, self.size, length // self.size, own, -1).movedim(1, 0)
        received = self._exchanged(parts.flatten(3))
        shape = (batch, length // self.size, self.size * own, *heads.shape[3:])
        return received.movedim(0, 2).reshape(shape)

    def own(self, by_head: Tensor) -> Tensor:
        """This rank's run of [heads, ...]."""
        return by_head.chunk(self.size)[self.rank]

    def _exchanged(self, parts: Tensor) -> Tensor:
        """[size, ...]: part i goes to rank i, and what ranks have for this one comes back."""
        hop = Hop(self.group, [1] * self.size, [1] * self.size)
        flight = begin_rows(parts.reshape(self.size, -1), (hop,), meter=self.meter)
        return end_rows(flight).view_as(parts)
