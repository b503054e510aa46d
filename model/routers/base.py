"""What every router is: a weight, the state its controllers move, and one call of the routing
op.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.config import ModelConfig
from model.parallel.family import own_shape
from model.routers.config import ControlLaw
from model.routers.state import ControllerState, RouterInputs, RouterState
from ops.router import (
    NUM_REASONS,
    Reason,
    RouterOutput,
    RouteSpec,
    Spilled,
    confine,
    round_to_tiles,
    route,
    spill,
)
from ops.sparse_attention.noise import normal, token_hash

NULLS_OUT = -1e9
"""Bias that ranks a null expert behind every expert."""
STEPS_UNMOVED = 20
"""Steps of training without update_routers after which a router says so."""
_MOVES = {
    "quantile": "cuts",
    "top_p": "P and budget",
    "relu": "penalty and budget",
    "null": "null experts and budget",
}
log = logging.getLogger("loadstone")


class RoutingRequest(NamedTuple):
    """What a caller wants of a router besides the routing itself."""

    token_mask: torch.Tensor | None = None
    """[T] bool, False for padding, which visits no expert; None when nothing is padded."""
    num_segments: int = 1
    """Sequences the T tokens are made of, for sums per sequence."""
    num_bins: int = 0
    """Bins of the score histogram; 0: none."""
    token_ids: torch.Tensor | None = None
    """[T] int64 names of the tokens in checksum and audit; None: none."""
    words: torch.Tensor | None = None
    """[T] int64 ids of the tokens in the vocabulary, by which some layers route (HashedRouter);
    None: they are not known, which such layers refuse.
    """
    given_ids: torch.Tensor | None = None
    """[T, K] experts to use instead of the router's own choice (replay)."""
    frozen: bool = False
    """Choose experts with the snapshot of the weight."""
    snapshot: bool = False
    """Take a snapshot of the weight."""
    plain_k: int = 0
    """Plain top-k with so many experts instead of what the controllers say; 0: as they say."""
    budgets: RouterState | None = None
    """Outside of training: a table of budgets instead of the router's own state, of which row_of
    says what a token reads.
    """
    row_of: torch.Tensor | None = None
    """[T] int32, rows of `budgets`."""
    max_active: int | None = None
    """Outside of training: the experts that may serve these tokens, those with the largest sums of
    gates over them (ops.router.confine). A token's experts then depend on the others. None: all.
    """


class LoopWatch:
    """Says once what a training loop has left out: a router whose state stands still trains on in
    silence.
    """

    def __init__(self) -> None:
        self.started = False
        self.steps_unmoved = 0
        self.version = -1
        self.told: set[str] = set()

    def moved(self) -> None:
        """The controllers have made their step."""
        self.steps_unmoved = 0

    def look(self, router: Router) -> None:
        """At every forward pass in training. An optimiser's steps show in the version of the
        weight.
        """
        weight = router.weight
        if not weight.requires_grad or weight.is_inference():
            return
        warms_up = router.budget is not None and router.law != "relu"
        if self.version < 0 and not self.started and warms_up:
            # from a checkpoint
            loaded = router.balance_bias.any() or router.controller.any()
            if not loaded:
                self._tell(
                    "start",
                    f"{type(router).__name__} is trained without its warm start: "
                    "call model.moe.budget.start_routers, or use "
                    "model.routing.RouterControl",
                )
        if weight._version != self.version:
            self.version = weight._version
            self.steps_unmoved += 1
        if self.steps_unmoved > STEPS_UNMOVED:
            self._tell(
                "update",
                f"{type(router).__name__}: {STEPS_UNMOVED} steps of training "
                f"without update_routers, so its {_MOVES[router.law]} stand still; "
                "call model.moe.budget.update_routers once per optimiser step, or use "
                "model.routing.RouterControl",
            )

    def look_at_gates(self, router: Router) -> None:
        """At every forward pass in training: gates that are all 1 teach a router nothing."""
        if router.spec.teaches_nothing and router.weight.requires_grad:
            self._tell(
                "gates",
                f"{type(router).__name__} is trained with normalize_weights and at most one expert "
                "of a token: its gates are all 1 and give it no gradient; set "
                "normalize_weights=False",
            )

    def _tell(self, what: str, text: str) -> None:
        if what not in self.told:
            self.told.add(what)
            log.warning(text)


class Router(nn.Module):
    """Linear router in fp32 over the experts (and null experts), followed by ops.router.route.

    Its buffers are fp32 whatever the precision of the model, saved with checkpoints and equal on
    every rank.

    Attributes:
        balance_bias: [C], added to the scores for selection only; to the logits of ReLU routing.
        control: [4], what the op reads; by name: router_inputs.
        controller: [7], the state of the budget controller and of the fallbacks; by name:
            controller_state.
        share_trim: [E], logarithm of each expert's share of the budget over an even one (laws with
            quantiles).
        histogram_range: [E, 2], lowest value and bins per unit of each expert's histogram.

    Args:
        spec: the rule; budget: target mean of experts per token, None where the rule fixes it.
        capacity_factor: in training an expert takes at most ceil(capacity_factor * k * T / E) of T
            tokens, k the budget or top_k; the rest goes to the next expert with room, then nowhere
            (spill). None: no limit (dropless).
        logit_bias: learn a bias of the logits, which starts at 0.

    Outside of training (`eval()`) a token's experts depend on its own logits and on the buffers
    alone: no capacity, no rounding to tiles, and no limit that an overload has lowered.
    """

    law: ControlLaw = "none"
    is_balanced = True
    """Whether anything may move which experts it chooses: bias, losses, fallbacks."""

    def __init__(
        self,
        config: ModelConfig,
        spec: RouteSpec,
        *,
        budget: float | None = None,
        capacity_factor: float | None = None,
        initial_value: float = 0.0,
        logit_bias: bool = False,
    ):
        super().__init__()
        problems = spec.problems()
        if problems:
            raise ValueError("; ".join(problems))
        self.spec, self.budget, self.capacity_factor = spec, budget, capacity_factor
        self.initial_value = initial_value
        self.token_rounding = 0  # set by the layer: ExpertsConfig
        self.random_steps, self.layer_idx = 0, 0  # likewise: BalanceConfig
        # Steps done, which a trainer sets; without one a router is past its first steps.
        self.step: int | None = None
        self.watch = LoopWatch()
        self.max_top_k = spec.max_experts
        self.weight = nn.Parameter(torch.empty(spec.num_columns, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(spec.num_columns)) if logit_bias else None
        self.balance_bias: torch.Tensor
        self.control: torch.Tensor
        self.controller: torch.Tensor
        self.histogram_range: torch.Tensor
        self.share_trim: torch.Tensor
        self.snapshot_weight: torch.Tensor | None
        self.register_buffer("balance_bias", torch.zeros(spec.num_columns))
        fallback_k = float(min(spec.max_experts, max(1, round(self.target))))
        self.register_buffer(
            "control", torch.tensor([initial_value, 1.0, fallback_k, float(spec.max_experts)])
        )
        self.register_buffer("controller", torch.zeros(len(ControllerState._fields)))
        self.register_buffer("share_trim", torch.zeros(spec.num_experts))
        self.register_buffer(
            "histogram_range", torch.tensor([[-1.0, 1.0]]).repeat(spec.num_experts, 1)
        )
        self.register_buffer("snapshot_weight", None)

    @property
    def target(self) -> float:
        """Mean experts per token this router aims at."""
        return self.budget if self.budget is not None else float(self.spec.top_k)

    @property
    def has_quantile_bias(self) -> bool:
        """The bias is this router's own: quantiles of the scores, whatever the balance settings
        say.
        """
        return self.law in ("quantile", "relu", "null")

    def prepare_histogram(self, num_bins: int) -> None:
        """Spread the bins over scores between -1 and 1; later steps follow the scores
        (model.moe.balance.quantile_cuts).
        """
        self.histogram_range[:, 1] = max(1, num_bins) / 2

    def keep_snapshots(self) -> None:
        """Hold a copy of the weight, for the steps after a spike of the gradient norm."""
        self.snapshot_weight = torch.zeros(own_shape(self.weight))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Router:
        """Move the state with the module, but never to another precision: a bf16 bias would lose
        its updates.
        """
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def mode_spec(self) -> RouteSpec:
        """The rule in force (expert choice selects by thresholds outside of training)."""
        return self.spec

    @property
    def router_inputs(self) -> RouterInputs:
        """The buffer `control` by name, to read and to write in place."""
        return RouterInputs.of(self.control)

    @property
    def controller_state(self) -> ControllerState:
        """The buffer `controller` by name, to read and to write in place."""
        return ControllerState.of(self.controller)

    def inputs_in_force(self, plain_k: int = 0, state: RouterState | None = None) -> torch.Tensor:
        """[4] fp32, `control` as the op reads it now, or [P, 4] of a table of budgets. An
        overload's limit answers to loads of ranks in training, so it is lifted elsewhere. plain_k:
        of RoutingRequest.
        """
        if self.training and not plain_k:
            return self.control
        control = (self.control if state is None else state.control).clone()
        inputs = RouterInputs.of(control)
        if not self.training:
            inputs.limit.fill_(float(self.max_top_k))
        if plain_k:
            inputs.share.fill_(0.0)
            inputs.fallback_k.fill_(float(plain_k))
        return control

    def _logits(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        state: RouterState | None = None,
        row_of: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, D] -> [T, C] fp32: the gates of ReLU routing are what exceeds the cut, so its bias
        comes before the ReLU. state, row_of: of RoutingRequest.
        """
        state = self._own(state)
        shift = None if self.bias is None else self.bias.float()
        if self.law == "relu":
            shift = state.balance_bias
        # zero, but in checkpoints of earlier versions: model.moe.budget.SHIFT_DECAY
        if self.law == "null":
            shift = F.pad(
                RouterInputs.of(state.control)
                .value.unsqueeze(-1)
                .expand(*state.control.shape[:-1], self.spec.num_null_experts),
                (self.spec.num_experts, 0),
            )
        if shift is not None and shift.dim() == 2:
            assert row_of is not None
            return F.linear(hidden.float(), weight.float()) + shift[row_of.long()]
        return F.linear(hidden.float(), weight.float(), shift)

    def _own(self, state: RouterState | None) -> RouterState:
        return RouterState(self.balance_bias, self.control) if state is None else state

    def _warmed(self, logits: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
        """[T, C] logits -> likewise, those that are routed by: in the first steps of training
        mostly random ones (balance.random_routing_steps).

            a s + (1 - a) (mean(s) + std(s) e),  a = (steps done + 1) / random_routing_steps

        e is drawn from a standard normal for each token, layer and column; mean and deviation are
        those of the token's own logits, where Ling has running ones: so no token depends on
        another, and any split of a batch over ranks routes alike. They carry no gradient.

        Source: arXiv 2503.05139, equation 3.
        """
        # Asked first, as a compiled block would be compiled anew for every step that it looks at.
        if self.random_steps == 0 or not self.training or token_ids is None:
            return logits
        if self.step is None or self.step + 1 >= self.random_steps:
            return logits
        share = (self.step + 1) / self.random_steps
        columns = torch.arange(logits.shape[1], device=logits.device)
        hashed = token_hash(self.step, token_ids).unsqueeze(1)
        drawn = normal(hashed, self.layer_idx * logits.shape[1] + columns)
        own = logits.detach()
        spread = own.std(1, keepdim=True, unbiased=False)
        noise = own.mean(1, keepdim=True) + spread * drawn
        return share * logits + (1 - share) * noise

    def _selection_bias(
        self, spec: RouteSpec, state: RouterState | None = None
    ) -> torch.Tensor | None:
        """[C] fp32, or [P, C] of a table of budgets, added to the scores to rank them under `spec`.
        Plain top-k is of the experts alone, so in its steps null experts rank behind all of them.
        """
        state = self._own(state)
        if spec.mode == "expert_choice" or self.law == "relu":
            return None
        if not spec.num_null_experts:
            return state.balance_bias
        plain = RouterInputs.of(state.control).share.unsqueeze(-1) < 1
        nulls = torch.where(plain, NULLS_OUT, 0.0).expand(
            *state.control.shape[:-1], spec.num_null_experts
        )
        return state.balance_bias + F.pad(nulls, (spec.num_experts, 0))

    def forward(self, hidden: torch.Tensor, request: RoutingRequest | None = None) -> RouterOutput:
        """hidden [T, hidden_size] -> RouterOutput with max_top_k slots."""
        request = request or RoutingRequest()
        if self.training and not torch.compiler.is_compiling():
            self.watch.look_at_gates(self)
            if self.law != "none":
                self.watch.look(self)

        if request.snapshot and self.snapshot_weight is not None:
            self.snapshot_weight.copy_(self.weight.detach())

        state, row_of = request.budgets, request.row_of
        assert not self.training or state is None, "a table of budgets is not for training"
        logits = self._warmed(self._logits(hidden, self.weight, state, row_of), request.token_ids)
        spec = self.mode_spec()
        options: dict[str, Any] = {
            "token_mask": request.token_mask,
            "token_ids": request.token_ids,
            "num_segments": request.num_segments,
        }

        if request.given_ids is not None:
            return route(logits, as_given(spec), given_ids=request.given_ids, **options)

        bias = self._selection_bias(spec, state)
        choice: dict[str, Any] = {
            "router_inputs": self.inputs_in_force(request.plain_k, state),
            "histogram_range": self.histogram_range,
            "num_bins": request.num_bins,
        }
        if state is not None:
            routing = route(logits, spec, bias_table=bias, row_of=row_of, **choice, **options)
            own = None if bias is None or row_of is None else bias[row_of.long()]
            return self._confined(routing, logits, spec, own, request, options)
        choice["bias"] = bias

        # The snapshot chooses, and the present weights give the gates, so that they go on learning.
        if request.frozen and self.snapshot_weight is not None:
            with torch.no_grad():
                before = self._logits(hidden, self.snapshot_weight)
                stale = route(self._warmed(before, request.token_ids), spec, **choice, **options)
            return _marked(
                route(logits, as_given(spec), given_ids=stale.expert_ids, **options),
                stale,
                Reason.FROZEN,
            )

        routing = route(logits, spec, **choice, **options)
        # It makes tokens compete with later ones and with other rows, so it is for training.
        if self.capacity_factor is not None and self.training:
            capacity = math.ceil(
                self.capacity_factor * self.target * len(hidden) / spec.num_experts
            )
            limits = torch.full((spec.num_experts,), capacity, device=hidden.device)
            with torch.no_grad():
                spilled = spill(routing, logits, spec, bias, limits)
            routing = _spilled(
                route(logits, as_given(spec), given_ids=spilled.expert_ids, **options),
                routing,
                spilled,
            )

        if self.token_rounding and self.training:
            with torch.no_grad():
                spilled = round_to_tiles(routing, logits, spec, bias, self.token_rounding)
            routing = _spilled(
                route(logits, as_given(spec), given_ids=spilled.expert_ids, **options),
                routing,
                spilled,
            )
        return self._confined(routing, logits, spec, bias, request, options)

    def _confined(
        self,
        routing: RouterOutput,
        logits: torch.Tensor,
        spec: RouteSpec,
        bias: torch.Tensor | None,
        request: RoutingRequest,
        options: dict[str, Any],
    ) -> RouterOutput:
        """The routing with no more experts than the request allows. bias: [C] or [T, C]."""
        if request.max_active is None or request.max_active >= spec.num_experts:
            return routing
        assert not self.training, "which experts may serve is not limited in training"
        confined = confine(routing, logits, spec, bias, request.max_active)
        given = route(logits, as_given(spec), given_ids=confined.expert_ids, **options)
        return _spilled(given, routing, confined)


def as_given(spec: RouteSpec) -> RouteSpec:
    """The rule by which experts that are handed in get their gates."""
    return dataclasses.replace(spec, mode="given")


def _spilled(routing: RouterOutput, choice: RouterOutput, spilled: Spilled) -> RouterOutput:
    """The routing after a spill, with what it did to the assignments so far."""
    return _marked(routing, choice, Reason.OVERFLOW, spilled.moved)._replace(
        overflow=choice.overflow + spilled.overflow
    )


def _marked(
    routing: RouterOutput, choice: RouterOutput, reason: Reason, tokens: torch.Tensor | None = None
) -> RouterOutput:
    """The routing of given ids with what the choice behind them counted, and `reason` on the tokens
    (None: on all).
    """
    bit = (
        torch.full_like(routing.reasons, int(reason))
        if tokens is None
        else tokens.to(torch.uint8) * int(reason)
    )
    visits = (routing.expert_ids >= 0).any(1) if tokens is None else tokens
    reasons = torch.where(visits, choice.reasons | bit, choice.reasons)
    bits = torch.arange(NUM_REASONS, device=reasons.device)
    return routing._replace(
        reasons=reasons,
        reason_counts=(reasons.unsqueeze(1).long() >> bits & 1).sum(0),
        histogram=choice.histogram,
        null_count=choice.null_count,
        margin=choice.margin,
    )
