"""The backward pass of SwiGLU with a gate on its output, shared by the back-ends in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu_backward(pre: Tensor, grad_act: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For rows y = g W_down act, act = silu(gate) * up, (gate, up) = pre.

    pre: [n, 2F]; grad_act: [n, F], the gradient of y times W_down, without g (overwritten); gates: [n, 1].
    Returns the gradient of g [n] in the dtype of the gates, g * act [n, F] (what W_down's gradient needs), and that of pre.
    """
    gate, up = pre.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    act = silu * up
    grad_gates = (grad_act * act).sum(1, dtype=gates.dtype)
    gates = gates.to(act.dtype)
    act.mul_(gates)
    grad_act.mul_(gates)
    grad_pre = torch.empty_like(pre)
    grad_gate, grad_up = grad_pre.chunk(2, dim=-1)
    torch.mul(grad_act, silu, out=grad_up)
    slope = sigmoid.addcmul(silu, 1 - sigmoid)  # d silu / d gate = sigmoid + silu (1 - sigmoid)
    torch.mul(grad_act.mul_(up), slope, out=grad_gate)
    return grad_gates, act, grad_pre
