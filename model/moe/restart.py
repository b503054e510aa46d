"""The routers' state under other settings than those it was made with: what a resumed run may keep
of it.

Some buffers hold a setting beside what was learned: the limit of experts per token, the width of
the histogram's bins, the steps left of a warm start or a fallback. A checkpoint says which settings
those were (RoutingFacts); what they decide is brought to what an uninterrupted run with the new
ones would hold, and the rest stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from model.config import BalanceConfig, BudgetConfig, FailSafeConfig
from model.moe.balance import histogram_bins
from model.routers.base import Router
from model.routers.state import RouterInputs

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
    """Whether a lowered limit can still be raised: with `collapse`, which fallbacks can act."""
    spike: bool
    """Whether snapshots of the weights are kept, for the steps after a spike."""

    @staticmethod
    def of(
        first: Router | None,
        balance: BalanceConfig,
        budget: BudgetConfig,
        fail_safe: FailSafeConfig,
        shares: torch.Tensor | None,
    ) -> RoutingFacts | None:
        """first: any of the routers, None where there are none. shares: of
        model.moe.balance.rank_shares.
        """
        if first is None:
            return None
        warm = first.budget is not None and first.law != "relu"
        return RoutingFacts(
            first.law,
            first.spec.score_function,
            first.spec.max_experts,
            first.target,
            histogram_bins(balance, first),
            budget.warm_start_steps if warm else 0,
            budget.hold_steps,
            fail_safe.collapse_share < 1,
            fail_safe.rank_overload > 0 and shares is not None,
            fail_safe.spike_zscore > 0,
        )

    @staticmethod
    def read(saved: Mapping[str, Any] | None) -> RoutingFacts | None:
        """From a checkpoint's state; None: it is of a version that did not say."""
        return None if saved is None else RoutingFacts(**saved)


def state_of(routers: list[Router]) -> State:
    """Copies of all buffers but the tables, which belong to the weights: before a checkpoint is
    loaded, the state that a new run would start with.
    """
    return [
        {name: buffer.clone() for name, buffer in router.named_buffers() if name != "hash_table"}
        for router in routers
    ]


@torch.no_grad()
def adopt_state(
    routers: list[Router],
    fresh: State,
    before: RoutingFacts | None,
    after: RoutingFacts,
    updates: int,
) -> bool:
    """Bring the state that a checkpoint has restored to the present settings; nothing moves where
    they are the same.

    Args:
        routers: with the restored state; fresh: what state_of gave before.
        before: settings of the checkpoint, None if it does not say; after: the present ones.
        updates: of the controllers so far.

    Returns:
        Whether the state starts anew: bias, cuts and theta of another kind of router or score mean
        nothing to this one.
    """
    kind = (after.law, after.score_function)
    if before is not None and (before.law, before.score_function) != kind:
        for router, initial in zip(routers, fresh, strict=True):
            for name, value in initial.items():
                router.get_buffer(name).copy_(value)
        return True

    # Where the checkpoint does not say, the highest limit counts as one that no overload lowered.
    if before is not None:
        most = float(before.max_experts)
    else:
        most = max(float(router.router_inputs.limit) for router in routers)
    for router, initial in zip(routers, fresh, strict=True):
        _adopt_limits(router, initial, most, before, after)
        if before is not None:
            _adopt_fallbacks(router, before, after, updates)
            _adopt_histogram(router, initial, before, after)
    return False


def _adopt_limits(
    router: Router,
    initial: dict[str, torch.Tensor],
    most: float,
    before: RoutingFacts | None,
    after: RoutingFacts,
) -> None:
    """Most experts per token: the setting, unless an overload has lowered it and still can raise it
    again; and k of plain top-k, which under a broken budget is one whole number and the other in
    turn, and goes on where it is if the budget does.
    """
    inputs, state = router.router_inputs, router.controller_state
    same_k = before is not None and (before.target, before.max_experts) == (
        after.target,
        after.max_experts,
    )
    limit, highest = float(inputs.limit), float(after.max_experts)
    lowered = after.overload and limit < most
    inputs.limit.fill_(min(limit, highest) if lowered else highest)
    if not after.overload:
        state.overload.fill_(0.0)
    if not after.collapse and state.collapsed > 0:
        state.collapsed.fill_(0.0)
        state.hold.fill_(0.0)
        same_k = False
    if state.collapsed == 0 and not same_k:
        inputs.fallback_k.copy_(RouterInputs.of(initial["control"]).fallback_k)


def _adopt_fallbacks(
    router: Router, before: RoutingFacts, after: RoutingFacts, updates: int
) -> None:
    """What is left of the warm start and of fallbacks, as if the present settings had held from the
    start.
    """
    inputs, state = router.router_inputs, router.controller_state
    # another budget is no failure to hold the one before
    if before.target != after.target:
        state.armed.fill_(0.0)
        state.bad.fill_(0.0)
    old, new = (max(0.0, float(facts.warm_start_steps - updates)) for facts in (before, after))
    # in the warm start, or held by nothing
    if state.collapsed == 0 and float(state.hold) == old:
        if old != new:
            state.hold.fill_(new)
            if new > 0:
                inputs.share.fill_(0.0)
    elif state.hold > 0:
        state.hold.copy_((state.hold + after.hold_steps - before.hold_steps).clamp_min(0))


def _adopt_histogram(
    router: Router, initial: dict[str, torch.Tensor], before: RoutingFacts, after: RoutingFacts
) -> None:
    """Bins per unit of the score, so that the range of the histogram stays; a new one begins as in
    a new run.
    """
    if not before.histogram_bins:
        router.histogram_range.copy_(initial["histogram_range"])
    elif after.histogram_bins:
        router.histogram_range[:, 1] *= after.histogram_bins / before.histogram_bins
