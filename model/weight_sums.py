"""Gradients of weights that a micro-batch uses many times: added up in fp32, rounded once to the
weights' dtype.

A bf16 sum keeps eight binary digits and stops growing at 256 equal terms (docs/numerics.md). Matrix
products add up in fp32 by themselves; looking up a token a thousand times and multiplying by the
head chunk by chunk do not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """nn.Embedding whose gradient adds up a token's occurrences in fp32."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int64 -> [..., D] in the weights' dtype."""
        return looked_up(self.weight, ids)


def looked_up(weight: Tensor, ids: Tensor) -> Tensor:
    """weight [V, D], ids [...] int64 -> [..., D]. The gradient of `weight` adds up a token's
    occurrences in fp32.
    """
    if weight.dtype == torch.float32 or not torch.is_grad_enabled():
        return F.embedding(ids, weight)
    found: Tensor = _Lookup.apply(weight, ids)  # type: ignore[no-untyped-call]
    return found


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows = len(weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        return torch.ops.aten.embedding_dense_backward(
            grad.float(), ids, ctx.num_rows, -1, False
        ).to(grad.dtype), None


def uses_of(weight: Tensor, number: int) -> list[Tensor]:
    """`weight` so many times, for as many products. The gradients of all uses are added up in fp32,
    in the order in which backward meets them, and reach the weight together; every use must take
    part in backward once.
    """
    shared = _Sum(number)
    return [_Use.apply(weight, shared) for _ in range(number)]  # type: ignore[no-untyped-call]


class _Sum:
    def __init__(self, missing: int):
        self.missing = missing
        self.total: Tensor | None = None


class _Use(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, shared: _Sum) -> Tensor:
        ctx.shared = shared
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        shared = ctx.shared
        shared.total = grad.float() if shared.total is None else shared.total.add_(grad)
        shared.missing -= 1
        if shared.missing:
            return None, None
        total, shared.total = shared.total.to(grad.dtype), None
        return total, None
