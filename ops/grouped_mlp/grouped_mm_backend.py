"""The grouped MLP through torch.nn.functional.grouped_mm (CUTLASS on a GPU), without host synchronisation.

Rows behind the last assignment are not computed and hold whatever the memory held; nothing reads them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ops.grouped_mlp.swiglu import swiglu_backward
from ops.permute import gather_rows, sum_rows


def _project(rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[R, I] rows by expert, [L, I, O] -> [R, O]."""
    return F.grouped_mm(rows, matrices, offs=offsets[1:])


def _weight_grad(grad: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[R, O], [R, I] by expert -> [L, O, I], zeros for experts without rows."""
    found = F.grouped_mm(grad.t(), rows, offs=offsets[1:])
    return torch.where((offsets[1:] > offsets[:-1]).view(-1, 1, 1), found, 0)


def forward(hidden: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, slots: torch.Tensor,
            inverse: torch.Tensor, offsets: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As torch_backend.forward."""
    pre = _project(gather_rows(hidden, slots, inverse.shape[1]), gate_up.transpose(1, 2), offsets)
    gate, up = pre.chunk(2, dim=-1)
    rows = _project(F.silu(gate) * up, down.transpose(1, 2), offsets)
    return sum_rows(rows, inverse, weights), pre if keep else None


def backward(grad_out: torch.Tensor, hidden: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
             slots: torch.Tensor, inverse: torch.Tensor, offsets: torch.Tensor, pre: torch.Tensor | None
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As torch_backend.backward."""
    num_slots = inverse.shape[1]
    x, grad_rows = gather_rows(hidden, slots, num_slots), gather_rows(grad_out, slots, num_slots)
    if pre is None:
        pre = _project(x, gate_up.transpose(1, 2), offsets)
    gates = gather_rows(weights.reshape(-1, 1), slots, 1)
    row_grads, act, grad_pre = swiglu_backward(pre, _project(grad_rows, down, offsets), gates)
    grad_weights = torch.where(inverse < 0, 0, row_grads[inverse.clamp_min(0).long()])
    grad_down = _weight_grad(grad_rows, act, offsets)
    grad_hidden = sum_rows(_project(grad_pre, gate_up, offsets), inverse, None)
    return grad_hidden, grad_weights, _weight_grad(grad_pre, x, offsets), grad_down
