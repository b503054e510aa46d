"""Which ranks hold a parameter: the one rule behind gradients, ZeRO and the gradient norm.

Every rank computes a share of one sum over tokens that no other rank has. So the gradient of a
parameter is the sum over the ranks that hold a replica of it, whatever else is parallel, and the
squared norm of a family is added up once over the ranks that it is spread over.

| family | parameters | replicas | spread over |
|---|---|---|---|
| REPLICATED | all but those below | the stage | nothing |
| TENSOR | what tensor parallelism cuts (`cut_of`) | the tensor data group | the tensor group |
| EXPERT | the routed experts | the expert data group | the expert group |
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


class Family(enum.Enum):
    """Parameters that are held by the same ranks."""

    REPLICATED = enum.auto()
    TENSOR = enum.auto()
    EXPERT = enum.auto()


@dataclass(frozen=True)
class Cut:
    """How a parameter is shared out over a tensor group: in equal runs of one of its dimensions."""

    dim: int
    rank: int
    size: int
    stacked: int = 1
    """Matrices one above the other, each of which is cut by itself (gate and up)."""

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of the whole parameter, contiguous."""
        runs = [part.chunk(self.size, self.dim) for part in whole.chunk(self.stacked, self.dim)]
        return torch.cat([run[self.rank] for run in runs], self.dim)

    def whole(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse, of the parts of all ranks in their order."""
        runs = [part.chunk(self.stacked, self.dim) for part in parts]
        return torch.cat([run[i] for i in range(self.stacked) for run in runs], self.dim)

    def whole_shape(self, own: Sequence[int]) -> torch.Size:
        shape = list(own)
        shape[self.dim] *= self.size
        return torch.Size(shape)


def cut(parameter: torch.Tensor, how: Cut) -> None:
    """Mark a parameter as this rank's part of a larger one."""
    parameter.tensor_cut = how  # type: ignore[attr-defined]
    # megatron-core's and DeepSpeed's word for what not all data-parallel ranks hold.
    parameter.allreduce = False  # type: ignore[attr-defined]


def cut_of(parameter: nn.Parameter) -> Cut | None:
    """How it is shared out over the tensor group; None: every rank of that has all of it."""
    return getattr(parameter, "tensor_cut", None)


def own_shape(parameter: nn.Parameter) -> torch.Size:
    """As the model has it, also while ZeRO-3 has shared it out and it is empty."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Of what a parameter is this rank's part of; of others, and of experts, its own."""
    how, own = cut_of(parameter), own_shape(parameter)
    return own if how is None else how.whole_shape(own)


def own_part(parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """What a parameter holds of `whole_shape`: all of it where it is not cut."""
    how = cut_of(parameter)
    return whole if how is None else how.own(whole)


def family_of(parameter: nn.Parameter) -> Family:
    """By the marks of cut parameters, and by the one that megatron-core and DeepSpeed share for
    expert parameters.
    """
    if cut_of(parameter) is not None:
        return Family.TENSOR
    return Family.REPLICATED if getattr(parameter, "allreduce", True) else Family.EXPERT


def is_expert_parameter(parameter: nn.Parameter) -> bool:
    """Whether it is one of the routed experts."""
    return family_of(parameter) is Family.EXPERT
