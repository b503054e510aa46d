"""Holding the mean number of experts per token to a budget, and falling back where that fails.

Once per optimiser step, from the integer statistics of the whole step over all ranks: every rank
computes the same bits. Per layer, with the step's error e = (mean experts - budget) / budget and
two states in fp32, the smoothed error s and theta:

    s     <- m s + (1 - m) e                            m: budget.error_momentum
    theta <- clip(theta + Kp (s - s_before) + Ki s)     velocity form of a PI controller: no wind-up

Nothing cuts off a step. Both lines are linear, so that the sum of all errors is the way theta went
over Ki: the mean error goes to 0 whatever the noise of single steps looks like. A limit on the step
would let the rare large errors of skewed noise count for less than the many small ones and hold the
mean above the budget (docs/log.md). Smoothing the error keeps one odd step from moving much, and
with m = 0.8 nearly cancels the zero of the PI law: what remains is an integrator of gain (1 - m)
(Kp + Ki), stable for plants from a tenth to ten times the gain of the quantile law. A layer whose
feed-forward has yet to find its scores (far off, and never near the budget so far) leaves theta
alone for guard_steps (relu: five times).

law        what theta moves                                     feed-forward
quantile   the share the cuts aim at: budget * exp(-theta) / E  cuts = quantiles of the scores'
           (and each expert's own by share_trim, from its real  histogram
           load)
relu       the same, of logits: a cut is subtracted before the ReLU
null       the same, of scores over the null expert to beat (ops/router): null experts have no
           bias, so that the level of the experts' biases decides how many of the ranks they win
top_p      logit(P) = logit(P0) - theta

A layer starts with plain top-k (warm start; not with relu) and moves to its mode over blend_steps;
with null experts at once, since they either take ranks or do not. Two fallbacks bring it back to
plain top-k of the experts alone for hold_steps: the guard (the smoothed error or the share of
capped tokens stays large; not with relu), whose mean is the budget, and a collapse (a few experts
take nearly everything), with one. Sources: arXiv 2512.13996, 2412.14711, 2603.11535; the gains are
ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from model.config import BalanceConfig, BudgetConfig, FailSafeConfig
from model.moe.balance import (
    LayerStats,
    busiest_experts,
    quantile_cuts,
    rank_loads,
    update_balance_bias,
)
from model.routers.base import Router
from model.routers.state import ControllerState, RouterInputs
from ops.router import Reason

SHARE_LIMITS = (-2.0, 3.0)
"""Range of theta where it moves the share that cuts aim at."""
TOP_P_LIMITS = (-8.0, 8.0)
"""Range of theta where it moves logit(P)."""
TOP_P_KI = 2.0
"""Factor on Ki of the top_p law. No feed-forward follows a P that has to move steadily while the
scores sharpen, so the mean stays off by the rate of that over Ki.
"""
TRIM_RATE = 0.05
"""Step of share_trim for an expert whose load is twice the mean."""
TRIM_LIMIT = 1.5
"""Bound of share_trim on both sides; a share is multiplied by its exponential."""
RELU_LEAD = 0.7
"""How far ReLU cuts go beyond the last quantile, in parts of the way to it, until the budget was
met once.
"""
SHIFT_DECAY = 0.9
"""Kept each step of a shift of the null experts' logits, which only checkpoints of earlier versions
hold.
"""


@torch.no_grad()
def start_routers(routers: list[Router], budget: BudgetConfig, fail_safe: FailSafeConfig) -> None:
    """The state before the first step: plain top-k where there is a warm start, snapshots of the
    weights where a spike of the gradient norm is watched for.
    """
    for router in routers:
        router.watch.started = True
        # Experts that a ReLU does not choose have a gate of zero: plain top-k would visit them for
        # nothing.
        if router.budget is not None and router.law != "relu" and budget.warm_start_steps > 0:
            router.router_inputs.share.fill_(0.0)
            router.controller_state.hold.fill_(float(budget.warm_start_steps))
        if fail_safe.spike_zscore > 0:
            router.keep_snapshots()


@torch.no_grad()
def update_routers(
    routers: list[Router],
    stats: LayerStats,
    balance: BalanceConfig,
    budget: BudgetConfig,
    fail_safe: FailSafeConfig,
    shares: torch.Tensor | None = None,
    freeze_bias: bool = False,
    of_all_layers: Callable[[torch.Tensor], torch.Tensor] = lambda own: own,
) -> None:
    """Move bias, cuts, controllers and fallbacks of all MoE layers by one optimiser step.

    stats: of the step, over all micro-batches and ranks, one row per layer. The routers are of one
        kind.
    shares: of model.moe.balance.rank_shares; None where no ranks share the experts. freeze_bias:
        leave the selection bias (and what else _update_bias moves) as it is.
    of_all_layers: [L] of these routers -> of all layers of the model, where others are on other
        stages of a pipeline; called once where budget.scope is "model", and collective there.
    """
    first = routers[0]
    control = torch.stack([router.control for router in routers])
    controller = torch.stack([router.controller for router in routers])
    inputs = RouterInputs.of(control)
    state = ControllerState.of(controller)

    # What the step was, before anything moves: a collapsed layer's loads say nothing of balance.
    has_tokens = stats.tokens > 0
    plain = inputs.share < 1  # as the step was routed
    movable = torch.tensor([router.is_balanced for router in routers], device=control.device)
    collapsed = _collapsed(stats, fail_safe) & has_tokens & movable
    frozen = (state.collapsed > 0) | collapsed

    # Each moves its own columns of all layers at once.
    if first.budget is not None:
        _hold_budget(first, inputs, state, stats, budget, has_tokens, of_all_layers)
    _fall_back(first, inputs, state, budget, collapsed)
    _limit_overload(first, inputs, state, stats, fail_safe, shares)
    _apply_theta(first, inputs, state)

    for i, router in enumerate(routers):
        router.control.copy_(control[i])
        router.controller.copy_(controller[i])
        router.watch.moved()
    if not freeze_bias:
        _update_bias(routers, stats, balance, state, has_tokens & ~frozen & movable, plain)


@torch.no_grad()
def hold_plain_top_k(routers: list[Router], budget: BudgetConfig) -> None:
    """Bring every adaptive layer back to plain top-k for hold_steps from now on."""
    for router in routers:
        if router.budget is not None and router.law != "relu":
            router.controller_state.hold.fill_(float(max(1, budget.hold_steps)))


def _hold_budget(
    first: Router,
    inputs: RouterInputs,
    state: ControllerState,
    stats: LayerStats,
    budget: BudgetConfig,
    has_tokens: torch.Tensor,
    of_all_layers: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """The PI step on theta."""
    target, share = first.target, inputs.share
    # Under a blend, the mode's own mean is what remains after the part of plain top-k.
    plain_part = (1 - share) * inputs.fallback_k
    mode_mean = (stats.experts_per_token - plain_part) / share.clamp_min(0.25)

    error = (mode_mean - target) / target
    if budget.scope == "model":
        error = of_all_layers(error).mean().expand_as(error)

    # With little of the mode in the blend, dividing by its share would only raise noise.
    active = (share >= 0.25) & has_tokens
    before = torch.where(state.error.isfinite(), state.error, 0.0)

    # zero: nothing to remember yet
    kept = torch.where(before == 0, 0.0, budget.error_momentum)
    error = kept * before + (1 - kept) * error

    ki = budget.ki * (TOP_P_KI if first.law == "top_p" else 1.0)
    theta = state.theta + budget.kp * (error - before) + ki * error
    theta = theta.clamp(*(TOP_P_LIMITS if first.law == "top_p" else SHARE_LIMITS))

    # A feed-forward that has yet to find the scores is far off for some steps, and theta would have
    # to pay them back. ReLU routing starts dense and takes longer.
    patience = budget.guard_steps * (5 if first.law == "relu" else 1)
    near = error.abs() < budget.guard_error / 2
    finding = ~_is_armed(state, budget) & (state.bad < patience) & ~near
    moves = active & theta.isfinite() & ~(finding & first.has_quantile_bias)
    state.theta.copy_(torch.where(moves, theta, state.theta))
    state.error.copy_(torch.where(active, error, 0.0))

    # A step on the way back to the mode says nothing of whether the mode holds its budget.
    steady = active & (share == 1)
    state.armed.add_((steady & near).float())

    capped = stats.reasons[:, Reason.CAPPED.bit].float() / stats.tokens.clamp_min(1).float()
    # Before it is armed a layer has nothing to lose, and no error between the two limits may last
    # unseen.
    allowed = torch.where(_is_armed(state, budget), budget.guard_error, budget.guard_error / 2)
    bad = (error.abs() > allowed) | (capped > budget.guard_capped) | ~theta.isfinite()
    state.bad.copy_(torch.where(steady & bad, state.bad + 1, 0.0))


def _fall_back(
    first: Router,
    inputs: RouterInputs,
    state: ControllerState,
    budget: BudgetConfig,
    collapsed: torch.Tensor,
) -> None:
    """Warm start, guard, collapse: the share of the mode and the plain top-k beside it."""
    # longer for a layer that has yet to find its budget
    patience = torch.where(_is_armed(state, budget), 1.0, 5.0)
    # see start_routers
    guard = (state.bad >= patience * budget.guard_steps) & (first.law != "relu")
    falls = guard | collapsed
    left = torch.where(falls, float(budget.hold_steps), (state.hold - 1).clamp_min(0))
    state.hold.copy_(left)
    state.bad.copy_(torch.where(falls, 0.0, state.bad))
    state.armed.copy_(torch.where(falls, 0.0, state.armed))

    # A collapse lasts as long as its hold, and visits one expert; other fallbacks keep the budget.
    held = state.hold > 0
    state.collapsed.copy_(torch.where(collapsed, 1.0, torch.where(held, state.collapsed, 0.0)))
    plain_k = torch.where(state.collapsed > 0, 1.0, _plain_k(first, state.hold))
    inputs.fallback_k.copy_(plain_k)

    # Back to the mode in steps, but with null experts, which either take ranks or do not.
    gradual = first.budget is not None and not first.spec.num_null_experts
    blend = 1.0 / max(1, budget.blend_steps) if gradual else 1.0
    inputs.share.copy_(torch.where(held, 0.0, (inputs.share + blend).clamp(max=1.0)))


def _is_armed(state: ControllerState, budget: BudgetConfig) -> torch.Tensor:
    """[L] bool: near the budget for guard_steps, all together. To cross it on the way is not to
    have found it.
    """
    return state.armed >= budget.guard_steps


def _plain_k(first: Router, steps_left: torch.Tensor) -> torch.Tensor:
    """[L] experts per token of plain top-k: the budget's lower and upper whole number in turn, so
    that their mean over the steps of a fallback is the budget; rounded outside of one.
    """
    in_turn = (first.target * (steps_left + 1)).floor() - (first.target * steps_left).floor()
    plain_k = torch.where(steps_left > 0, in_turn, float(round(first.target)))
    return plain_k.clamp(1.0, float(first.spec.max_experts))


def _collapsed(stats: LayerStats, fail_safe: FailSafeConfig) -> torch.Tensor:
    """[L] bool: the busiest round(k) experts take nearly all assignments, and they are at most a
    quarter of all.
    """
    num_experts = stats.counts.shape[1]
    busiest, most, total = busiest_experts(stats.counts, stats.experts_per_token)
    share = most.float() / total.clamp_min(1).float()
    return (
        (share >= fail_safe.collapse_share)
        & (4 * busiest <= num_experts)
        & (fail_safe.collapse_share < 1)
    )


def _limit_overload(
    first: Router,
    inputs: RouterInputs,
    state: ControllerState,
    stats: LayerStats,
    fail_safe: FailSafeConfig,
    shares: torch.Tensor | None,
) -> None:
    """Overload: fewer experts per token while one rank of the expert group has far more to do than
    the others.
    """
    if fail_safe.rank_overload == 0 or shares is None:
        return
    load = rank_loads(stats.counts, shares)
    over = load.max(1).values > fail_safe.rank_overload * load.mean(1)

    # One step over counts for one under: only a lasting overload moves the limit, and only a
    # lasting relief moves it back.
    count = state.overload + torch.where(over, 1.0, -1.0)
    lower, raise_ = count >= fail_safe.overload_steps, count <= -fail_safe.overload_steps

    # Half of the budget is left to the tokens whatever the ranks have to do.
    least = float(max(1, first.spec.min_experts, math.ceil(first.target / 2)))
    limit = inputs.limit - lower.float() + raise_.float()
    inputs.limit.copy_(limit.clamp(min=least, max=float(first.spec.max_experts)))
    state.overload.copy_(torch.where(lower | raise_, 0.0, count))


def _apply_theta(first: Router, inputs: RouterInputs, state: ControllerState) -> None:
    """What the op reads of theta; the laws with quantiles read it in _trimmed_shares."""
    if first.law == "top_p":
        start = math.log(first.initial_value / (1 - first.initial_value))
        inputs.value.copy_((start - state.theta).sigmoid())
    elif first.law == "null":
        inputs.value.mul_(SHIFT_DECAY)


def _update_bias(
    routers: list[Router],
    stats: LayerStats,
    balance: BalanceConfig,
    state: ControllerState,
    allowed: torch.Tensor,
    plain: torch.Tensor,
) -> None:
    """Selection bias of all layers; `allowed` [L]: not of those that are frozen or saw no token;
    `plain` [L]: where the step had a part of plain top-k.
    """
    first = routers[0]
    num_experts = first.spec.num_experts
    before = torch.stack([r.balance_bias for r in routers])

    # The share of the tokens that each expert's cut aims at: what it has, or what theta and its
    # real load ask for.
    if first.has_quantile_bias or balance.bias_update == "quantile":
        share = (stats.experts_per_token / num_experts).unsqueeze(1).expand(-1, num_experts)
        if first.has_quantile_bias:
            share = _trimmed_shares(routers, stats, state, allowed)

        ranges = torch.stack([r.histogram_range for r in routers])
        cuts, ranges = quantile_cuts(stats, ranges, share)
        old = before[:, :num_experts]
        # its bins hold logits that have the old bias already
        bias = old - cuts if first.law == "relu" else -cuts
        bias = _at_level(first, bias, old, plain)

        fresh = (old == 0).all(1, keepdim=True)  # nothing to remember yet

        # Logits of ReLU routing all drift up while its gates grow: no average over past cuts, and
        # beyond the last one until a step was near the budget.
        momentum = torch.full_like(share[:, :1], balance.quantile_momentum)
        if first.law == "relu":
            was_near = state.armed.unsqueeze(1) > 0
            momentum = torch.where(was_near, 0.0, momentum.new_tensor(-RELU_LEAD))

        kept = torch.where(fresh, 0.0, momentum)
        bias = torch.where(allowed.unsqueeze(1), kept * old + (1 - kept) * bias, old)

        # The histogram counts logits with the bias in them; its range moves along.
        if first.law == "relu":
            ranges[..., 0] += bias - old

        if first.law == "null":
            # Where null experts come back, scores are counted over other keys from now on. Experts
            # start behind them: bars are exact for a token's first expert, so that the level is
            # found from below in a few steps.
            blended = torch.stack([router.router_inputs.share == 1 for router in routers])
            returns = (plain & blended).unsqueeze(1)
            bias = torch.where(returns & allowed.unsqueeze(1), bias - 1.0, bias)
            # as of Router.prepare_histogram
            start = ranges.new_tensor([-1.0, stats.histogram.shape[2] / 2])
            ranges = torch.where(returns.unsqueeze(2), start, ranges)

        for i, router in enumerate(routers):
            router.balance_bias[:num_experts] = bias[i]
            router.histogram_range.copy_(torch.where(allowed[i], ranges[i], router.histogram_range))
    elif balance.bias_update == "sign":
        # It moves all layers; those that are not allowed get their bias back.
        update_balance_bias(routers, stats.counts, balance.bias_update_rate)
        for i, router in enumerate(routers):
            router.balance_bias.copy_(torch.where(allowed[i], router.balance_bias, before[i]))


def _at_level(
    first: Router, bias: torch.Tensor, old: torch.Tensor, plain: torch.Tensor
) -> torch.Tensor:
    """[L, E] bias with the common level that is its to move. Between experts alone, a common shift
    ranks no expert and only drifts; over null experts it is a budget: that of the null law, while
    null experts take part, and nobody's else.
    """
    if first.law in ("quantile", "relu"):
        return bias
    centred = bias - bias.mean(1, keepdim=True)
    if first.law != "null":
        return centred
    return torch.where(plain.unsqueeze(1), centred + old.mean(1, keepdim=True), bias)


def _trimmed_shares(
    routers: list[Router], stats: LayerStats, state: ControllerState, allowed: torch.Tensor
) -> torch.Tensor:
    """[L, E] assignments per token the cuts aim at. Cuts by quantiles alone miss what fallbacks and
    caps add or take, so each expert's share follows its real load: trim <- clip(trim - rate * (load
    / mean - 1)), mean subtracted.
    """
    first = routers[0]
    trim = torch.stack([r.share_trim for r in routers])
    load = stats.counts.float() / stats.counts.float().mean(1, keepdim=True).clamp_min(1e-9)
    moved = (trim - TRIM_RATE * (load - 1)).clamp(-TRIM_LIMIT, TRIM_LIMIT)
    moved = moved - moved.mean(1, keepdim=True)
    trim = torch.where(allowed.unsqueeze(1), moved, trim)
    for i, router in enumerate(routers):
        router.share_trim.copy_(trim[i])
    aimed = (first.target * (-state.theta).exp() / first.spec.num_experts).unsqueeze(1)
    return aimed * trim.exp()
