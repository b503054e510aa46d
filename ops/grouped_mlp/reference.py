"""The definition of the grouped SwiGLU MLP: one expert after another, gradients by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def reference_grouped_mlp(hidden: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
                          slots: torch.Tensor, inverse: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """out[t] = sum_k weights[t, k] (silu(x W_gate^T) * (x W_up^T)) W_down^T, x = hidden[t], W those of its k-th expert.

    Arguments as in interface.grouped_mlp. An expert without rows multiplies an empty slice, so its weights still get a
    (zero) gradient. `unbind` collects the weight gradients once; indexing would add up one full-size gradient per expert.
    """
    num_slots = inverse.shape[1]
    ends = offsets.tolist()
    outputs = []
    for e, (w_gate_up, w_down) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        x = hidden[slots[ends[e]:ends[e + 1]].long() // num_slots]
        gate, up = F.linear(x, w_gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, w_down))
    zero_row = hidden.new_zeros(1, hidden.shape[1])  # for unused slots, which point at -1: the last row
    rows = torch.cat((*outputs, zero_row))[inverse.long()]
    return (rows.to(weights.dtype) * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)
