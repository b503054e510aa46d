"""Requests that are read again while nobody asks for anything: sparse attention compared with
dense, and what was served with the full budget and dense attention. No answer changes by it, but
that an audit may have later requests attend to more blocks.

And the record of requests, from which `launch.generate input=` generates them again.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.serving.policy import share_of
from train.files.strict_json import dumps

if TYPE_CHECKING:
    from infer.engine import Engine
    from infer.replay import Agreement
    from infer.request import Completion, Request
    from launch.serving.meters import Meters
    from model.routers.state import RouterState
    from train.config.commands.pilot import AttentionAuditConfig

KEPT = 16
"""Requests that wait to be read again; one more, and the oldest is dropped."""
LONGEST = 8192
"""Tokens of a text that is read again: it is one forward pass, which the next request waits for."""
WINDOW = 8
"""Audits that decide together how many blocks are selected."""
FACTOR = 4
"""Times the trained top_k, where no other limit is given."""


class AttentionAudit:
    """Whether sparse attention is near dense attention on what is served, and how many blocks would
    make it so.

    The error is always that of the trained top_k, so that it tells whether a higher one is still
    wanted. Where it is above the limit, doubled top_k are tried on the same text up to the most;
    what is selected is the most that one of the last WINDOW audits wanted.

    Args:
        trained: blocks that the model selects; most: that it may; lifts: whether it does.

    Attributes:
        by_layer: relative errors of the last audit; rings: whether one was above the limit.
    """

    def __init__(self, trained: int, most: int, limit: float, lifts: bool):
        self.trained, self.limit = trained, limit
        ladder = [trained]
        while lifts and ladder[-1] < most:
            ladder.append(min(most, 2 * max(1, ladder[-1])))
        self.ladder = tuple(ladder)
        self.by_layer: list[float] = []
        self.rings = False
        self.audits = self.alarms = 0
        self._wanted: deque[int] = deque(maxlen=WINDOW)

    def saw(self, error_at: Callable[[int], Sequence[float] | None]) -> bool:
        """A text, by its errors at any top_k; False: it was too short to say anything."""
        found = error_at(self.trained)
        if found is None:
            return False
        self.by_layer = list(found)
        self.rings = max(found) > self.limit
        self.audits += 1
        self.alarms += self.rings
        wanted = self.trained
        for wanted in self.ladder:
            if wanted != self.trained:
                found = error_at(wanted)
            if found is None or max(found) <= self.limit:
                break
        self._wanted.append(wanted)
        return True

    @property
    def top_k(self) -> int:
        return max(self._wanted, default=self.trained)


@dataclass
class Shadow:
    """What the full budget and dense attention would have said of the generated tokens.

    Args:
        budget: the full one; None: the trained. densely: whether there is sparse attention.
    """

    budget: float | None
    densely: bool
    requests: int = 0
    tokens: int = 0
    same: int = 0
    divergence: float = 0.0
    difference: float = 0.0
    """Between what was served and its own replay: rounding, or a mistake."""

    def add(self, found: Agreement) -> None:
        self.requests += 1
        self.tokens += found.tokens
        self.same += found.same
        self.divergence += found.divergence
        if found.difference == found.difference:
            self.difference = max(self.difference, found.difference)

    def kpis(self) -> dict[str, Any]:
        tokens = max(1, self.tokens)
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "agreement": self.same / tokens if self.tokens else None,
            "divergence": self.divergence / tokens if self.tokens else None,
            "replay_difference": self.difference,
        }


@dataclass(frozen=True)
class _Kept:
    """A request that has ended."""

    tokens: list[int]
    num_prompt: int
    budget: float | None
    told: list[float]
    top_k: int | None
    """Blocks that sparse layers selected for it."""
    audited: bool
    shadowed: bool


class Replays:
    """Keeps a share of the requests in memory and reads them again when the engine has nothing to
    do; all of it happens in the engine's thread.

    Args:
        states: of the routers by budget, None for the trained one.
        audit_one_in, shadow_one_in: requests; 0: none. rows: tokens of an audit.
    """

    def __init__(
        self,
        engine: Engine,
        meters: Meters,
        states: Mapping[float | None, Sequence[RouterState]],
        audit: AttentionAudit | None = None,
        audit_one_in: int = 0,
        rows: int = 64,
        shadow: Shadow | None = None,
        shadow_one_in: int = 0,
    ):
        self.engine, self.meters, self.states = engine, meters, states
        self.audit, self.audit_one_in, self.rows = audit, audit_one_in, rows
        self.shadow, self.shadow_one_in = shadow, shadow_one_in
        self.top_k = None if audit is None else audit.trained
        """Blocks that sparse layers select now; None: nobody looks."""
        self._waiting: deque[_Kept] = deque()
        if audit is not None:
            meters.attention_top_k.set(audit.trained)

    def taken(self, request: Request) -> None:
        """A request comes to the engine."""
        if self.audit is not None and self.top_k != self.audit.trained:
            self.meters.fallback.labels("attention_top_k").inc()

    def ended(self, request: Request, done: Completion) -> None:
        """A request has come to its end; an error and what a client has left say nothing."""
        if done.finish_reason in ("error", "cancelled") or not done.tokens:
            return
        audited = self.audit is not None and _chosen("audit", request.name, self.audit_one_in)
        shadowed = self.shadow is not None and _chosen("shadow", request.name, self.shadow_one_in)
        if not audited and not shadowed:
            return
        tokens = [*request.prompt, *done.tokens]
        if len(tokens) > LONGEST or len(self._waiting) == KEPT:
            self.meters.replays.labels("dropped").inc()
        if len(tokens) > LONGEST:
            return
        if len(self._waiting) == KEPT:
            self._waiting.popleft()
        kept = _Kept(
            tokens,
            len(request.prompt),
            request.budget,
            list(done.log_probabilities),
            self.top_k,
            audited,
            shadowed,
        )
        self._waiting.append(kept)

    def idle(self) -> bool:
        """Read a request again; False: there is none."""
        if not self._waiting:
            return False
        kept = self._waiting.popleft()
        self.meters.replays.labels("read").inc()
        if kept.audited:
            self._audit(kept)
        if kept.shadowed:
            self._compare(kept)
        return True

    def _audit(self, kept: _Kept) -> None:
        from infer.replay import Reading, attention_errors

        audit, model = self.audit, self.engine.model
        assert audit is not None
        state = None if kept.budget is None else self.states[kept.budget]

        def error_at(top_k: int) -> list[float] | None:
            return attention_errors(model, kept.tokens, Reading(state, top_k), self.rows)

        if not audit.saw(error_at):
            return
        self.meters.attention_audits.labels("failed" if audit.rings else "passed").inc()
        self.meters.attention_error.set(max(audit.by_layer))
        if audit.rings:
            self._alarm(audit)
        if audit.top_k != self.top_k:
            self._lift(audit)

    def _alarm(self, audit: AttentionAudit) -> None:
        self.meters.fallback.labels("attention_alarm").inc()
        worst = max(audit.by_layer)
        layer = self.engine.model.sparse_attentions()[audit.by_layer.index(worst)].layer_idx
        print(
            f"alarm: sparse attention of layer {layer} (counted from 0) is off by {worst:.3f} of "
            f"dense attention, above serve.attention_audit.limit {audit.limit:g}",
            file=sys.stderr,
            flush=True,
        )

    def _lift(self, audit: AttentionAudit) -> None:
        """Other numbers of blocks leave other keys in later layers, so pages are not shared."""
        from infer.replay import use_top_k

        before, self.top_k = self.top_k, audit.top_k
        context = "" if self.top_k == audit.trained else f"attention.top_k {self.top_k}"
        self.engine.use_context(context)
        use_top_k(self.engine.model, audit.top_k)
        self.meters.attention_top_k.set(audit.top_k)
        print(f"attention.top_k is {audit.top_k} now; it was {before}", file=sys.stderr, flush=True)

    def _compare(self, kept: _Kept) -> None:
        from infer.replay import Reading, agreement

        shadow = self.shadow
        assert shadow is not None
        served = Reading(self.states[kept.budget], kept.top_k)
        reference = Reading(self.states[shadow.budget], densely=shadow.densely)
        found = agreement(
            self.engine.model, kept.tokens, kept.num_prompt, served, reference, kept.told
        )
        shadow.add(found)
        self.meters.shadow_tokens.inc(found.tokens)
        self.meters.shadow_same.inc(found.same)
        self.meters.shadow_divergence.set(shadow.divergence / max(1, shadow.tokens))
        self.meters.replay_difference.set(shadow.difference)

    def summary(self) -> dict[str, Any]:
        """For the end of the command."""
        found: dict[str, Any] = {}
        if self.audit is not None:
            found["attention_audit"] = {
                "audits": self.audit.audits,
                "alarms": self.audit.alarms,
                "by_layer": self.audit.by_layer,
                "top_k": self.top_k,
            }
        if self.shadow is not None:
            found["shadow"] = self.shadow.kpis()
        return found


def audit_of(settings: AttentionAuditConfig, engine: Engine) -> AttentionAudit:
    """
    Raises:
        ValueError: the model's attention leaves nothing out that could be compared.
    """
    from infer.replay import top_k_of

    trained = top_k_of(engine.model)
    if trained is None or any(a.merge == "gated" for a in engine.model.sparse_attentions()):
        raise ValueError(
            "serve.attention_audit compares sparse attention in one softmax with dense attention, "
            "and this model has none; set serve.attention_audit.sample_one_in=0"
        )
    most = settings.max_top_k if settings.max_top_k is not None else FACTOR * max(1, trained)
    if most < trained:
        raise ValueError(
            f"serve.attention_audit.max_top_k is {most}, and the model selects {trained} blocks "
            "already; give more, or null"
        )
    return AttentionAudit(trained, most, settings.limit, settings.action == "lift_top_k")


class Recorder:
    """Appends what is needed to generate a request again, to a file that its owner alone can read:
    a line is one that `launch.generate input=` takes.
    """

    def __init__(self, path: Path, source: dict[str, Any]):
        """Raises ValueError where others could read or write the file that is there."""
        self.source = source
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(path, flags, 0o600), "ab")
        found = os.fstat(self._file.fileno())
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            self._file.close()
            raise ValueError(
                f"serve.record={path} holds what clients ask and is not yours alone: chmod 600, or "
                "give a new file"
            )

    def ended(self, request: Request, done: Completion, top_k: int | None) -> None:
        """One line, with the operating system when this returns."""
        sampling = dataclasses.asdict(request.sampling)
        line = {
            "id": request.name,
            "prompt_tokens": request.prompt,
            **sampling,
            "budget": request.budget,
            "tokens": done.tokens,
            "recorded": {**self.source, "finish_reason": done.finish_reason}
            | ({} if top_k is None else {"attention_top_k": top_k}),
        }
        self._file.write(dumps(line).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _chosen(what: str, name: str, one_in: int) -> bool:
    """Evenly spread over requests, the same for a request each time."""
    return bool(one_in) and share_of(f"{what} {name}") * one_in < 1
