"""Conversations of a source as they are stored: their tokens up to the last that is learnt."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from train.data.chat.targets import Rendered, TrainOn, example, render
from train.data.chat.template import ChatTemplate
from train.data.files import Odd, Row
from train.data.store import Document
from train.data.worker import doing

RENDERING_SECONDS = 60.0
"""Of processor time in which a template writes one conversation; published ones take microseconds.
"""


def conversations(
    placed: Iterable[Row],
    refuse: Callable[[Row, Odd], None],
    template: ChatTemplate,
    train_on: TrainOn,
    tokenizer: Any,
    encode: Callable[[Iterator[str]], Iterator[Any]],
) -> Iterator[Document]:
    """Yield conversations in their own order, tokenised and told apart.

    One that cannot be learnt from is a bad row: the template refuses it or rewrites its
    beginning, or nothing in it is learnt. What stands behind the last learnt token is left out: it
    teaches nothing and no token that does sees it.

    Args:
        placed: rows whose text is a conversation; refuse: gets those that cannot be learnt from;
            encode: encodings of texts, in their order.
    """
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    # What is rendered and not yet encoded: texts are tokenised many at a time.
    waiting: deque[tuple[Row, str, Rendered]] = deque()

    def texts() -> Iterator[str]:
        for row in placed:
            text = str(row.text)
            try:
                with doing(f"rendering {row.file} row {row.number}", RENDERING_SECONDS):
                    rendered = render(json.loads(text), template, train_on)
            except ValueError as error:
                refuse(row, Odd(str(error)))
                continue
            waiting.append((row, text, rendered))
            yield rendered.text

    for encoding in encode(texts()):
        row, text, rendered = waiting.popleft()
        try:
            found = example(rendered, encoding, special.__contains__, train_on)
        except ValueError as error:
            refuse(row, Odd(str(error)))
            continue
        length = int(found.is_target.nonzero()[0][-1]) + 1
        yield Document(
            text,
            found.ids[:length],
            len(rendered.text.encode()),
            found.is_target[:length],
        )


def spoken(conversation: str) -> str:
    """What is said in a conversation, for a tokenizer to be trained on."""
    messages = json.loads(conversation)["messages"]
    return "\n".join(str(message.get("content") or "") for message in messages)
