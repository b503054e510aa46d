"""The grouped MLP through torch.nn.functional.grouped_mm (CUTLASS on a GPU), without host
synchronisation.

Rows behind the last assignment are not computed and hold whatever the memory held; nothing reads
them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ops.grouped_mlp.spec import Activation
from ops.grouped_mlp.swiglu import activate, activation_backward
from ops.permute import gather_rows, sum_rows


def _project(rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[R, I] rows by expert, [L, I, O] -> [R, O]."""
    return F.grouped_mm(rows, matrices, offs=offsets[1:])


def _weight_grad(grad: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[R, O], [R, I] by expert -> [L, O, I], zeros for experts without rows."""
    found = F.grouped_mm(grad.t(), rows, offs=offsets[1:])
    return torch.where((offsets[1:] > offsets[:-1]).view(-1, 1, 1), found, 0)


def _biased(rows: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor) -> torch.Tensor:
    """[R, O] rows by expert, each with the bias [L, O] of its expert."""
    if bias is None:
        return rows
    places = torch.arange(len(rows), dtype=offsets.dtype, device=rows.device)
    # rows behind the last assignment are nobody's, and take any
    experts = torch.searchsorted(offsets[1:], places, right=True).clamp_max_(len(bias) - 1)
    return rows + bias[experts]


def _bias_grad(grad: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[R, O] by expert -> [L, O]: sums over rows, as a product with ones, whose width is the least
    that the kernel takes.
    """
    return _weight_grad(grad, torch.ones_like(grad[:, :8]), offsets)[..., 0].contiguous()


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As torch_backend.forward."""
    pre = _project(gather_rows(hidden, slots, inverse.shape[1]), gate_up.transpose(1, 2), offsets)
    pre = _biased(pre, gate_up_bias, offsets)
    gate, up = pre.chunk(2, dim=-1)
    rows = _project(activate(gate, up, activation), down.transpose(1, 2), offsets)
    rows = _biased(rows, down_bias, offsets)
    return sum_rows(rows, inverse, weights), pre if keep else None


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
) -> tuple[torch.Tensor, ...]:
    """As torch_backend.backward."""
    num_slots = inverse.shape[1]
    x, grad_rows = gather_rows(hidden, slots, num_slots), gather_rows(grad_out, slots, num_slots)
    if pre is None:
        pre = _biased(_project(x, gate_up.transpose(1, 2), offsets), gate_up_bias, offsets)
    gates = gather_rows(weights.reshape(-1, 1), slots, 1)
    row_grads, act, grad_pre = activation_backward(
        pre, _project(grad_rows, down, offsets), gates, activation
    )
    biases = []
    if gate_up_bias is not None:
        biases.append(_bias_grad(grad_pre, offsets))
    if down_bias is not None:
        # an expert's rows are in one piece, but not its bias
        own = _biased(torch.zeros_like(grad_rows), down_bias, offsets)
        row_grads += (grad_rows * own).sum(1, dtype=row_grads.dtype)
        biases.append(_bias_grad(grad_rows * gates.to(grad_rows.dtype), offsets))
    grad_weights = torch.where(inverse < 0, 0, row_grads[inverse.clamp_min(0).long()])
    grad_down = _weight_grad(grad_rows, act, offsets)
    grad_hidden = sum_rows(_project(grad_pre, gate_up, offsets), inverse, None)
    grads = grad_hidden, grad_weights, _weight_grad(grad_pre, x, offsets), grad_down
    return (*grads, *biases)
