"""From a conversation to its tokens, and which of them are learnt.

The conversation is rendered and tokenised once, as a whole. Where an answer stands is found by
rendering beginnings: answer i is what lies between the text of messages[:i] with the header of the
next answer, and the text of messages[:i + 1]. Both must be beginnings of the whole text, so a
template that writes an answer otherwise once later messages follow is refused, not guessed at.
Published templates carry no marks around answers, and searching for their text finds other places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from train.data.chat.template import ChatTemplate

TrainOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and where in it the answers stand that are learnt."""

    text: str
    """The whole conversation."""
    spans: tuple[tuple[int, int], ...]
    """Begin and end in characters of each answer: after the header, to the end of its turn and what
    the template writes behind it.
    """


@dataclass(frozen=True)
class Example:
    """A conversation as tokens."""

    ids: np.ndarray
    """[tokens] int64."""
    is_target: np.ndarray
    """[tokens] bool: whether the token is learnt. The first never is: nothing comes before it."""


def render(conversation: dict[str, Any], template: ChatTemplate, train_on: TrainOn) -> Rendered:
    """The text of a conversation and the answers in it.

    Args:
        conversation: {"messages": [...]} and "tools", if any.

    Raises:
        ValueError: the template refuses the messages, or writes a beginning otherwise than the
            whole; says at which message. Or nobody answers.
    """
    messages, tools = conversation["messages"], conversation.get("tools")
    text = template.render(messages, tools=tools)
    if train_on == "all":
        return Rendered(text, ((0, len(text)),))

    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("has no message of the assistant to learn from")
    spans = []
    for i in answers if train_on == "assistant" else answers[-1:]:
        try:
            header = template.render(messages[:i], add_generation_prompt=True, tools=tools)
            turn = template.render(messages[: i + 1], tools=tools)
        except ValueError as error:
            raise ValueError(f"message {i}: of the conversation up to it, {error}") from error
        if not text.startswith(turn):
            rest = "" if i == answers[-1] else "; data.train_on=last learns from the last answer"
            raise ValueError(
                f"message {i}: the template writes the conversation up to it otherwise once later "
                f"messages follow ({_difference(text, turn)}){rest}"
            )
        if not turn.startswith(header):
            raise ValueError(
                f"message {i}: the header that the template asks for an answer with is not how it "
                f"begins one ({_difference(turn, header)})"
            )
        spans.append((len(header), len(turn)))
    return Rendered(text, tuple(spans))


def _difference(one: str, other: str) -> str:
    at = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    at = min(len(one), len(other)) if at is None else at
    return f"{one[at : at + 20]!r} instead of {other[at : at + 20]!r}"


def example(
    rendered: Rendered, encoding: Any, is_special: Callable[[int], bool], train_on: TrainOn
) -> Example:
    """The tokens of a conversation, and which of them are learnt.

    A token is learnt if all of its text lies within an answer, up to the token that ends the turn.
    The header of an answer is the template's to write, and so is what it puts behind that token.

    Args:
        encoding: of rendered.text by a tokenizer without a post-processor; is_special: whether a
            token is a special one, as those that end turns are.

    Raises:
        ValueError: no token would be learnt.
    """
    ids = np.array(encoding.ids, dtype=np.int64)
    is_target = np.zeros(len(ids), dtype=bool)
    ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    for begin, end in rendered.spans:
        inside = np.flatnonzero((ends[:, 0] >= begin) & (ends[:, 1] <= end) & (ends[:, 1] > begin))
        if train_on != "all":
            special = [place for place in inside if is_special(int(ids[place]))]
            inside = inside[inside <= special[-1]] if special else inside
        is_target[inside] = True
    is_target[:1] = False
    if not is_target.any():
        raise ValueError("has no token to learn: its answers are empty")
    return Example(ids, is_target)
