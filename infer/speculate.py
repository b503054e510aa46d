"""Budget speculation: the same weights draft tokens at a low budget, and one pass at the request's
own budget says which of them it would have drawn itself (arXiv 2211.17192, with drafts by fewer
experts instead of a second model).

What is kept is what plain decoding draws, token by token: the verifying pass draws each token with
the uniform of the request's seed and the token's number, as decoding does, and a draft is kept
where it is that token. Drafts are drawn with the same uniform, so that both agree more often than
two draws would. This is the rule of the paper with another coupling: exact for each seed, not in
distribution alone, and it keeps somewhat fewer drafts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WORTH = 1.02
"""Tokens per second over those of plain decoding, from which speculation is on."""
PAUSE = 512
"""Decoding steps until a decision is measured again."""

Kind = Literal["plain", "round"]


@dataclass
class Tried:
    """What one way of decoding has come to while it was measured."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Utility:
    """Whether rounds of drafting and verifying give more tokens per second than plain steps, of the
    requests that are there: both are tried in turn, `rounds` times each, and the better one runs
    for PAUSE steps. A pure function of what it is told.

    Attributes:
        is_on: what the last measurement decided; False before the first.
        value: tokens per second of rounds over those of plain steps; None before the first.
        line: that decision in one sentence; news to whoever takes it.
    """

    def __init__(self, rounds: int, budget: float, drafts: int):
        self.rounds, self.budget, self.drafts = rounds, budget, drafts
        self.is_on = False
        self.value: float | None = None
        self.line: str | None = None
        self._left = 0
        self._tried: dict[Kind, Tried] = {"plain": Tried(), "round": Tried()}

    def next(self) -> Kind:
        """How the next step decodes."""
        if self._left:
            return "round" if self.is_on else "plain"
        plain, rounds = self._tried["plain"], self._tried["round"]
        return "plain" if plain.steps <= rounds.steps else "round"

    def told(self, kind: Kind, tokens: int, seconds: float) -> None:
        """A step gave so many tokens, of all its requests, in so many seconds."""
        if self._left:
            self._left -= 1
            return
        tried = self._tried[kind]
        tried.steps, tried.tokens = tried.steps + 1, tried.tokens + tokens
        tried.seconds += seconds
        if min(t.steps for t in self._tried.values()) >= self.rounds:
            self._decide()

    def _decide(self) -> None:
        plain, rounds = self._tried["plain"], self._tried["round"]
        rates = [t.tokens / max(t.seconds, 1e-9) for t in (rounds, plain)]
        self.value = rates[0] / max(rates[1], 1e-9)
        self.is_on = self.value > WORTH
        self._left = PAUSE
        self._tried = {"plain": Tried(), "round": Tried()}
        self.line = (
            f"speculation {'on' if self.is_on else 'off'} for {PAUSE} steps: {self.rounds} rounds "
            f"of {self.drafts} drafts at budget {self.budget:g} gave {rates[0]:.1f} tokens/s, as "
            f"many plain steps {rates[1]:.1f}: utility {self.value:.2f}, worth it above {WORTH}"
        )

    def take_line(self) -> str | None:
        """The last decision, once."""
        line, self.line = self.line, None
        return line


def kept(drafts: list[int], drawn: list[int]) -> int:
    """How many of the drafts the verifying pass has drawn as well, up to the first that it has not.

    drawn: one more than drafts, at the places of the drafts and after the last one.
    """
    assert len(drawn) == len(drafts) + 1
    number = 0
    while number < len(drafts) and drafts[number] == drawn[number]:
        number += 1
    return number
