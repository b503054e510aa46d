"""From events of the engine to the objects of OpenAI's API."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infer.request import Completion, Drawn, Event

REASONS = {"end": "stop", "stop": "stop", "length": "length"}
NOT_FINITE = "the model's logits are not finite for this prompt"


def error_body(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """What an error is told by, in a body or in a stream."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


@dataclass
class Choice:
    """One answer on its way: the text so far, and what is told beside it."""

    number: int
    text: str = ""
    drawn: list[Drawn] = field(default_factory=list)
    done: Completion | None = None
    offset: int = 0
    """Characters of the tokens that were told, for completions with log-probabilities."""


@dataclass
class Answer:
    """The objects of one request.

    Args:
        chat: its form; alternatives: as Asked has it; spelled: what a token stands for in a text;
            max_active: the limit on experts that makes the texts depend on what runs beside them.
    """

    name: str
    model: str
    chat: bool
    choices: list[Choice]
    alternatives: int | None
    spelled: Callable[[int], str]
    max_active: int | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def add(self, number: int, event: Event) -> None:
        """Note what has come of a choice."""
        choice = self.choices[number]
        choice.text += event.piece
        choice.drawn += event.drawn
        choice.done = event.completion

    def whole(self) -> dict[str, Any]:
        """The body of a request that was not streamed."""
        found = []
        for choice in self.choices:
            assert choice.done is not None
            shown: dict[str, Any] = {"index": choice.number}
            if self.chat:
                shown["message"] = {"role": "assistant", "content": choice.text}
            else:
                shown["text"] = choice.text
            shown["logprobs"] = self._log_probabilities(choice, choice.drawn)
            found.append({**shown, **_end_of(choice.done)})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": found, "usage": self.usage()}

    def header(self, number: int) -> dict[str, Any]:
        """The first piece of a streamed chat: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._piece({"index": number, "delta": delta, "finish_reason": None})

    def piece(self, number: int, event: Event) -> dict[str, Any]:
        """A piece of a stream."""
        choice = self.choices[number]
        shown: dict[str, Any] = {"index": number}
        if self.chat:
            shown["delta"] = {"content": event.piece}
        else:
            shown["text"] = event.piece
        shown["logprobs"] = self._log_probabilities(choice, event.drawn)
        end = {"finish_reason": None} if event.completion is None else _end_of(event.completion)
        return self._piece({**shown, **end})

    def last(self) -> dict[str, Any]:
        """The piece with the tokens, after all others."""
        return {**self._piece(), "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of all choices. A prompt that several choices continue counts once for each, as it
        is computed, but for what was reused.
        """
        done = [choice.done for choice in self.choices if choice.done is not None]
        prompt, generated = (
            sum(c.num_prompt_tokens for c in done),
            sum(len(c.tokens) for c in done),
        )
        computed = [c.num_prompt_tokens - c.num_reused_tokens + len(c.tokens) for c in done]
        experts = sum(c.experts_per_token * n for c, n in zip(done, computed, strict=True))
        found = {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(c.num_reused_tokens for c in done)},
            "experts_per_token": experts / max(1, sum(computed)),
        }
        return (
            found if self.max_active is None else {**found, "max_active_experts": self.max_active}
        )

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}

    def _piece(self, *choices: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": list(choices)}

    def _log_probabilities(self, choice: Choice, drawn: Iterable[Drawn]) -> dict[str, Any] | None:
        """In the form of chats, or of completions."""
        if self.alternatives is None:
            return None
        if self.chat:
            return {
                "content": [
                    {
                        **self._told(d.token, d.log_probability),
                        "top_logprobs": [self._told(*pair) for pair in d.alternatives],
                    }
                    for d in drawn
                ]
            }
        texts, offsets = [], []
        drawn = list(drawn)
        for d in drawn:
            texts.append(self.spelled(d.token))
            offsets.append(choice.offset)
            choice.offset += len(texts[-1])
        tops = [{self.spelled(t): value for t, value in d.alternatives} for d in drawn]
        return {
            "tokens": texts,
            "token_logprobs": [d.log_probability for d in drawn],
            "top_logprobs": tops if self.alternatives else None,
            "text_offset": offsets,
        }

    def _told(self, token: int, value: float) -> dict[str, Any]:
        text = self.spelled(token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _end_of(done: Completion) -> dict[str, Any]:
    found: dict[str, Any] = {"finish_reason": REASONS.get(done.finish_reason, "error")}
    if done.routed_experts is not None:
        ids = done.routed_experts.contiguous()
        found["routed_experts"] = {
            "shape": list(ids.shape),
            "dtype": "int16",
            "data": base64.b64encode(ids.numpy().astype("<i2").tobytes()).decode(),
        }
    return found
