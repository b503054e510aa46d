"""The definition of the grouped SwiGLU MLP: one expert after another, gradients by autograd but for
what rounding to 8 bits makes of a product.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.grouped_mlp.fp8 import rounded_columns, rounded_rows, rounded_tiles
from ops.grouped_mlp.spec import Activation, Precision
from ops.grouped_mlp.swiglu import activate


def _weight_gradient(grad: Tensor, rows: Tensor, tiles: bool) -> Tensor:
    """sum over rows of grad^T rows, [out, in]; with `tiles` both are rounded."""
    return rounded_tiles(grad).t() @ rounded_tiles(rows) if tiles else grad.t() @ rows


class RoundedProduct(torch.autograd.Function):
    """y = Q(x) Q(W)^T, where Q rounds each vector that is summed over to e4m3 with its own scale.

    Backward takes rounding for the identity: grad_x = Q(grad_y) Q(W), with the columns of W
    rounded, as the sum is over its rows now; grad_W = grad_y^T x of what was not rounded, or with
    `tiles` of both in tiles of rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tiles: bool) -> Tensor:
        """x: [n, in]; weight: [out, in]; gives [n, out]."""
        ctx.save_for_backward(x, weight)
        ctx.tiles = tiles
        return F.linear(rounded_rows(x), rounded_rows(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x = rounded_rows(grad) @ rounded_columns(weight)
        return grad_x, _weight_gradient(grad, x, ctx.tiles), None


class WeighedProduct(torch.autograd.Function):
    """y = g Q(a) Q(W)^T, as RoundedProduct and with each row times its gate, of which backward
    knows that it is a number: what is rounded is the gradient of y. With z = Q(grad_y) Q(W),
    grad_a = g z and grad_g = <z, a>; grad_W = grad_y^T (g a), with `tiles` of both in tiles of
    rows.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, gates: Tensor, tiles: bool) -> Tensor:
        """a: [n, in]; weight: [out, in]; gates: [n, 1]; gives [n, out] in the dtype of gates."""
        ctx.save_for_backward(a, weight, gates)
        ctx.tiles = tiles
        return F.linear(rounded_rows(a), rounded_rows(weight)) * gates

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        a, weight, gates = ctx.saved_tensors
        grad = grad.to(a.dtype)
        z = rounded_rows(grad) @ rounded_columns(weight)
        g = gates.to(a.dtype)
        grad_weight = _weight_gradient(grad, g * a, ctx.tiles)
        return g * z, grad_weight, (z * a).sum(1, keepdim=True).to(gates.dtype), None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, precision: Precision) -> Tensor:
    if precision == "native":
        return F.linear(x, weight, bias)
    tiles = precision == "fp8_all"
    y = cast(Tensor, RoundedProduct.apply(x, weight, tiles))  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


def _weighed(
    a: Tensor, weight: Tensor, bias: Tensor | None, gates: Tensor, precision: Precision
) -> Tensor:
    if precision == "native":
        return F.linear(a, weight, bias) * gates
    tiles = precision == "fp8_all"
    y = cast(Tensor, WeighedProduct.apply(a, weight, gates, tiles))  # type: ignore[no-untyped-call]
    return y if bias is None else y + gates * bias


def reference_grouped_mlp(
    hidden: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    slots: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    activation: Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    precision: Precision = "native",
) -> Tensor:
    """out[t] = sum_k weights[t, k] (activate(x W_gate^T + b_gate, x W_up^T + b_up) W_down^T +
    b_down), x = hidden[t], W and b those of its k-th expert.

    Arguments as in interface.grouped_mlp. An expert without rows multiplies an empty slice, so its
    weights still get a (zero) gradient. `unbind` collects the weight gradients once; indexing would
    add up one full-size gradient per expert.
    """
    num_slots = inverse.shape[1]
    ends = offsets.tolist()
    gates = weights.reshape(-1, 1)
    outputs = []
    unbiased: list[Tensor | None] = [None] * len(gate_up)
    b_gate_up = unbiased if gate_up_bias is None else gate_up_bias.unbind()
    b_down = unbiased if down_bias is None else down_bias.unbind()
    for e, (w_gate_up, w_down) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        assigned = slots[ends[e] : ends[e + 1]].long()
        x, g = hidden[assigned // num_slots], gates[assigned]
        gate, up = _product(x, w_gate_up, b_gate_up[e], precision).chunk(2, dim=-1)
        outputs.append(_weighed(activate(gate, up, activation), w_down, b_down[e], g, precision))
    # for unused slots, which point at -1: the last row
    zero_row = weights.new_zeros(1, hidden.shape[1])
    rows = torch.cat((*outputs, zero_row))[inverse.long()]
    return rows.sum(1).to(hidden.dtype)
