"""Weights without masters, whole: those that are not trained, and all before there is an
optimizer. DeepSpeed has no way of its own to read or set them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


@torch.no_grad()
def read_frozen(parameter: nn.Parameter) -> torch.Tensor:
    """The whole parameter, in its own dtype. Under ZeRO-3 collective over the ranks that share
    it.
    """
    if not hasattr(parameter, "ds_tensor"):
        return parameter.data
    part = parameter.ds_tensor.data
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    shape = torch.Size(parameter.ds_shape)  # type: ignore[attr-defined]
    return torch.cat([p.flatten() for p in parts])[: shape.numel()].view(shape)


@torch.no_grad()
def write_frozen(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Set this rank's part of a parameter from the whole. Nothing here is collective."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(value)
        return
    part = parameter.ds_tensor.data
    size = part.numel()
    rank = dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    mine = value.flatten()[rank * size : (rank + 1) * size]
    part.flatten()[: len(mine)].copy_(mine)
    # Small parameters stay whole on every rank as well.
    if parameter.data.shape == value.shape:
        parameter.data.copy_(value)
