"""What a server compares and watches: canaries, drift, audits, shadow requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CanaryConfig:
    """A budget that is tried on some of the requests."""

    budget: float | None = None
    """One of the saved ones; null: no canary."""
    share: float = 0.05
    """Of the requests that fix no budget themselves."""

    def problems(self) -> list[str]:
        if not 0 < self.share < 1:
            return [f"serve.canary.share is {self.share}; it must be between 0 and 1"]
        return []


@dataclass(frozen=True)
class DriftConfig:
    """Whether experts are used as in training: a request in so many tells where its tokens went."""

    sample_one_in: int = 0
    """Requests; 0: off. The prompt of such a request is computed anew."""
    window_tokens: int = 10_000
    """That a comparison is made of."""
    limit: float = 0.1
    """Of the Jensen-Shannon divergence of a layer's loads to those of training, in nats (ln 2 at
    most), beyond which the alarm rings.
    """
    action: Literal["none", "full_budget"] = "none"
    """full_budget: until a window is below the limit, no request gets less than the trained budget
    unasked.
    """

    def problems(self) -> list[str]:
        found = [
            f"serve.drift.{name} is {value}; it must be at least {least}"
            for name, value, least in (
                ("sample_one_in", self.sample_one_in, 0),
                ("window_tokens", self.window_tokens, 100),
            )
            if value < least
        ]
        if not 0 < self.limit < 0.7:
            found.append(f"serve.drift.limit is {self.limit}; it must be between 0 and ln 2")
        return found


@dataclass(frozen=True)
class AttentionAuditConfig:
    """Whether sparse attention is near dense attention on what is served: a request in so many is
    read again when nobody asks for anything.
    """

    sample_one_in: int = 0
    """Requests; 0: off."""
    rows: int = 64
    """Tokens of a request that are compared, in every sparse layer and head."""
    limit: float = 0.3
    """Of the relative error of a layer's output, beyond which the alarm rings."""
    action: Literal["none", "lift_top_k"] = "none"
    """lift_top_k: attention selects more blocks, as many as the last audits needed to stay below
    the limit.
    """
    max_top_k: int | None = None
    """That it may select; None: four times those of the model."""

    def problems(self) -> list[str]:
        found = [
            f"serve.attention_audit.{name} is {value}; it must be at least {least}"
            for name, value, least in (
                ("sample_one_in", self.sample_one_in, 0),
                ("rows", self.rows, 1),
                ("max_top_k", self.max_top_k, 1),
            )
            if value is not None and value < least
        ]
        if not 0 < self.limit < 1:
            found.append(f"serve.attention_audit.limit is {self.limit}; it must be between 0 and 1")
        if not self.sample_one_in and (self.action != "none" or self.max_top_k is not None):
            found.append(
                "serve.attention_audit has an action and looks at no request; give "
                "serve.attention_audit.sample_one_in=256"
            )
        elif self.action == "none" and self.max_top_k is not None:
            found.append(
                "serve.attention_audit.max_top_k is of action=lift_top_k; add that, or drop it"
            )
        return found


@dataclass(frozen=True)
class ShadowConfig:
    """What the largest saved budget and dense attention would have said of what was served: a
    request in so many is read again when nobody asks for anything.
    """

    sample_one_in: int = 0
    """Requests; 0: off."""

    def problems(self) -> list[str]:
        if self.sample_one_in < 0:
            return [f"serve.shadow.sample_one_in is {self.sample_one_in}; it must be at least 0"]
        return []
