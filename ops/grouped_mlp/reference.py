"""The definition of the grouped SwiGLU MLP: one expert after another."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def reference_grouped_mlp(rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
                          counts: torch.Tensor) -> torch.Tensor:
    """y = (silu(x W_gate^T) * (x W_up^T)) W_down^T with the weights of each row's expert.

    rows [R, D] sorted by expert; gate_up [L, 2F, D] (gate first); down [L, D, F]; counts [L] int64 with sum R.
    An expert without rows multiplies an empty slice, so its weights still get a (zero) gradient. `unbind` collects
    the weight gradients once; indexing would add up one full-size gradient per expert.
    """
    outputs = []
    for x, w_gate_up, w_down in zip(rows.split(counts.tolist()), gate_up.unbind(), down.unbind(), strict=True):
        gate, up = F.linear(x, w_gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, w_down))
    return torch.cat(outputs)
