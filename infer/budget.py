"""Budgets as data: a switch copies buffers into the memory where they are, and needs no text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from model.routers.base import Router


class RouterState(NamedTuple):
    """All that the experts of a router's tokens depend on, besides its weight."""

    balance_bias: torch.Tensor
    """[C] fp32."""
    control: torch.Tensor
    """[4] fp32."""

    @staticmethod
    def of(router: Router) -> RouterState:
        """A copy of what the router holds now."""
        return RouterState(*(getattr(router, name).clone() for name in RouterState._fields))


def capture(routers: Sequence[Router]) -> list[RouterState]:
    """The state of every MoE layer, in layer order."""
    return [RouterState.of(router) for router in routers]


@torch.no_grad()
def use(routers: Sequence[Router], states: Sequence[RouterState]) -> None:
    """Copy states into the routers; nothing is allocated, so a captured graph stays valid.

    Raises:
        ValueError: the states are of another model.
    """
    for router, state in zip(routers, states, strict=True):
        for name, value in zip(RouterState._fields, state, strict=True):
            buffer: torch.Tensor = getattr(router, name)
            if buffer.shape != value.shape:
                raise ValueError(
                    f"{name} of a saved budget is {list(value.shape)}, the model's "
                    f"{list(buffer.shape)}: it is another model's"
                )
            buffer.copy_(value)
