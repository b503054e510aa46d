"""The grouped MLP in plain torch, one expert at a time, with its backward in closed form: what a CPU uses.

Against autograd over the same loop: weight gradients are written in place, an expert's rows stay in the cache from the
gather to the sum, and neither activations nor the down-projection's output are kept. Sums over a token's experts are fp32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ops.grouped_mlp.swiglu import swiglu_backward


def _experts(slots: torch.Tensor, num_slots: int, offsets: torch.Tensor
             ) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
    """Experts that have rows: (expert, rows, flat assignments [n], tokens [n])."""
    ends = offsets.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(ends)):
        if end > start:
            assigned = slots[start:end].long()
            yield expert, slice(start, end), assigned, assigned // num_slots if num_slots > 1 else assigned


def forward(hidden: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, slots: torch.Tensor,
            inverse: torch.Tensor, offsets: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output [T, D], and the pre-activations [T * K, 2F] in expert order where `keep`."""
    num_slots, flat_weights = inverse.shape[1], weights.reshape(-1)
    out = torch.zeros(hidden.shape, dtype=weights.dtype, device=hidden.device)
    pre = hidden.new_empty((slots.shape[0], gate_up.shape[1])) if keep else None
    for expert, rows, assigned, tokens in _experts(slots, num_slots, offsets):
        x = hidden.index_select(0, tokens)
        projected = x @ gate_up[expert].t() if pre is None else torch.mm(x, gate_up[expert].t(), out=pre[rows])
        gate, up = projected.chunk(2, dim=-1)
        y = F.silu(gate).mul_(up) @ down[expert].t()
        out.index_add_(0, tokens, y * flat_weights[assigned].unsqueeze(-1))  # an expert's tokens are distinct
    return out.to(hidden.dtype), pre


def backward(grad_out: torch.Tensor, hidden: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
             slots: torch.Tensor, inverse: torch.Tensor, offsets: torch.Tensor, pre: torch.Tensor | None
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weights, gate_up and down. The gates' is <grad_out W_down, act>: no output row is needed."""
    num_slots, flat_weights = inverse.shape[1], weights.reshape(-1)
    grad_hidden = torch.zeros(hidden.shape, dtype=weights.dtype, device=hidden.device)
    grad_weights = torch.zeros_like(flat_weights)
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    for expert in (offsets[1:] == offsets[:-1]).nonzero().flatten().tolist():
        grad_gate_up[expert].zero_()
        grad_down[expert].zero_()
    for expert, rows, assigned, tokens in _experts(slots, num_slots, offsets):
        x, grad_rows = hidden.index_select(0, tokens), grad_out.index_select(0, tokens)
        gates = flat_weights[assigned].unsqueeze(-1)
        projected = x @ gate_up[expert].t() if pre is None else pre[rows]
        grad_weights[assigned], act, grad_pre = swiglu_backward(projected, grad_rows @ down[expert], gates)
        torch.mm(grad_rows.t(), act, out=grad_down[expert])
        torch.mm(grad_pre.t(), x, out=grad_gate_up[expert])
        grad_hidden.index_add_(0, tokens, (grad_pre @ gate_up[expert]).to(weights.dtype))
    return grad_hidden.to(hidden.dtype), grad_weights.view_as(weights), grad_gate_up, grad_down
