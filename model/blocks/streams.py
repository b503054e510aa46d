"""Several residual streams with learned mixing: manifold-constrained hyper-connections (mHC, arXiv
2512.24880; DeepSeek-V4), over hyper-connections (arXiv 2409.19606).

A token's state is n vectors, which travel as one row of n D values. What a layer reads is a
weighted sum of them, what it computes is added to each with a weight of its own, and they are mixed
by a matrix whose rows and columns sum to 1, so that however many layers there are, mixing enlarges
nothing. All weights are made of the token's state.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.config import ModelConfig

FIRST_SCALE = 0.01
"""Of what the state says of its weights, at the start: the weights are almost their biases."""
FIRST_STAY = 4.0
"""How far the logit of a stream that goes on to itself begins above the others."""


class Opened(NamedTuple):
    """What a layer, attention or MLP, makes of a token's state before it computes."""

    read: torch.Tensor
    """[B, S, D], what it reads."""
    writes: torch.Tensor
    """[B, S, n], what its output is multiplied by on the way to each stream."""
    mixes: torch.Tensor
    """[B, S, n, n], from stream (row) to stream (column)."""


class StreamMixer(nn.Module):
    """The weights of one layer, each by logits a * (W norm(x)) + b of the token's state x:

        reads   sigmoid(.) + eps
        writes  2 sigmoid(.)
        mixes   doubly_stochastic(softmax over the columns of (.) + eps)

    fp32 inside, whatever the dtype of state and weights. It begins as one residual stream, but for
    the little that the state says: the streams are read as their mean, written to with weight 1,
    and stay for the most part what they are.

    weight: [2n + n n, n D], rows of reads, of writes and of mixes; bias: [2n + n n]; scale: [3].
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        number = self.number = config.num_residual_streams
        self.steps, self.eps, self.norm_eps = (
            config.sinkhorn_steps,
            config.sinkhorn_eps,
            config.norm_eps,
        )
        self.sizes = (number, number, number * number)
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), config.residual_size))
        stays = FIRST_STAY * torch.eye(number, device="cpu").flatten()
        first = torch.cat((first_reads(number), torch.zeros(number, device="cpu"), stays))
        self.bias = nn.Parameter(first)
        self.scale = nn.Parameter(torch.full((3,), FIRST_SCALE))

    def forward(self, state: torch.Tensor) -> Opened:
        """[B, S, n D] -> Opened."""
        whole = wide(state)
        logits = normed_product(whole, self.weight, self.norm_eps)
        parts = [
            scale * values + bias
            for values, scale, bias in zip(
                logits.split(self.sizes, -1),
                self.scale.to(whole.dtype),
                self.bias.to(whole.dtype).split(self.sizes),
                strict=True,
            )
        ]
        reads = parts[0].sigmoid() + self.eps
        mixes = parts[2].unflatten(-1, (self.number, self.number)).softmax(-1) + self.eps
        mixes = doubly_stochastic(mixes, self.steps, self.eps)
        return Opened(
            summed(reads, whole, self.number).to(state.dtype), 2 * parts[1].sigmoid(), mixes
        )


class StreamSum(nn.Module):
    """One vector of a token's streams, behind the last layer: their sum, weighted as StreamMixer
    reads. weight: [n, n D]; bias: [n]; scale: [1].
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        number = self.number = config.num_residual_streams
        self.eps, self.norm_eps = config.sinkhorn_eps, config.norm_eps
        self.weight = nn.Parameter(torch.empty(number, config.residual_size))
        self.bias = nn.Parameter(first_reads(number))
        self.scale = nn.Parameter(torch.full((1,), FIRST_SCALE))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """[B, S, n D] -> [B, S, D]."""
        whole = wide(state)
        logits = normed_product(whole, self.weight, self.norm_eps)
        reads = self.scale.to(whole.dtype) * logits + self.bias.to(whole.dtype)
        reads = reads.sigmoid() + self.eps
        return summed(reads, whole, self.number).to(state.dtype)


def wide(x: torch.Tensor) -> torch.Tensor:
    """In fp32; fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def first_reads(number: int) -> torch.Tensor:
    """[n], the logits of 1/n: the sum is the mean then."""
    return torch.full((number,), -math.log(number - 1), device="cpu")


def normed_product(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """fp32 [..., K] divided by its root mean square, times a matrix [R, K]: [..., R]. The division
    comes last, so that backward keeps x once.
    """
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return F.linear(x, weight.to(x.dtype)) * scale


def summed(weights: torch.Tensor, state: torch.Tensor, number: int) -> torch.Tensor:
    """Weights [B, S, n] of the streams in state [B, S, n D] -> [B, S, D]."""
    return torch.matmul(weights.unsqueeze(-2), state.unflatten(-1, (number, -1))).squeeze(-2)


def doubly_stochastic(matrices: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """Positive matrices [..., n, n] with columns and rows made to sum to 1 in turn, `steps` times
    columns and once less rows (Sinkhorn and Knopp, 1967). eps: added to every sum.
    """
    matrices = matrices / (matrices.sum(-2, keepdim=True) + eps)
    for _ in range(steps - 1):
        matrices = matrices / (matrices.sum(-1, keepdim=True) + eps)
        matrices = matrices / (matrices.sum(-2, keepdim=True) + eps)
    return matrices


def closed(state: torch.Tensor, opened: Opened, out: torch.Tensor) -> torch.Tensor:
    """The state [B, S, n D] behind a layer whose output is out [B, S, D]: stream k becomes
    sum_j mixes[j, k] x_j + writes[k] out. In the dtype of the state.
    """
    dtype = state.dtype
    streams = state.unflatten(-1, (opened.writes.shape[-1], -1))
    mixed = torch.matmul(opened.mixes.to(dtype).transpose(-1, -2), streams)
    return (mixed + opened.writes.to(dtype).unsqueeze(-1) * out.unsqueeze(-2)).flatten(-2)
