"""A file of prompts: one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.config import SamplingConfig

SETTINGS = (
    *("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop"),
    *("stop_token_ids", "ignore_end"),
)
"""Fields of SamplingConfig that a line may set."""
OWN = ("id", "prompt", *SETTINGS)
"""Keys of a line that say something to the command; all others travel through."""
RECORDED = ("prompt_tokens", "tokens")
"""Likewise, of a line without a prompt: what launch.serve serve.record=FILE has written."""


@dataclass(frozen=True)
class PromptLine:
    number: int
    """Of the line, from 1."""
    name: str
    """Its id, or its number."""
    prompt: str | tuple[int, ...]
    """Text, or tokens as launch.serve has recorded them."""
    sampling: SamplingConfig
    rest: dict[str, Any]
    """What travels through to the answer, the budget included."""
    budget: float | None = None
    """One of the saved budgets; None: that of the command."""
    expected: tuple[int, ...] | None = None
    """Generated tokens as they were recorded; None: none were."""


@dataclass(frozen=True)
class BadLine:
    number: int
    problem: str


def read_prompts(path: Path, default: SamplingConfig) -> Iterator[PromptLine | BadLine]:
    """The lines of a file in their order; empty ones are skipped. A line may set what `default`
    sets. Where it has no seed of its own, its number is added to the default's, so that equal
    prompts get texts of their own.
    """
    names: set[str] = set()
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            found = _line(number, raw, default)
            if isinstance(found, PromptLine):
                if found.name in names:
                    found = BadLine(number, f"the id {found.name!r} has been there before")
                else:
                    names.add(found.name)
            yield found


def _line(number: int, raw: bytes, default: SamplingConfig) -> PromptLine | BadLine:
    try:
        line = json.loads(raw)
    except RecursionError:
        return BadLine(number, "is nested too deeply")
    except ValueError as error:  # of the encoding as well
        return BadLine(number, f"is not JSON: {error}")
    if not isinstance(line, dict):
        return BadLine(number, f"is not an object but {type(line).__name__}")

    prompt, name = line.get("prompt"), line.get("id", number)
    own: tuple[str, ...] = OWN
    expected: tuple[int, ...] | None = None
    if "prompt_tokens" in line and prompt is None:
        own = (*OWN, *RECORDED)
        prompt = _tokens(line["prompt_tokens"])
        if not prompt:
            return BadLine(number, "has prompt_tokens that are no list of token ids")
        if "tokens" in line and (expected := _tokens(line["tokens"])) is None:
            return BadLine(number, "has tokens that are no list of token ids")
    elif not isinstance(prompt, str) or not prompt:
        return BadLine(number, 'has no "prompt", which must be some text')
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        return BadLine(number, f"has the id {name!r}; it must be text or a whole number")

    sampling = _sampling(line, dataclasses.replace(default, seed=(default.seed + number) % 2**63))
    if isinstance(sampling, str):
        return BadLine(number, sampling)
    budget = line.get("budget")
    if budget is not None:
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget < 1e6:
            return BadLine(number, f"has budget {budget!r}; it must be a number of experts")
        budget = float(budget)
    rest = {key: value for key, value in line.items() if key not in own}
    return PromptLine(number, str(name), prompt, sampling, rest, budget, expected)


def _tokens(found: Any) -> tuple[int, ...] | None:
    """None: it is no list of token ids."""
    if not isinstance(found, list) or any(type(t) is not int or t < 0 for t in found):
        return None
    return tuple(found)


def _sampling(line: dict[str, Any], default: SamplingConfig) -> SamplingConfig | str:
    """The settings of a line, or what is wrong with them."""
    given = {key: line[key] for key in SETTINGS if key in line}
    if "stop" in given:
        stop = given["stop"]
        texts = [stop] if isinstance(stop, str) else stop
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return f"has stop {stop!r}; it must be text or a list of texts"
        given["stop"] = tuple(texts)
    if "stop_token_ids" in given:
        ids = _tokens(given["stop_token_ids"])
        if ids is None:
            return "has stop_token_ids that are no list of token ids"
        given["stop_token_ids"] = ids
    if not isinstance(given.get("ignore_end", False), bool):
        return f"has ignore_end {given['ignore_end']!r}; it must be true or false"
    for key, kinds in _KINDS.items():
        value = given.get(key)
        if key in given and (isinstance(value, bool) or not isinstance(value, kinds)):
            return f"has {key} {value!r}; it must be a number"
    settings = dataclasses.replace(default, **given)
    problems = settings.problems()
    return "; ".join(problems) if problems else settings


_KINDS: dict[str, tuple[type, ...]] = {
    "max_new_tokens": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int, type(None)),
    "seed": (int,),
}
