"""Starts the kernels of the pool. Nothing here waits for the device.

Shape letters: as in pool.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.compile.launch import launch
from ops.compressed_attention.kernels.pool import (
    gated_pool_grad_kernel,
    gated_pool_kernel,
    unpooled_kernel,
)
from ops.sparse_attention.kernels.configs import next_power_of_two

RUN = 8
"""Windows of a program, whose shares of the bias are summed in order."""
TILE_VALUES = 4096


class PoolGrads(NamedTuple):
    content: Tensor
    """[T, p w], as gates."""
    gates: Tensor
    slot_bias: Tensor
    """[m, p w] fp32."""


def _config(size: int, width: int) -> dict[str, Any]:
    """Sizes of a program that has at most TILE_VALUES of a tensor at a time."""
    slots = next_power_of_two(size)
    channels = max(1, min(next_power_of_two(width), TILE_VALUES // slots))
    return {"SIZE": size, "SLOTS": slots, "CHANNELS": channels, "RUN": RUN}


def _rows(x: Tensor) -> Tensor:
    """With channels beside each other, whatever lies between tokens."""
    return x if x.stride(-1) == 1 else x.contiguous()


def pool(
    content: Tensor,
    gates: Tensor,
    slot_bias: Tensor,
    starts: Tensor,
    follows: Tensor,
    overlap: bool,
) -> Tensor:
    """Entries [M, w] of closed windows in the dtype of content; inputs as gated_pool has them."""
    content, gates = _rows(content), _rows(gates)
    size, row_size = slot_bias.shape
    width = row_size // 2 if overlap else row_size
    entries = content.new_empty(len(starts), width)
    config = _config(size, width)
    launch(
        gated_pool_kernel,
        (-(-len(starts) // RUN), -(-width // config["CHANNELS"])),
        content,
        gates,
        slot_bias.contiguous(),
        starts,
        follows.to(torch.int8),
        entries,
        len(starts),
        width,
        content.stride(0),
        gates.stride(0),
        OVERLAP=overlap,
        **config,
        num_warps=8,
    )
    return entries


def pool_backward(
    content: Tensor,
    gates: Tensor,
    slot_bias: Tensor,
    starts: Tensor,
    follows: Tensor,
    overlap: bool,
    dentries: Tensor,
) -> PoolGrads:
    """Gradients of content and gates in their dtypes; equal inputs give equal bits."""
    content, gates = _rows(content), _rows(gates)
    size, row_size = slot_bias.shape
    width = row_size // 2 if overlap else row_size
    config = _config(size, width)
    there = follows.to(torch.int8)
    dcontent, dgates = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (content, gates)
    )
    parts = -(-len(starts) // RUN)
    dbias = torch.empty(parts, size, row_size, dtype=torch.float32, device=content.device)
    launch(
        gated_pool_grad_kernel,
        (parts, -(-width // config["CHANNELS"])),
        content,
        gates,
        slot_bias.contiguous(),
        starts,
        there,
        dentries.contiguous(),
        dcontent,
        dgates,
        dbias,
        len(starts),
        width,
        content.stride(0),
        gates.stride(0),
        OVERLAP=overlap,
        **config,
        num_warps=8,
        maxnreg=255,  # else ptxas spills a few to let two programs run beside each other
    )
    launch(
        unpooled_kernel,
        (len(starts) + 1,),
        starts,
        there,
        dcontent,
        dgates,
        len(content),
        len(starts),
        width,
        OVERLAP=overlap,
        SIZE=size,
        TOKENS=4,
        CHANNELS=min(256, next_power_of_two(row_size)),
        num_warps=4,
    )
    return PoolGrads(dcontent, dgates, dbias.sum(0))
