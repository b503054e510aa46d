"""The routers' state under other settings than those it was made with: what a resumed run may keep of it.

Some buffers hold a setting beside what was learned: the limit of experts per token, the width of the histogram's bins, the
steps left of a warm start or a fallback. A checkpoint says which settings those were (RoutingFacts); what they decide is
brought to what an uninterrupted run with the new ones would hold, and the rest stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from model.balance import histogram_bins
from model.budget import ARMED, BAD, COLLAPSED, HOLD, OVERLOAD
from model.config import BalanceConfig, BudgetConfig, FailSafeConfig
from model.routers.base import FALLBACK_K, LIMIT, SHARE, Router

State = list[dict[str, torch.Tensor]]
"""Buffers of every router, by name."""


@dataclass(frozen=True)
class RoutingFacts:
    """The settings that the buffers of all routers hold."""

    law: str
    score_function: str
    """With the law: what bias, cuts and theta mean."""
    max_experts: int
    target: float
    histogram_bins: int
    warm_start_steps: int
    hold_steps: int
    collapse: bool
    overload: bool
    """Whether F2 and F5 can act."""
    spike: bool
    """Whether F4 keeps snapshots."""

    @staticmethod
    def of(routers: list[Router], balance: BalanceConfig, budget: BudgetConfig, fail_safe: FailSafeConfig,
           shares: torch.Tensor | None) -> RoutingFacts | None:
        """None without routers. shares: of model.balance.rank_shares."""
        if not routers:
            return None
        first = routers[0]
        warm = first.budget is not None and first.law != "relu"
        return RoutingFacts(first.law, first.spec.score_function, first.spec.max_experts, first.target,
                            histogram_bins(balance, first), budget.warm_start_steps if warm else 0, budget.hold_steps,
                            fail_safe.collapse_share < 1, fail_safe.rank_overload > 0 and shares is not None,
                            fail_safe.spike_zscore > 0)

    @staticmethod
    def read(saved: Mapping[str, Any] | None) -> RoutingFacts | None:
        """From a checkpoint's state; None: it is of a version that did not say."""
        return None if saved is None else RoutingFacts(**saved)


def state_of(routers: list[Router]) -> State:
    """Copies of all buffers: before a checkpoint is loaded, the state that a new run would start with."""
    return [{name: buffer.clone() for name, buffer in router.named_buffers()} for router in routers]


@torch.no_grad()
def adopt_state(routers: list[Router], fresh: State, before: RoutingFacts | None, after: RoutingFacts, updates: int) -> bool:
    """Bring the state that a checkpoint has restored to the present settings; nothing moves where they are the same.

    Args:
        routers: with the restored state; fresh: what state_of gave before.
        before: settings of the checkpoint, None if it does not say; after: the present ones.
        updates: of the controllers so far.

    Returns:
        Whether the state starts anew: bias, cuts and theta of another kind of router or score mean nothing to this one.
    """
    if before is not None and (before.law, before.score_function) != (after.law, after.score_function):
        for router, initial in zip(routers, fresh, strict=True):
            for name, buffer in router.named_buffers():
                buffer.copy_(initial[name])
        return True
    most = before.max_experts if before is not None else max(float(router.control[LIMIT]) for router in routers)
    for router, initial in zip(routers, fresh, strict=True):
        _adopt_limits(router, initial, float(most), after)
        if before is not None:
            _adopt_fallbacks(router, before, after, updates)
            _adopt_histogram(router, initial, before, after)
    return False


def _adopt_limits(router: Router, initial: dict[str, torch.Tensor], most: float, after: RoutingFacts) -> None:
    """Most experts per token: the setting, unless F5 has lowered it and still can raise it again; and k of plain top-k."""
    control, state = router.control, router.controller
    lowered = after.overload and float(control[LIMIT]) < most
    control[LIMIT] = min(float(control[LIMIT]), float(after.max_experts)) if lowered else float(after.max_experts)
    if not after.overload:
        state[OVERLOAD] = 0.0
    if not after.collapse and state[COLLAPSED] > 0:
        state[COLLAPSED] = state[HOLD] = 0.0
    if state[COLLAPSED] == 0:
        control[FALLBACK_K] = initial["control"][FALLBACK_K]


def _adopt_fallbacks(router: Router, before: RoutingFacts, after: RoutingFacts, updates: int) -> None:
    """What is left of the warm start and of fallbacks, as if the present settings had held from the start."""
    control, state = router.control, router.controller
    if before.target != after.target:  # another budget is no failure to hold the one before
        state[ARMED] = state[BAD] = 0.0
    old, new = (max(0.0, float(facts.warm_start_steps - updates)) for facts in (before, after))
    if state[COLLAPSED] == 0 and float(state[HOLD]) == old:  # in the warm start, or held by nothing
        if old != new:
            state[HOLD] = new
            control[SHARE] = 0.0 if new > 0 else control[SHARE]
    elif state[HOLD] > 0:
        state[HOLD] = (state[HOLD] + after.hold_steps - before.hold_steps).clamp_min(0)


def _adopt_histogram(router: Router, initial: dict[str, torch.Tensor], before: RoutingFacts, after: RoutingFacts) -> None:
    """Bins per unit of the score, so that the range of the histogram stays; a new one begins as in a new run."""
    if not before.histogram_bins:
        router.histogram_range.copy_(initial["histogram_range"])
    elif after.histogram_bins:
        router.histogram_range[:, 1] *= after.histogram_bins / before.histogram_bins
