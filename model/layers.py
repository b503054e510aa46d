"""Small building blocks: RMSNorm, rotary embedding, gated MLP."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from model.config import RopeScaling
from model.parallel.tensor import TensorExchange
from ops.grouped_mlp import activate
from ops.grouped_mlp.spec import Activation


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dim, computed in fp32 (arXiv
    1910.07467).
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor, parts: TensorExchange | None = None) -> torch.Tensor:
        """parts: x [..., size] is this rank's part of a longer vector, and so are the weights.
        Collective then.
        """
        if parts is not None:
            squares = parts.sum_all(x.float().square().sum(-1, keepdim=True))
            mean = squares / (parts.size * x.shape[-1])
            return (x.float() * (mean + self.eps).rsqrt() * self.weight.float()).to(x.dtype)
        # torch's kernel: fp32 inside, rounds once; on CUDA it keeps x itself
        if self.weight.dtype == x.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class RowLinear(nn.Linear):
    """A linear layer whose input features may be shared out over a tensor group: what comes out is
    then a rank's share of a sum, into which one rank's bias goes.

    Attributes:
        adds_bias: whether it is this rank's.
    """

    adds_bias = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None or self.adds_bias:
            return super().forward(x)
        # A zero of it, so that every rank has a gradient to reduce.
        return F.linear(x, self.weight, 0 * self.bias)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); gate and up stacked in one matrix [2F, D], gate first
    (arXiv 2002.05202). Or another activation of ops/grouped_mlp/spec.py.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation = "swiglu"):
        super().__init__()
        self.activation = activation
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: torch.Tensor = self.down(activate(gate, up, self.activation))
        return out


def inverse_frequencies(
    rotary_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Radians per position of every turned pair of dimensions: [rotary_dim / 2] fp32.

    theta**(-2i / rotary_dim) (arXiv 2104.09864), stretched as `scaling` says.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    plain: torch.Tensor = theta**-exponents
    if scaling is None:
        return plain
    stretched = plain / scaling.factor
    if scaling.type == "linear":
        return stretched

    # Both ramps go from 0, where a frequency is low and stretched, to 1, where it is kept.
    assert scaling.original_max_seq_len is not None
    low, high = scaling.ramp
    if scaling.type == "llama3":
        turns = scaling.original_max_seq_len * plain / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        kept = 1 - _yarn_ramp(
            rotary_dim, theta, scaling.original_max_seq_len, (low, high), scaling.truncate, device
        )
    return stretched * (1 - kept) + plain * kept


def _yarn_ramp(
    rotary_dim: int,
    theta: float,
    length: int,
    turns: tuple[float, float],
    truncate: bool,
    device: torch.device | None,
) -> torch.Tensor:
    """[rotary_dim / 2], 0 up to the pair that makes the most `turns` over the length, 1 from the
    one that makes the fewest, straight between (arXiv 2309.00071, section 3.2; the bounds are those
    of its authors' code).
    """

    def pair_of(turns: float) -> float:
        return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    slow, fast = turns
    first, last = pair_of(fast), pair_of(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float32, device=device)
    return ((pairs - first) / (last - first)).clamp(0, 1)


def rotary_tables(
    positions: torch.Tensor, rotary_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding (arXiv 2104.09864), half-split layout as in Hugging
    Face; multiplied by what YaRN enlarges queries and keys by.

    positions: [B, S] int64, position of each token within its own document.
    Returns two fp32 tensors [B, S, rotary_dim / 2].
    """
    frequencies = inverse_frequencies(rotary_dim, theta, scaling, positions.device)
    angles = positions.float().unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    if scaling is None or scaling.table_factor == 1:
        return cos, sin
    return cos * scaling.table_factor, sin * scaling.table_factor


def apply_rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """Rotate the two halves of the first rotary_dim dimensions of every head, and multiply all of
    them by `scale`: x [B, S, heads, head_dim], tables [B, S, rotary_dim / 2]; fp32 inside.
    """
    values = x.float() if scale == 1 else x.float() * scale
    rotary_dim = 2 * cos.shape[-1]
    first, second = values[..., :rotary_dim].chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if rotary_dim < x.shape[-1]:
        parts.append(values[..., rotary_dim:])
    return torch.cat(parts, dim=-1).to(x.dtype)


def apply_trailing_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of the last rotary_dim dimensions of every head, as DeepSeek-V4
    does: x [B, S, heads, head_dim], tables [B, S, rotary_dim / 2]; fp32 inside. With -sin it turns
    back.
    """
    rotary_dim = 2 * cos.shape[-1]
    still, turned = x.split((x.shape[-1] - rotary_dim, rotary_dim), -1)
    even, odd = turned.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    return torch.cat((still, pairs.to(x.dtype)), -1)


def times(values: torch.Tensor, factor: float) -> torch.Tensor:
    """Most models multiply by 1, which would still cost a pass over memory."""
    return values if factor == 1 else values * factor
