"""The activations of gated MLPs, and their backward pass with a gate on the output, which the
back-ends in plain torch share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.grouped_mlp.spec import CLAMPS, Activation


def activate(gate: Tensor, up: Tensor, activation: Activation = "swiglu") -> Tensor:
    """The activation (ops.grouped_mlp.spec) of gate and up, all of one shape."""
    if activation == "swiglu":
        return F.silu(gate) * up
    alpha, limit, shift = CLAMPS[activation]
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * (alpha * gate).sigmoid() * (up + shift)


def activation_backward(
    pre: Tensor, grad_act: Tensor, gates: Tensor, activation: Activation = "swiglu"
) -> tuple[Tensor, Tensor, Tensor]:
    """For rows y = g W_down act, act = activate(gate, up), (gate, up) = pre.

    pre: [n, 2F]; grad_act: [n, F], the gradient of y times W_down, without g (overwritten); gates:
        [n, 1]. Returns the gradient of g [n] in the dtype of the gates, g * act [n, F] (what
        W_down's gradient needs), and that of pre.
    """
    if activation == "swiglu":
        return _swiglu_backward(pre, grad_act, gates)
    raw_gate, raw_up = pre.chunk(2, dim=-1)
    alpha, limit, shift = CLAMPS[activation]
    gate, up = raw_gate.clamp(max=limit), raw_up.clamp(-limit, limit) + shift
    sigmoid = (alpha * gate).sigmoid()
    silu = gate * sigmoid
    act = silu * up
    grad_gates = (grad_act * act).sum(1, dtype=gates.dtype)
    gates = gates.to(act.dtype)
    act.mul_(gates)
    grad_act.mul_(gates)

    # Where a clamp holds a value it has no gradient.
    slope = sigmoid.addcmul(silu, 1 - sigmoid, value=alpha)
    grad_gate = (grad_act * up * slope).masked_fill_(raw_gate > limit, 0)
    grad_up = (grad_act * silu).masked_fill_(raw_up.abs() > limit, 0)
    return grad_gates, act, torch.cat((grad_gate, grad_up), dim=-1)


def _swiglu_backward(pre: Tensor, grad_act: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    # d silu / d gate = sigmoid + silu (1 - sigmoid)
    slope = sigmoid.addcmul(silu, 1 - sigmoid)
    torch.mul(grad_act.mul_(up), slope, out=grad_gate)
    return grad_gates, act, grad_pre
