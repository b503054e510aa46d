"""A request on its way: its tokens, the pages that hold them, and what has come of it."""

from __future__ import annotations

import torch

from infer.request import Completion, Drawn, Event, FinishReason, Request, StopStrings


class Sequence:
    """tokens: prompt and generated ones, of which the first `held` are in its pages.

    A forward pass computes tokens from `held` on. When it reaches the last one, its logits give the
    next token; so a sequence that decodes has exactly one token that is not held.
    """

    def __init__(self, request: Request, arrived: float, row: int = 0):
        self.request = request
        self.row = row
        """Of the engine's table of budgets."""
        self.tokens = list(request.prompt)
        self.held = 0
        self.pages: list[int] = []
        self.live = range(0)
        """Of its pages, those whose tokens' own keys it reads, where not all keep them."""
        self.region: int | None = None
        """Where a bounded cache keeps its tokens, while it runs."""
        self.last_key: bytes | None = None
        self.num_registered = 0
        self.stop = StopStrings(request.sampling.stop)
        self.result = Completion(
            request.name, num_prompt_tokens=len(request.prompt), arrived=arrived
        )
        self.experts_sum, self.num_computed = 0.0, 0
        self.routed: list[torch.Tensor] = []
        self._untold: list[Drawn] = []

    @property
    def pending(self) -> int:
        """Tokens that are not held yet."""
        return len(self.tokens) - self.held

    def computed(self, number: int, experts: float) -> None:
        """`number` tokens more are held, which visited `experts` experts in all."""
        self.held += number
        self.num_computed += number
        self.experts_sum += experts

    def forget(self) -> None:
        """It has lost its pages, and begins again with all its tokens as a prompt."""
        self.held, self.pages, self.last_key, self.num_registered = 0, [], None, 0
        self.live = range(0)
        self.routed = []
        self.result.num_preemptions += 1

    def take(
        self, drawn: Drawn, now: float, end_token: int | None, room: int
    ) -> tuple[str, FinishReason | None]:
        """The next token, -1 if there is none: text that is certain by it, and why the sequence
        ends, if it does. room: tokens that it may have in all.
        """
        request, result = self.request, self.result
        token = drawn.token
        if token < 0:
            return "", "error"
        result.token_times.append(now)
        ends = token == end_token or token in request.sampling.stop_token_ids
        if ends and not request.sampling.ignore_end:
            return "", "end"

        self.tokens.append(token)
        result.tokens.append(token)
        result.log_probabilities.append(drawn.log_probability)
        self._untold.append(drawn)
        piece = "" if request.text is None else self.stop.add(request.text.add(token))
        if self.stop.found:
            return piece, "stop"
        if len(result.tokens) >= request.sampling.max_new_tokens or len(self.tokens) >= room:
            return piece, "length"
        return piece, None

    def news(self, piece: str) -> Event:
        """Text that is certain, and the tokens since the last event."""
        self.result.text += piece
        told, self._untold = tuple(self._untold), []
        return Event(self.request.name, piece, told)

    def finish(self, piece: str, reason: FinishReason) -> Event:
        """The last event, with what was held back of the text."""
        result = self.result
        if self.request.text is not None and reason != "stop":
            piece += self.stop.add(self.request.text.end())
            # What the tokenizer held back may hold a stop string as well.
            if self.stop.found:
                reason = "stop"
            else:
                piece += self.stop.end()
        result.finish_reason = reason
        result.experts_per_token = self.experts_sum / max(1, self.num_computed)
        if self.request.keep_routing and self.routed:
            result.routed_experts = torch.cat(self.routed)
        return self.news(piece)._replace(completion=result)
