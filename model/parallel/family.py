"""Which ranks hold a parameter: the one rule behind gradients, ZeRO and the gradient norm.

Every rank computes a share of one sum over tokens that no other rank has. So the gradient of a
parameter is the sum over the ranks that hold a replica of it, whatever else is parallel, and the
squared norm of a family is added up once over the ranks that it is spread over.

| family | parameters | replicas | spread over |
|---|---|---|---|
| REPLICATED | all but the routed experts | the stage | nothing |
| EXPERT | the routed experts | the expert data group | the expert group |
"""

from __future__ import annotations

import enum

from torch import nn


class Family(enum.Enum):
    """Parameters that are held by the same ranks."""

    REPLICATED = enum.auto()
    EXPERT = enum.auto()


def family_of(parameter: nn.Parameter) -> Family:
    """By the mark that megatron-core and DeepSpeed share for expert parameters."""
    return Family.REPLICATED if getattr(parameter, "allreduce", True) else Family.EXPERT


def is_expert_parameter(parameter: nn.Parameter) -> bool:
    """Whether it is one of the routed experts."""
    return family_of(parameter) is Family.EXPERT
