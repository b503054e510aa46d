"""The grouped MLP in plain torch, one expert at a time, with its backward in closed form: what a
CPU uses.

Against autograd over the same loop: weight gradients are written in place, an expert's rows stay in
the cache from the gather to the sum, and neither activations nor the down-projection's output are
kept. Sums over a token's experts are fp32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ops.grouped_mlp.fp8 import rounded_columns, rounded_rows, rounded_tiles, widened
from ops.grouped_mlp.spec import Activation, Precision
from ops.grouped_mlp.swiglu import activate, activation_backward


def _experts(
    slots: torch.Tensor, num_slots: int, offsets: torch.Tensor
) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
    """Experts that have rows: (expert, rows, flat assignments [n], tokens [n])."""
    ends = offsets.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(ends)):
        if end > start:
            assigned = slots[start:end].long()
            yield (
                expert,
                slice(start, end),
                assigned,
                assigned // num_slots if num_slots > 1 else assigned,
            )


def _as_it_is(values: torch.Tensor) -> torch.Tensor:
    return values


def forward(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    slots: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    keep: bool,
    activation: Activation = "swiglu",
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    precision: Precision = "native",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output [T, D], and the pre-activations [T * K, 2F] in expert order where `keep`.

    scales: of weights of 8 bits, [L, 2F] and [L, D] fp32, which their products are multiplied
    with. One expert's weights at a time are in the dtype of `hidden`.
    """
    num_slots, flat_weights = inverse.shape[1], weights.reshape(-1)
    # What is rounded to 8 bits is exact in the dtype of `hidden`, so its products are products of
    # that dtype.
    rounds = _as_it_is if precision == "native" else rounded_rows
    hidden = rounds(hidden)
    out = torch.zeros(hidden.shape, dtype=weights.dtype, device=hidden.device)
    pre = hidden.new_empty((slots.shape[0], gate_up.shape[1])) if keep else None
    for expert, rows, assigned, tokens in _experts(slots, num_slots, offsets):
        x = hidden.index_select(0, tokens)
        w_up, w_down = rounds(gate_up[expert]), rounds(down[expert])
        if scales is not None:
            w_up, w_down = widened(w_up, hidden.dtype), widened(w_down, hidden.dtype)
        projected = x @ w_up.t() if pre is None else torch.mm(x, w_up.t(), out=pre[rows])
        if scales is not None:
            projected *= scales[0][expert]
        if gate_up_bias is not None:
            projected += gate_up_bias[expert]
        gate, up = projected.chunk(2, dim=-1)
        y = rounds(activate(gate, up, activation)) @ w_down.t()
        if scales is not None:
            y *= scales[1][expert]
        if down_bias is not None:
            y += down_bias[expert]
        # an expert's tokens are distinct
        out.index_add_(0, tokens, y * flat_weights[assigned].unsqueeze(-1))
    return out.to(hidden.dtype), pre


def backward(
    grad_out: torch.Tensor,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    slots: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    pre: torch.Tensor | None,
    activation: Activation = "swiglu",
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    precision: Precision = "native",
) -> tuple[torch.Tensor, ...]:
    """Gradients of hidden, weights, gate_up and down, and of the biases where there are some. The
    gates' is <grad_out W_down, act> (and <grad_out, b_down>): no output row is needed.
    """
    num_slots, flat_weights = inverse.shape[1], weights.reshape(-1)
    low = precision != "native"
    rows_of, columns_of = (rounded_rows, rounded_columns) if low else (_as_it_is, _as_it_is)
    tiles_of = rounded_tiles if precision == "fp8_all" else _as_it_is
    rounded_grad = rows_of(grad_out)
    grad_hidden = torch.zeros(hidden.shape, dtype=weights.dtype, device=hidden.device)
    grad_weights = torch.zeros_like(flat_weights)
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    grad_gate_up_bias = None if gate_up_bias is None else torch.zeros_like(gate_up_bias)
    grad_down_bias = None if down_bias is None else torch.zeros_like(down_bias)

    # Experts without rows are not among those that _experts yields, and their gradients start as
    # memory was.
    for expert in (offsets[1:] == offsets[:-1]).nonzero().flatten().tolist():
        grad_gate_up[expert].zero_()
        grad_down[expert].zero_()

    for expert, rows, assigned, tokens in _experts(slots, num_slots, offsets):
        x, grad_rows = hidden.index_select(0, tokens), grad_out.index_select(0, tokens)
        gates = flat_weights[assigned].unsqueeze(-1)
        if pre is not None:
            projected = pre[rows]
        else:
            projected = rows_of(x) @ rows_of(gate_up[expert]).t()
            if gate_up_bias is not None:
                projected += gate_up_bias[expert]
        grad_act = rounded_grad.index_select(0, tokens) @ columns_of(down[expert])
        grad_gates, act, grad_pre = activation_backward(projected, grad_act, gates, activation)
        if down_bias is not None and grad_down_bias is not None:
            grad_gates += (grad_rows * down_bias[expert]).sum(1, dtype=grad_gates.dtype)
            grad_down_bias[expert] = (grad_rows * gates).sum(0)
        if grad_gate_up_bias is not None:
            grad_gate_up_bias[expert] = grad_pre.sum(0)
        grad_weights[assigned] = grad_gates
        torch.mm(tiles_of(grad_rows).t(), tiles_of(act), out=grad_down[expert])
        torch.mm(tiles_of(grad_pre).t(), tiles_of(x), out=grad_gate_up[expert])
        grad_x = rows_of(grad_pre) @ columns_of(gate_up[expert])
        grad_hidden.index_add_(0, tokens, grad_x.to(weights.dtype))
    biases = [g for g in (grad_gate_up_bias, grad_down_bias) if g is not None]
    grads = grad_hidden.to(hidden.dtype), grad_weights.view_as(weights), grad_gate_up, grad_down
    return (*grads, *biases)
