"""Budgets as data: a switch copies buffers into the memory where they are, and needs no text. A
table of them lets every row of a batch have its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from model.routers.base import Router
from model.routers.state import RouterState

__all__ = ["BudgetRows", "RouterState", "capture", "use"]


def capture(routers: Sequence[Router]) -> list[RouterState]:
    """A copy of what every MoE layer's router holds now, in layer order."""
    return [RouterState(r.balance_bias.clone(), r.control.clone()) for r in routers]


class BudgetRows:
    """Budgets that the requests of one batch may have, stacked by layer: tokens name the row that
    their routers read (ops.router.route, row_of), so one forward pass serves all of them.

    Args:
        routers: of the model; states: by budget, None for the routers as they are now.

    Raises:
        ValueError: states are of another model.
    """

    def __init__(
        self, routers: Sequence[Router], states: Mapping[float | None, Sequence[RouterState]]
    ):
        for layers in states.values():
            _require_same(routers, layers)
        self.number = {budget: row for row, budget in enumerate(states)}
        self.tables = tuple(
            RouterState(*(torch.stack(parts) for parts in zip(*of_layer, strict=True)))
            for of_layer in zip(*states.values(), strict=True)
        )
        """By layer: balance_bias [P, C] and control [P, 4]."""

    def __contains__(self, budget: float | None) -> bool:
        return budget in self.number

    @property
    def names(self) -> list[float]:
        """The budgets but that of the routers as they are."""
        return [budget for budget in self.number if budget is not None]


@torch.no_grad()
def use(routers: Sequence[Router], states: Sequence[RouterState]) -> None:
    """Copy states into the routers; nothing is allocated, so a captured graph stays valid.

    Raises:
        ValueError: the states are of another model.
    """
    _require_same(routers, states)
    for router, state in zip(routers, states, strict=True):
        router.balance_bias.copy_(state.balance_bias)
        router.control.copy_(state.control)


def _require_same(routers: Sequence[Router], states: Sequence[RouterState]) -> None:
    if len(routers) != len(states):
        raise ValueError(
            f"a saved budget is of {len(states)} MoE layers, the model has {len(routers)}: it is "
            "another model's"
        )
    for router, state in zip(routers, states, strict=True):
        for name, value in zip(RouterState._fields, state, strict=True):
            buffer: torch.Tensor = getattr(router, name)
            if buffer.shape != value.shape:
                raise ValueError(
                    f"{name} of a saved budget is {list(value.shape)}, the model's "
                    f"{list(buffer.shape)}: it is another model's"
                )
