"""Likelihoods and greedy texts of many prompts, shared out over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from infer.config import EngineConfig, SamplingConfig
from infer.engine import Engine
from infer.request import Request
from model.transformer import Transformer
from train.trained.ranks import Place


class Scored(NamedTuple):
    """How likely a continuation is."""

    log_likelihood: float
    """Nats, summed over its tokens."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest."""


class Generation(NamedTuple):
    """A text to be continued by its likeliest tokens."""

    prompt: list[int]
    stop: tuple[str, ...]
    max_new_tokens: int


class Scorer:
    """A model that answers on all ranks: rank 0 asks, the others `serve` until it has `ended`.

    Args:
        text: a detokenizer for what follows a prompt (train.data.tokenizer.TextStream).
        end_token: ends a text, and fills rows.
    """

    def __init__(
        self,
        model: Transformer,
        place: Place,
        text: Callable[[list[int]], Any],
        end_token: int,
        batch_size: int,
    ):
        self.model, self.place, self.text = model.eval(), place, text
        self.end_token, self.batch_size = end_token, batch_size
        self.max_len = model.config.max_seq_len
        self.engine: Engine | None = None

    # --- rank 0 -----------------------------------------------------------------------------------

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        """Of (context, continuation) in tokens, both not empty. What is longer than the model's
        max_seq_len loses its beginning.
        """
        return self._ask("score", list(pairs))

    def generate(self, prompts: Sequence[Generation]) -> list[str]:
        """The texts that follow, without their stop strings."""
        return self._ask("generate", list(prompts))

    def ended(self) -> None:
        """Let the other ranks go."""
        self._told(("ended", []))

    def _ask(self, what: str, work: list[Any]) -> list[Any]:
        self._told((what, work))
        return self._answered(what, work)

    # --- the others -------------------------------------------------------------------------------

    def serve(self) -> None:
        """Answer what rank 0 asks, until it has ended."""
        while True:
            what, work = self._told(None)
            if what == "ended":
                return
            self._answered(what, work)

    # --- all --------------------------------------------------------------------------------------

    def _told(self, message: Any) -> Any:
        if self.place.size == 1:
            return message
        box = [message]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _answered(self, what: str, work: list[Any]) -> list[Any]:
        """All answers on rank 0, in the order of the work. Longest first, dealt out in turn, so
        that ranks have as many rows of like length; an expert group takes part in every pass.
        """
        lengths = [len(item[0]) + len(item[1]) * (what == "score") for item in work]
        order = sorted(range(len(work)), key=lambda i: (-lengths[i], i))
        own = order[self.place.rank :: self.place.size]
        most = -(-len(work) // self.place.size)
        answer = self._scores if what == "score" else self._texts
        found = list(zip(own, answer([work[i] for i in own], most), strict=True))
        if self.place.size > 1:
            boxes: list[Any] | None = [None] * self.place.size if self.place.rank == 0 else None
            dist.gather_object(found, boxes, dst=0)
            found = [pair for part in boxes or [] for pair in part]
        by_place = dict(found)
        return [by_place[i] for i in range(len(work))] if self.place.rank == 0 else []

    @torch.no_grad()
    def _scores(self, pairs: list[tuple[list[int], list[int]]], most: int) -> list[Scored]:
        """most: pairs of the rank that has most of them; others fill up with passes of nothing."""
        device, found = self.model.any_weight.device, []
        for start in range(0, most, self.batch_size):
            part = pairs[start : start + self.batch_size] or [([self.end_token], [self.end_token])]
            rows = [(*pair[0], *pair[1])[-(self.max_len + 1) :] for pair in part]
            longest = max(len(row) for row in rows) - 1
            inputs = torch.full((len(rows), longest), self.end_token, device=device)
            for i, row in enumerate(rows):  # what follows on the right changes nothing
                inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
            logits = self.model.logits(inputs)
            for i, (row, pair) in enumerate(zip(rows, part, strict=True)):
                number = min(len(pair[1]), len(row) - 1)
                wanted = torch.tensor(row[-number:], device=device)
                said = logits[i, len(row) - 1 - number : len(row) - 1].float().log_softmax(-1)
                total = said.gather(1, wanted.unsqueeze(1)).double().sum()
                found.append(Scored(float(total), bool((said.argmax(-1) == wanted).all())))
        return found[: len(pairs)]

    def _texts(self, prompts: list[Generation], most: int) -> list[str]:
        if self.engine is None:
            settings = EngineConfig(max_slots=self.batch_size)
            self.engine = Engine(self.model, settings, end_token=self.end_token)
        asked = []
        for i, item in enumerate(prompts):
            # Room is left for the answer, and one token of the prompt at least.
            prompt = item.prompt[-max(1, self.max_len - item.max_new_tokens) :]
            sampling = SamplingConfig(item.max_new_tokens, temperature=0.0, stop=item.stop)
            asked.append(Request(str(i), prompt, sampling, self.text(prompt)))
        found = {int(done.name): done.text for done in self.engine.run(asked)}
        return [found[i] for i in range(len(prompts))]
