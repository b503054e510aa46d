"""Settings of generation, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SamplingConfig:
    """How the tokens of one request are drawn, and when they end."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    """0: always the most likely token."""
    top_p: float = 0.95
    """Tokens are drawn from the smallest set whose probability reaches it (arXiv 1904.09751)."""
    top_k: int | None = None
    """Tokens are drawn from the top_k most likely ones; None: from all."""
    seed: int = 0
    """With the token's place it decides each draw, whatever else is generated beside it."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a text, besides the one that ends a document; they are not part of it."""
    ignore_end: bool = False
    """Go on after the token that ends a document, as a measurement of speed wants it."""

    def problems(self) -> list[str]:
        found = []
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature != 0 and not 1e-3 <= self.temperature < float("inf"):
            found.append(
                f"temperature is {self.temperature}; use 0 for the most likely token, or at least "
                "0.001"
            )
        if not 0 < self.top_p <= 1:
            found.append(f"top_p is {self.top_p}; it must be in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k is {self.top_k}; it must be at least 1, or null for all tokens")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed is {self.seed}; it must be between 0 and 2**63 - 1")
        if any(not text for text in self.stop):
            found.append("stop has an empty string, which would end every text; leave it out")
        return found


@dataclass(frozen=True)
class EngineConfig:
    """What one rank computes at a time."""

    max_slots: int = 32
    """Requests that are generated at once."""
    cache_tokens: int | None = None
    """Tokens that the cache has room for; None: max_slots requests of the model's max_seq_len."""
    prefill_tokens: int = 4096
    """Prompt tokens of one step; a longer prompt comes in pieces of this size."""
    prefix_reuse: bool = True
    """Pages of a prompt that begins like an earlier one are not computed again. With
    attention.resident_blocks none is shared: what stays of a beginning is in the request's own
    region.
    """
    max_active_experts: int | None = None
    """Experts of a layer that a decoding step may read: those with the largest sums of gates over
    the step's requests; others' tokens go to their next best among them. Fewer weights are read for
    large batches, and a text then depends on what is generated beside it. None: no limit.
    """
    cuda_graphs: Literal["auto", True, False] = "auto"
    """Decoding steps as CUDA graphs, one for every number of requests (in powers of two) and of
    pages: recorded when it first comes, then replayed without the host. auto: on a GPU, where
    nothing in the model waits for the host. true: an error where they cannot be.
    """
    draft_budget: float | None = None
    """Speculation: tokens are drafted at this saved budget and verified at the request's own, which
    changes no text; on while it is measured to give more tokens a second. None: off.
    """
    draft_tokens: int = 4
    """Drafts of a round."""
    draft_rounds: int = 16
    """Rounds, and as many plain steps, that a measurement takes."""

    def problems(self) -> list[str]:
        found = [
            f"{name} is {value}; it must be at least 1"
            for name, value in (
                ("max_slots", self.max_slots),
                ("cache_tokens", self.cache_tokens),
                ("prefill_tokens", self.prefill_tokens),
                ("max_active_experts", self.max_active_experts),
                ("draft_tokens", self.draft_tokens),
                ("draft_rounds", self.draft_rounds),
            )
            if value is not None and value < 1
        ]
        if self.draft_budget is not None and self.max_active_experts is not None:
            found.append(
                f"max_active_experts is {self.max_active_experts} and draft_budget "
                f"{self.draft_budget:g}: drafts are verified by what a request would have alone, "
                "which such a limit gives up; drop one of them"
            )
        if self.draft_budget is not None and not self.draft_budget > 0:
            found.append(f"draft_budget is {self.draft_budget:g}; it must be positive, or null")
        return found
