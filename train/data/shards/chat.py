"""Conversations to tokens: what a process does to a shard of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.data.chat.examples import conversations
from train.data.chat.targets import TrainOn
from train.data.chat.template import ChatTemplate
from train.data.files import Odd, Row
from train.data.shards.encode import Encoder, Shard, document_key
from train.files.strict_json import dumps


class Bad(NamedTuple):
    """A conversation that cannot be learnt from."""

    file: str
    number: int
    reason: str


class ChatEncoder(Encoder):
    """An encoder, with the template that makes text of conversations.

    Args:
        train_on: which of their tokens are learnt.
    """

    def __init__(self, encoder: Encoder, template: ChatTemplate, train_on: TrainOn):
        super().__init__(
            encoder.tokenizer,
            encoder.about,
            encoder.end_of_document,
            encoder.spelled,
            encoder.dtype,
            encoder.held_out_below,
        )
        self.template = template
        self.train_on = train_on

    def shard(self, documents: Sequence[Any], source: str, is_validation: bool = False) -> Shard:
        """
        Args:
            documents: Rows whose text is a conversation; see Encoder.shard.
        """
        bad: list[Bad] = []

        def refuse(row: Row, odd: Odd) -> None:
            bad.append(Bad(row.file, row.number, odd.reason))

        def encode(texts: Iterator[str]) -> Iterator[Any]:
            return self.encode(texts, source, offsets=True)

        found = list(
            conversations(documents, refuse, self.template, self.train_on, self.tokenizer, encode)
        )
        targets = [document.is_target for document in found if document.is_target is not None]
        return Shard(
            np.concatenate([np.empty(0, self.dtype), *(d.ids.astype(self.dtype) for d in found)]),
            np.array([len(document.ids) for document in found], dtype=np.int64),
            np.array([document_key(document.text) for document in found], dtype=np.uint64),
            np.array([document.num_bytes for document in found], dtype=np.int64),
            np.ones(len(found), dtype=bool),
            np.empty(0, dtype=np.uint32),
            np.concatenate([np.empty(0, dtype=bool), *targets]),
            np.frombuffer(dumps(bad).encode(), dtype=np.uint8),
        )


def bad_in(shard: Shard) -> list[Bad]:
    """The conversations that the shard leaves out."""
    text = shard.bad.tobytes()
    return [Bad(*entry) for entry in json.loads(text)] if text else []
