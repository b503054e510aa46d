"""A file of prompts: one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.config import SamplingConfig

OWN = ("id", "prompt", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
"""Keys of a line that say something to the command; all others travel through."""


@dataclass(frozen=True)
class PromptLine:
    number: int
    """Of the line, from 1."""
    name: str
    """Its id, or its number."""
    prompt: str
    sampling: SamplingConfig
    rest: dict[str, Any]
    """What travels through to the answer, the budget included."""
    budget: float | None = None
    """One of the saved budgets; None: that of the command."""


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
    if not isinstance(prompt, str) or not prompt:
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
    rest = {key: value for key, value in line.items() if key not in OWN}
    return PromptLine(number, str(name), prompt, sampling, rest, budget)


def _sampling(line: dict[str, Any], default: SamplingConfig) -> SamplingConfig | str:
    """The settings of a line, or what is wrong with them."""
    given = {key: line[key] for key in OWN[2:] if key in line}
    if "stop" in given:
        stop = given["stop"]
        texts = [stop] if isinstance(stop, str) else stop
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return f"has stop {stop!r}; it must be text or a list of texts"
        given["stop"] = tuple(texts)
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
