"""Texts of an engine whose unused rooms hold NaN, as a stale one would be read unseen else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import VOCAB_SIZE

from infer.config import SamplingConfig
from infer.engine import Engine
from infer.request import Request


def prompt(length: int, seed: int = 0) -> list[int]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (length,), generator=gen).tolist()


def request(name: str, tokens: list[int], new: int) -> Request:
    return Request(name, tokens, SamplingConfig(max_new_tokens=new, temperature=0.0))


def texts(
    engine: Engine, given: list[Request], poison: Callable[[Engine], None]
) -> dict[str, list[int]]:
    """Each to its length; poison: fills rooms that are nobody's, before every step."""
    for one in given:
        engine.add(one)
    found = {}
    while engine.has_work:
        poison(engine)
        for event in engine.step():
            if event.completion is not None:
                assert event.completion.finish_reason == "length"
                found[event.name] = event.completion.tokens
    return found
