"""Context parallelism by gathering: a rank has the queries of its tokens, and gathers the keys and
values of all that share the row.

A query's output depends on itself and on the keys and values of its document alone, so it is exact.
What reaches keys and values from a rank's queries is a share of a sum over the ranks, which is made
in the order of the ranks (model/parallel/tensor.py), each keeping that of its own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.parallel.deal import Deal, Run
from model.parallel.tensor import TensorExchange


@dataclass(frozen=True)
class Gathering:
    """What a rank gathers for the tokens that it has of rows, and from whom."""

    exchange: TensorExchange
    """Of the ranks that gather."""
    deal: Deal
    """Which tokens each of them has."""

    @property
    def queries(self) -> Tensor:
        """[B, S / size] int64, places in their rows of the tokens that attend here, rising."""
        return self.deal.order.chunk(self.exchange.size, 1)[self.exchange.rank]

    @property
    def runs(self) -> tuple[Run, ...]:
        """The same on the host."""
        return self.deal.runs[self.exchange.rank]

    def rows(self, own: Tensor) -> Tensor:
        """[B, s, ...] of each rank -> [B, size * s, ...], rank by rank. Collective."""
        return self.exchange.gather_rows(own)

    def whole(self, *own: Tensor) -> tuple[Tensor, ...]:
        """[B, S / size, ...] of the tokens of each rank -> [B, S, ...] in the order of the rows. Of
        one dtype, travelling together. Collective.
        """
        flat = [x.flatten(2) for x in own]
        placed = self.placed(self.rows(torch.cat(flat, -1)))
        split = placed.split([x.shape[-1] for x in flat], -1)
        return tuple(x.unflatten(-1, y.shape[2:]) for x, y in zip(split, own, strict=True))

    def placed(self, dealt: Tensor) -> Tensor:
        """[B, S, F] in the order of the deal -> in that of the rows."""
        found: Tensor = _Placed.apply(dealt, self.deal.order)  # type: ignore[no-untyped-call]
        return found


class _Placed(torch.autograd.Function):
    """Every token has one place: copies both ways, and no sum whose order could differ."""

    @staticmethod
    def forward(ctx: Any, dealt: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return torch.empty_like(dealt).scatter_(1, _columns(order, dealt), dealt)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grads[0].gather(1, _columns(order, grads[0])), None


def _columns(order: Tensor, like: Tensor) -> Tensor:
    return order.unsqueeze(2).expand(-1, -1, like.shape[2])
