"""From a request's body to what is asked: the fields of OpenAI's API that mean something here, and
ours beside them. A field that would change nothing is refused, unless it has its default.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import secrets
from dataclasses import dataclass
from typing import Any

from infer.config import SamplingConfig

MOST_CHOICES = 16
"""Of n times the number of prompts."""
MOST_ALTERNATIVES = 20
MOST_STOPS = 16
MOST_MESSAGES = 10_000

OWN = ("budget", "return_routed_experts", "top_k", "ignore_eos")
"""Extra fields, all optional: of the saved table; which experts every token visited; the so many
most likely tokens; go on after the token that ends a document.
"""
COMMON = (
    *("model", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "stop"),
    *("seed", "logprobs", *OWN),
)
OF_CHATS = ("messages", "top_logprobs", "max_completion_tokens")
OF_TEXTS = ("prompt",)
IGNORED = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
"""They say something about the caller, and nothing about the answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "repetition_penalty": (1, None),
    "logit_bias": ({}, None),
    "suffix": ("", None),
    "echo": (False, None),
    "best_of": (1, None),
    "tools": ([], None),
    "tool_choice": ("none", None),
    "parallel_tool_calls": (True, False, None),
    "functions": ([], None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
    "min_tokens": (0, None),
}
"""What is not done here, with the values that do not ask for it."""


class BadRequest(Exception):
    """A request that cannot be answered, for the client.

    Args:
        param: the field; status: of HTTP.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.message, self.param, self.status = message, param, status


@dataclass(frozen=True)
class Asked:
    """What a body asks for."""

    prompts: tuple[str | list[int], ...]
    """Of a completion: text or tokens."""
    messages: list[dict[str, Any]] | None
    """Of a chat."""
    sampling: SamplingConfig
    n: int
    """Answers to each prompt; each has a seed of its own."""
    stream: bool
    include_usage: bool
    """A last piece of the stream tells the tokens."""
    alternatives: int | None
    """Log-probabilities are told, with so many of the most likely tokens beside each."""
    budget: float | None
    routed_experts: bool


ALONE = ("seed", "logprobs", "top_logprobs")
"""Fields that promise what engine.max_active_experts gives up."""


def read_asked(
    body: Any, chat: bool, default: SamplingConfig, model: str, max_active: int | None = None
) -> Asked:
    """Check a body, parsed from JSON.

    Args:
        default: what holds where the body says nothing; model: the name that is served;
            max_active: engine.max_active_experts.

    Raises:
        BadRequest: with the field and the mend.
    """
    if not isinstance(body, dict):
        raise BadRequest(f"the body is {type(body).__name__}; send a JSON object")
    _check_fields(body, chat)
    for field in ALONE if max_active is not None else ():
        if body.get(field) not in (None, False):
            raise BadRequest(
                f"{field} asks for what can be had again, and this server runs with "
                f"engine.max_active_experts={max_active}: what is generated beside a request "
                "changes its experts; leave it out",
                field,
            )
    if (name := body.get("model")) is not None and name != model:
        raise BadRequest(f"the model {_shown(name)} is not served; it is {model!r}", "model", 404)

    messages, prompts = None, tuple[str | list[int], ...]()
    if chat:
        messages = _messages(body.get("messages"))
    else:
        prompts = _prompts(body.get("prompt"))
    n = _whole(body, "n", 1, 1, MOST_CHOICES)
    if n * max(1, len(prompts)) > MOST_CHOICES:
        raise BadRequest(f"n times the prompts is more than {MOST_CHOICES}; send fewer", "n")

    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise BadRequest("stream_options knows include_usage alone", "stream_options")
    return Asked(
        prompts=prompts,
        messages=messages,
        sampling=_sampling(body, default),
        n=n,
        stream=_flag(body, "stream"),
        include_usage=_flag(options, "include_usage"),
        alternatives=_alternatives(body, chat),
        budget=_number(body, "budget"),
        routed_experts=_flag(body, "return_routed_experts"),
    )


def _check_fields(body: dict[str, Any], chat: bool) -> None:
    of_kind = (OF_CHATS, OF_TEXTS) if chat else (OF_TEXTS, OF_CHATS)
    known = {*COMMON, *IGNORED, *of_kind[0]}
    for name, value in body.items():
        if name in known:
            continue
        if name not in NEUTRAL:
            near = difflib.get_close_matches(str(name), sorted(known), 1)
            mend = f"did you mean {near[0]}?" if near else "leave it out"
            if name in of_kind[1]:
                mend = f"/v1/{'' if chat else 'chat/'}completions takes it"
            raise BadRequest(f"the field {_shown(name)} is not known here; {mend}", name)
        # True == 1 in Python, and not here
        if not any(
            value == v and isinstance(value, bool) == isinstance(v, bool) for v in NEUTRAL[name]
        ):
            raise BadRequest(
                f"{name} is {_shown(value)}, which is not done here; leave it out", name
            )


def _sampling(body: dict[str, Any], default: SamplingConfig) -> SamplingConfig:
    longest = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    seed = _whole(body, "seed", None, -(2**63), 2**63 - 1)
    settings = dataclasses.replace(
        default,
        max_new_tokens=_whole(body, longest, default.max_new_tokens, 1, 2**31),
        temperature=_or(_number(body, "temperature"), default.temperature),
        top_p=_or(_number(body, "top_p"), default.top_p),
        top_k=_whole(body, "top_k", default.top_k, -1, 2**31),
        seed=secrets.randbits(62) if seed is None else seed % 2**63,
        stop=_stops(body.get("stop")),
        ignore_end=_flag(body, "ignore_eos"),
    )
    if settings.top_k in (0, -1):  # how others say "all"
        settings = dataclasses.replace(settings, top_k=None)
    if problems := settings.problems():
        raise BadRequest("; ".join(problems))
    return settings


def _stops(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(texts, list)
        or len(texts) > MOST_STOPS
        or not all(isinstance(text, str) and text for text in texts)
    ):
        raise BadRequest(f"stop must be text, or a list of up to {MOST_STOPS} texts", "stop")
    return tuple(texts)


def _alternatives(body: dict[str, Any], chat: bool) -> int | None:
    """logprobs is a number in completions; a flag in chats, with the number in top_logprobs."""
    if not chat:
        told = _whole(body, "logprobs", None, 0, MOST_ALTERNATIVES)
        return None if told is None else int(told)
    number = _whole(body, "top_logprobs", 0, 0, MOST_ALTERNATIVES)
    if not _flag(body, "logprobs"):
        if number:
            raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
        return None
    return int(number)


def _prompts(value: Any) -> tuple[str | list[int], ...]:
    """Text, tokens, or a list of either."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(part, str) for part in value):
            return tuple(value)
        if _are_tokens(value):
            return (value,)
        if all(isinstance(part, list) and _are_tokens(part) for part in value):
            return tuple(value)
    raise BadRequest(
        "prompt must be text, a list of token ids, or a list of such prompts", "prompt"
    )


def _are_tokens(value: list[Any]) -> bool:
    return bool(value) and all(type(part) is int and part >= 0 for part in value)


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or len(value) > MOST_MESSAGES:
        raise BadRequest("messages must be a list of messages", "messages")
    found = []
    for place, message in enumerate(value):
        where = f"messages[{place}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(f"{where} must be an object with a role", "messages")
        content = message.get("content")
        if isinstance(content, list):  # text in parts
            if not all(
                isinstance(part, dict)
                and part.get("type") == "text"
                and isinstance(part.get("text"), str)
                for part in content
            ):
                raise BadRequest(f"{where}.content has a part that is not text", "messages")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise BadRequest(f"{where}.content must be text", "messages")
        found.append({**message, "content": content})
    return found


# --- values ---------------------------------------------------------------------------------------


def _whole(body: dict[str, Any], name: str, default: Any, least: int, most: int) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise BadRequest(
            f"{name} is {_shown(value)}; it must be a whole number from {least} to {most}", name
        )
    return value


def _number(body: dict[str, Any], name: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRequest(f"{name} is {_shown(value)}; it must be a number", name)
    return float(value)


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False) or type(value) in (int, float):
        raise BadRequest(f"{name} is {_shown(value)}; it must be true or false", name)
    return bool(value)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _shown(value: Any) -> str:
    """As JSON spells it."""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
