"""What the server decides about requests that leave it open, in the engine's thread: their budget,
whether they are a canary, whether they tell where their tokens went; and what came of it by arm.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import statistics
import sys
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launch.steering.budgets import LoadController
from launch.steering.drift import Drift

if TYPE_CHECKING:
    from infer.engine import Engine
    from infer.request import Completion, Request
    from launch.serving.meters import Meters
    from train.config.commands.pilot import CanaryConfig

CONTROL, CANARY = "control", "canary"
PATIENCE = 256
"""Steps that a decision waits at most for requests that were given another budget."""
KEPT = 10_000
"""Requests of an arm that its medians are of, the latest ones."""


@dataclass
class Arm:
    """What came of the requests of one arm."""

    requests: int = 0
    failed: int = 0
    """That ended with an error."""
    tokens: int = 0
    experts: float = 0.0
    computed: int = 0
    log_probability: float = 0.0
    """Sum over generated tokens, under the model at the request's own budget."""
    first: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    per_token: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, done: Completion) -> None:
        self.requests += 1
        self.failed += done.finish_reason == "error"
        self.tokens += len(done.tokens)
        computed = done.num_prompt_tokens - done.num_reused_tokens + len(done.tokens)
        self.computed += computed
        self.experts += done.experts_per_token * computed
        self.log_probability += sum(done.log_probabilities)
        if done.token_times:
            self.first.append(done.token_times[0] - done.arrived)
        if len(done.token_times) > 1:
            between = [b - a for a, b in itertools.pairwise(done.token_times)]
            self.per_token.append(statistics.fmean(between))

    def kpis(self) -> dict[str, Any]:
        """Times in seconds; None of nothing."""

        def middle(values: deque[float]) -> float | None:
            return statistics.median(values) if values else None

        return {
            "requests": self.requests,
            "failed": self.failed,
            "generated_tokens": self.tokens,
            "experts_per_token": self.experts / self.computed if self.computed else None,
            "mean_log_probability": self.log_probability / self.tokens if self.tokens else None,
            "ttft_p50": middle(self.first),
            "tpot_p50": middle(self.per_token),
        }


class Policy:
    """Args:
    controller: None: requests that fix no budget get none.
    drift: None: nobody looks. full_budget: what is given unasked while it rings is nothing less
        than the trained budget.
    """

    def __init__(
        self,
        engine: Engine,
        meters: Meters,
        controller: LoadController | None = None,
        canary: CanaryConfig | None = None,
        drift: Drift | None = None,
        sample_one_in: int = 0,
        full_budget: bool = False,
    ):
        self.engine, self.meters = engine, meters
        self.controller, self.canary, self.drift = controller, canary, drift
        self.sample_one_in, self.full_budget = sample_one_in, full_budget
        self.arms: dict[str, Arm] = {}
        if canary is not None and canary.budget is not None:
            self.arms = {CONTROL: Arm(), CANARY: Arm()}
        self._arm_of: dict[str, str] = {}
        self._sampled: set[str] = set()
        self._given: dict[str, float] = {}
        """Budgets that the controller has given to requests which have not ended."""
        self._unsettled = 0
        """Steps in a row in which they were not all the present one."""
        self._prefill_tokens = engine.settings.prefill_tokens

    @property
    def is_careful(self) -> bool:
        """Whether nothing is given but the trained budget, since routing has drifted."""
        return self.full_budget and self.drift is not None and self.drift.rings

    def take(self, request: Request) -> None:
        """A request before it comes to the engine."""
        if self.sample_one_in and share_of(f"drift {request.name}") * self.sample_one_in < 1:
            if not request.keep_routing:
                self._sampled.add(request.name)
            request.keep_routing = True
        if request.budget is not None:  # the client has fixed it
            return
        if self.arms:
            assert self.canary is not None
            is_canary = share_of(f"canary {request.name}") < self.canary.share
            arm = CANARY if is_canary and not self.is_careful else CONTROL
            self._arm_of[request.name] = arm
            if arm == CANARY:
                request.budget = self.canary.budget
                return
        if self.is_careful:
            self.meters.fallback.labels("drift_full_budget").inc()
        elif self.controller is not None:
            request.budget = self._given[request.name] = self.controller.budget
            if request.budget < self.controller.table.budgets[-1]:
                self.meters.fallback.labels("lower_budget").inc()

    def stepped(self, seconds: float, rows: int, context: float) -> None:
        """A step of the engine in which `rows` requests got a token."""
        if self.controller is None:
            return
        # What a budget does is seen when those that were given another one have ended.
        others = any(budget != self.controller.budget for budget in self._given.values())
        self._unsettled = self._unsettled + 1 if others else 0
        if 0 < self._unsettled < PATIENCE:
            return
        if not self.controller.saw(seconds, rows, context):
            return
        share = self.controller.prefill_share
        tokens = max(1, round(self._prefill_tokens * share))
        if tokens < self.engine.settings.prefill_tokens:
            self.meters.fallback.labels("shorter_prefill").inc()
        self.engine.settings = dataclasses.replace(self.engine.settings, prefill_tokens=tokens)
        self.meters.budget.set(self.controller.budget)

    def ended(self, request: Request, done: Completion) -> None:
        """A request that has come to its end; what only the server wanted to know is taken out."""
        drift, routed = self.drift, done.routed_experts
        if drift is not None and routed is not None and drift.saw(routed.numpy()):
            self._told_drift(drift)
        if request.name in self._sampled:
            self._sampled.remove(request.name)
            done.routed_experts = None
        self._given.pop(request.name, None)
        arm = self._arm_of.pop(request.name, None)
        if arm is not None and done.finish_reason != "cancelled":
            self.arms[arm].add(done)
            self.meters.arm_ended(arm, done)

    def _told_drift(self, drift: Drift) -> None:
        worst = max(drift.by_layer)
        self.meters.drift.set(worst)
        if not drift.rings:
            return
        self.meters.fallback.labels("drift_alarm").inc()
        layer = drift.by_layer.index(worst)
        print(
            f"alarm: MoE layer {layer} (counted from 0) uses its experts otherwise than in "
            f"training: divergence {worst:.3f} nats, above serve.drift.limit {drift.limit:g}"
            + ("; requests get the trained budget" if self.full_budget else ""),
            file=sys.stderr,
            flush=True,
        )

    def summary(self) -> dict[str, Any]:
        """For the end of the command."""
        found: dict[str, Any] = {}
        if self.arms:
            found["arms"] = {name: arm.kpis() for name, arm in self.arms.items()}
        if self.controller is not None:
            found["budget"] = self.controller.budget
        if self.drift is not None and self.drift.windows:
            found["drift"] = self.drift.by_layer
        return found


def share_of(name: str) -> float:
    """In [0, 1), evenly spread over names, the same for a name each time."""
    digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") / 2**56
