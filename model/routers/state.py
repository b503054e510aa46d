"""The columns of a router's small buffers, by name.

The buffers keep the names under which checkpoints hold them, `control` and `controller`; here their
places get names. Every field is a view, so that writing into one in place (fill_, copy_, add_)
writes into the buffer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class RouterState(NamedTuple):
    """All that the experts of a router's tokens depend on, besides its weight: what a budget is.
    Stacked over a first dimension it is a table of P budgets.
    """

    balance_bias: torch.Tensor
    """[C] fp32, or [P, C]."""
    control: torch.Tensor
    """[4] fp32, or [P, 4]."""


class RouterInputs(NamedTuple):
    """What the routing op reads of a router's controllers (ops.router.route, router_inputs).

    Views of [] for one router's buffer [4], of [L] for those of L layers [L, 4], of [P] for a table
    of budgets.
    """

    value: torch.Tensor
    """The mode's own: P of top_p, the cut of threshold and relu."""
    share: torch.Tensor
    """Share of the mode against plain top-k; 1: the mode alone."""
    fallback_k: torch.Tensor
    """Experts per token of that plain top-k."""
    limit: torch.Tensor
    """Most experts that a token may have now."""

    @staticmethod
    def of(buffer: torch.Tensor) -> RouterInputs:
        """The fields of a buffer [..., 4]."""
        return RouterInputs(buffer[..., 0], buffer[..., 1], buffer[..., 2], buffer[..., 3])


class ControllerState(NamedTuple):
    """What the budget controller and the fallbacks remember between steps (model/moe/budget.py).

    Views of [] for one router's buffer [7], of [L] for those of L layers [L, 7].
    """

    theta: torch.Tensor
    """The controller's integral; what it moves is a matter of the law."""
    error: torch.Tensor
    """Smoothed relative error of the mean experts per token."""
    armed: torch.Tensor
    """Steps near the budget so far."""
    bad: torch.Tensor
    """Steps in a row that were too far from it."""
    hold: torch.Tensor
    """Steps of plain top-k that are left of a warm start or a fallback."""
    overload: torch.Tensor
    """Steps with an overloaded rank, less those without one, since the limit last moved."""
    collapsed: torch.Tensor
    """1 while a collapse is what holds the layer at plain top-k, else 0."""

    @staticmethod
    def of(buffer: torch.Tensor) -> ControllerState:
        """The fields of a buffer [..., 7]."""
        return ControllerState(
            buffer[..., 0],
            buffer[..., 1],
            buffer[..., 2],
            buffer[..., 3],
            buffer[..., 4],
            buffer[..., 5],
            buffer[..., 6],
        )
