"""A model of ours as the harness asks models."""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import TemplateLM

from train.trained.scoring import Generation, Scorer


class Loadstone(TemplateLM):
    """Log-likelihoods and greedy texts by a Scorer, which shares them out over ranks: the harness
    itself runs on one.
    """

    def __init__(self, scorer: Scorer, tokenizer: Any):
        super().__init__()
        self.scorer, self.own_tokenizer = scorer, tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.scorer.end_token

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Never with special tokens added: what a text begins with is its context's matter."""
        found: list[int] = self.own_tokenizer.encode(string, add_special_tokens=False).ids
        return found

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(s.log_likelihood, s.is_greedy) for s in self.scorer.score(pairs)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Each token is predicted once, in windows as long as the model knows; the first after the
        token that ends a document.
        """
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
            for start in range(1, len(ids), self.scorer.max_len):
                part = ids[start : start + self.scorer.max_len]
                room = max(1, self.scorer.max_len + 1 - len(part))
                pairs.append((ids[max(0, start - room) : start], part))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, scored in zip(owners, self.scorer.score(pairs), strict=True):
            totals[owner] += scored.log_likelihood
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        asked = []
        for request in requests:
            context, settings = request.args
            stop = settings.get("until") or []
            stop = (stop,) if isinstance(stop, str) else tuple(text for text in stop if text)
            most = int(settings.get("max_gen_toks", 256))
            prompt = self.tok_encode(context) or [self.eot_token_id]
            asked.append(Generation(prompt, stop, min(most, self.scorer.max_len - 1)))
        return self.scorer.generate(asked)
