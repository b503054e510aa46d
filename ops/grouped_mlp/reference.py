"""The definition of the grouped SwiGLU MLP: one expert after another, gradients by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ops.grouped_mlp.spec import Activation
from ops.grouped_mlp.swiglu import activate


def reference_grouped_mlp(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    slots: torch.Tensor,
    inverse: torch.Tensor,
    offsets: torch.Tensor,
    activation: Activation = "swiglu",
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[t] = sum_k weights[t, k] (activate(x W_gate^T + b_gate, x W_up^T + b_up) W_down^T +
    b_down), x = hidden[t], W and b those of its k-th expert.

    Arguments as in interface.grouped_mlp. An expert without rows multiplies an empty slice, so its
    weights still get a (zero) gradient. `unbind` collects the weight gradients once; indexing would
    add up one full-size gradient per expert.
    """
    num_slots = inverse.shape[1]
    ends = offsets.tolist()
    outputs = []
    unbiased = [None] * len(gate_up)
    b_gate_up = unbiased if gate_up_bias is None else gate_up_bias.unbind()
    b_down = unbiased if down_bias is None else down_bias.unbind()
    for e, (w_gate_up, w_down) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        x = hidden[slots[ends[e] : ends[e + 1]].long() // num_slots]
        gate, up = F.linear(x, w_gate_up, b_gate_up[e]).chunk(2, dim=-1)
        outputs.append(F.linear(activate(gate, up, activation), w_down, b_down[e]))
    # for unused slots, which point at -1: the last row
    zero_row = hidden.new_zeros(1, hidden.shape[1])
    rows = torch.cat((*outputs, zero_row))[inverse.long()]
    return (rows.to(weights.dtype) * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)
