"""A conversation as the model learns it, for people: shown before the first step, since a mask that
is wrong looks healthy in every loss.
"""

from __future__ import annotations

import os
import sys

import numpy as np

from train.data.chat.samples import ChatSamples, Conversations
from train.data.tokenizer import TextInside

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
MAX_TOKENS = 400
"""Shown of a conversation, from its beginning."""


def shown_example(samples: ChatSamples, index: int) -> str:
    """The first conversation of a training sample: what is not learnt is dim on a terminal;
    elsewhere what is learnt stands between ⟦ and ⟧.
    """
    row = samples.row(index)
    text = TextInside(samples.store.tokenizer())
    on_terminal = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    legend = "dim: read, not learnt" if on_terminal else "⟦learnt⟧, the rest is read"
    parts = []
    for ids, is_target in _runs(row):
        piece = text.decode(ids)
        if on_terminal:
            parts.append(piece if is_target else f"{DIM}{piece}{PLAIN}")
        else:
            parts.append(f"⟦{piece}⟧" if is_target else piece)
    more = len(row.ids[0]) - MAX_TOKENS
    rest = f" ... and {more} more tokens" if more > 0 else ""
    return f"the first conversation of sample {index} ({legend}):\n{''.join(parts)}{rest}"


def _runs(row: Conversations) -> list[tuple[list[int], bool]]:
    """Stretches of tokens that are learnt, and that are not, of the row's first conversation."""
    ids, is_target = row.ids[0][:MAX_TOKENS], row.is_target[0][:MAX_TOKENS]
    cuts = np.flatnonzero(is_target[1:] != is_target[:-1]) + 1
    return [
        (part.tolist(), bool(marks[0]))
        for part, marks in zip(np.split(ids, cuts), np.split(is_target, cuts), strict=True)
    ]
