"""What ZeRO's master weights are made of: which parameters lie where in the flat tensors that the
optimizer updates. DeepSpeed's private parts that it reads are those of the pinned version.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.config.kinds import num_parts
from train.engine.muon.exchange import Layout
from train.engine.muon.optimizer import Muon
from train.engine.muon.pieces import Block, Slices


def place_matrices(
    optimizer: Muon, model: nn.Module, deepspeed_optimizer: Any, stage: int, device: torch.device
) -> None:
    """Tell a Muon which matrices its parameters hold, under a ZeRO stage.

    Args:
        deepspeed_optimizer: what deepspeed.initialize returned; stage 0 has the Muon itself there,
            with the model's parameters.
        device: where matrices are orthogonalised.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_stage = {0: _whole, 1: _sliced_groups, 2: _sliced_groups, 3: _sliced_parameters}
    optimizer.place(dict(by_stage[stage](optimizer, names, deepspeed_optimizer)), device)


def matrices_of(name: str, shape: torch.Size, first: int = 0) -> list[Block]:
    """The matrices that a parameter holds, in the order of its elements: itself, the halves of gate
    and up, or those of every expert that it stacks.

    Args:
        first: number of its first element.
    """
    *stacked, rows, columns = shape
    number = num_parts(name)
    rows //= number
    size = rows * columns
    return [Block(first + i * size, rows, columns) for i in range(math.prod(stacked) * number)]


Names = dict[nn.Parameter, str]
Placed = Iterator[tuple[Tensor, Layout]]


def _whole(optimizer: Muon, names: Names, deepspeed_optimizer: Any) -> Placed:
    """Stage 0: every rank has every parameter, and orthogonalises it."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["muon"] else ():
            slices = Slices(parameter.numel())
            blocks = matrices_of(names[parameter], parameter.shape)
            yield parameter, Layout((block, slices) for block in blocks)


def _sliced_groups(optimizer: Muon, names: Names, zero: Any) -> Placed:
    """Stages 1 and 2: the parameters of a group stand one behind the other, with gaps between, and
    every rank has a slice of that.
    """
    for i, group in enumerate(optimizer.param_groups):
        if not group["muon"]:
            continue
        slices = Slices(int(zero.partition_size[i]))
        blocks = [
            (block, slices)
            for parameter, first in zip(
                zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True
            )
            for block in matrices_of(names[parameter], parameter.shape, first)
        ]
        process_group = zero.real_dp_process_group[i]
        size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        yield (
            zero.single_partition_of_fp32_groups[i],
            Layout(blocks, size, rank, process_group),
        )


def _sliced_parameters(optimizer: Muon, names: Names, zero: Any) -> Placed:
    """Stage 3: every rank has a slice of every parameter, and those of some parameters stand one
    behind the other.
    """
    for i, parameters in enumerate(zero.fp16_groups):
        if not optimizer.param_groups[zero.sub_group_to_group_id[i]]["muon"]:
            continue
        blocks, offset = [], 0
        for parameter in parameters:
            slices = Slices(parameter.ds_tensor.ds_numel, offset)
            shape = torch.Size(parameter.ds_shape)
            blocks += [(block, slices) for block in matrices_of(names[parameter], shape)]
            offset += parameter.ds_tensor.ds_numel
        # A group has dense parameters or experts, so that its ranks are the same for all of it.
        process_group = parameters[0].ds_process_group
        size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        assert offset == zero.fp32_partitioned_groups_flat[i].numel()
        yield zero.fp32_partitioned_groups_flat[i], Layout(blocks, size, rank, process_group)
