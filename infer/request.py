"""A request, what is told of it while it runs, and what it ends with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch

from infer.config import SamplingConfig

FinishReason = Literal["end", "stop", "length", "error", "cancelled"]


class Text(Protocol):
    """Turns tokens into text as they come (train/data/tokenizer.py: TextStream)."""

    def add(self, token: int) -> str: ...

    def end(self) -> str: ...


@dataclass(eq=False)
class Request:
    """One prompt to continue."""

    name: str
    """What the caller knows it by."""
    prompt: list[int]
    sampling: SamplingConfig
    text: Text | None = None
    """Without it there is no text, and stop strings are not looked for."""
    budget: float | None = None
    """One of the engine's budgets; None: the routers as they were loaded."""
    num_alternatives: int = 0
    """Of each generated token: the so many most likely ones are told beside it."""
    keep_routing: bool = False
    """Tell which experts every token visited; pages of earlier requests are not reused then."""


class Drawn(NamedTuple):
    """A generated token."""

    token: int
    log_probability: float
    """Under the model, as those of the alternatives."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of the most likely ones, in order; ties by the lower id."""


@dataclass
class Completion:
    """What a request has come to."""

    name: str
    tokens: list[int] = field(default_factory=list)
    """Those generated, without the one that ended the document."""
    text: str = ""
    """Cut before the stop string."""
    finish_reason: FinishReason = "error"
    """end: the token that ends a document; stop: a stop string; length: max_new_tokens or the
    model's max_seq_len; error: logits that are not finite; cancelled: given up by the caller.
    """
    log_probabilities: list[float] = field(default_factory=list)
    """Of the tokens, under the model."""
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    """Of the prompt, whose pages were there already."""
    num_preemptions: int = 0
    experts_per_token: float = 0.0
    """Mean over MoE layers and the tokens that were computed."""
    routed_experts: torch.Tensor | None = None
    """[tokens, MoE layers, K] int16 where Request.keep_routing asks for it, -1 for a slot without
    an expert: of the prompt and of the generated tokens but the last, which was never read.
    """
    arrived: float = 0.0
    """Seconds of the engine's clock, as the rest."""
    started: float = 0.0
    """When it was first admitted."""
    token_times: list[float] = field(default_factory=list)
    """When each generated token was known, the one that ends a document included."""


class Event(NamedTuple):
    """News of a request: text that is certain, or its end."""

    name: str
    piece: str
    drawn: tuple[Drawn, ...] = ()
    """The tokens since the last event; their text may be held back, or have been cut off."""
    completion: Completion | None = None
    """Not None: the request has ended."""


class StopStrings:
    """Finds the first stop string in text that comes in pieces, and holds back what may become
    one.
    """

    def __init__(self, stop: tuple[str, ...]):
        self.stop = stop
        self.held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The text that is certain to stand before any stop string."""
        self.held += piece
        begins = [at for text in self.stop if (at := self.held.find(text)) >= 0]
        if begins:
            self.found = True
            certain, self.held = self.held[: min(begins)], ""
            return certain
        kept = max((self._beginning(text) for text in self.stop), default=0)
        certain, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return certain

    def end(self) -> str:
        """What was held back and has become nothing."""
        certain, self.held = self.held, ""
        return certain

    def _beginning(self, text: str) -> int:
        """Length of the longest end of the held text that `text` begins with."""
        for length in range(min(len(text) - 1, len(self.held)), 0, -1):
            if self.held.endswith(text[:length]):
                return length
        return 0
