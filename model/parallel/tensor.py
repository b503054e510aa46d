"""Tensor parallelism with sequence parallelism: a rank has a part of every matrix and of every
row's tokens (Shoeybi et al., arXiv 1909.08053; Korthikanti et al., arXiv 2205.05198).

Between the layers every rank holds tokens of its own, as under any other parallelism. Before a cut
matrix the ranks gather their tokens, and what such a matrix leaves behind it are shares of a sum,
of which each rank takes its own tokens. Each movement is the transpose of another in backward:

| movement | forward | backward |
|---|---|---|
| `gather` | all-gather | sum, own tokens |
| `sum_own` | sum, own tokens | all-gather |
| `own` | own tokens of what all ranks have alike | all-gather |
| `sum_all` | sum, on all ranks | sum, on all ranks |

Sums over ranks are made in fp32 in the order of the ranks and rounded once, whatever the backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ops.all_to_all import Meter


@dataclass(frozen=True)
class TensorExchange:
    """The exchange of a tensor group, and this rank's place in it."""

    group: Any
    rank: int
    size: int
    meter: Meter = field(default_factory=Meter)
    """Counts what all layers send and wait for."""

    def gather(self, tokens: Tensor) -> Tensor:
        """[t, ...] of each rank -> [size * t, ...] in the order of the ranks. Collective."""
        found: Tensor = _Gather.apply(tokens, self)  # type: ignore[no-untyped-call]
        return found

    def sum_own(self, shares: Tensor) -> Tensor:
        """[size * t, ...], a share of a sum on each rank -> [t, ...] of it. Collective."""
        found: Tensor = _SumOwn.apply(shares, self)  # type: ignore[no-untyped-call]
        return found

    def own(self, same: Tensor) -> Tensor:
        """[size * t, ...], the same on all ranks -> [t, ...]. Collective in backward."""
        found: Tensor = _Own.apply(same, self)  # type: ignore[no-untyped-call]
        return found

    def sum_all(self, shares: Tensor) -> Tensor:
        """[...] fp32, a share of a sum on each rank -> the sum, on all of them. Collective."""
        found: Tensor = _SumAll.apply(shares, self)  # type: ignore[no-untyped-call]
        return found

    def gather_rows(self, tokens: Tensor) -> Tensor:
        """[B, s, ...] of each rank -> [B, size * s, ...]. Collective."""
        batch, length = tokens.shape[:2]
        gathered = self.gather(tokens.flatten(0, 1))
        parts = gathered.view(self.size, batch, length, *tokens.shape[2:])
        return parts.movedim(0, 1).flatten(1, 2)

    def sum_own_rows(self, shares: Tensor) -> Tensor:
        """[B, size * s, ...], a share of a sum on each rank -> [B, s, ...] of it. Collective."""
        batch, length = shares.shape[0], shares.shape[1] // self.size
        parts = shares.view(batch, self.size, length, *shares.shape[2:]).movedim(1, 0)
        own = self.sum_own(parts.flatten(0, 2))
        return own.view(batch, length, *shares.shape[2:])

    def gathered(self, tokens: Tensor) -> Tensor:
        """`gather`, without a gradient."""
        tokens = tokens.contiguous()
        found = tokens.new_empty(self.size * tokens.shape[0], *tokens.shape[1:])
        self.meter.add_bytes((self.size - 1) * tokens.nbytes)
        work = dist.all_gather_into_tensor(found, tokens, group=self.group, async_op=True)
        with self.meter.waiting(tokens.device):
            work.wait()
        return found

    def summed(self, shares: Tensor) -> Tensor:
        """`sum_own`, without a gradient."""
        shares = shares.contiguous()
        found = torch.empty_like(shares)
        self.meter.add_bytes(shares.nbytes // self.size * (self.size - 1))
        work = dist.all_to_all_single(found, shares, group=self.group, async_op=True)
        with self.meter.waiting(shares.device):
            work.wait()
        first, *others = found.chunk(self.size)
        total = first.float()
        for other in others:
            total = total + other
        return total.to(shares.dtype)

    def reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        """In place, the same on all ranks, without a gradient."""
        self.meter.add_bytes(2 * values.nbytes * (self.size - 1) // self.size)
        work = dist.all_reduce(values, operation, group=self.group, async_op=True)
        with self.meter.waiting(values.device):
            work.wait()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, exchange: TensorExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.gathered(tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.summed(grads[0]), None


class _SumOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shares: Tensor, exchange: TensorExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.summed(shares)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.gathered(grads[0]), None


class _SumAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shares: Tensor, exchange: TensorExchange) -> Tensor:
        ctx.exchange = exchange
        total = shares.clone()
        exchange.reduce(total, dist.ReduceOp.SUM)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        ctx.exchange.reduce(total, dist.ReduceOp.SUM)
        return total, None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, same: Tensor, exchange: TensorExchange) -> Tensor:
        ctx.exchange = exchange
        return same.chunk(exchange.size)[exchange.rank].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.gathered(grads[0]), None
