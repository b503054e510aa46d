"""Documents to tokens: the work of one process on one shard.

What comes out depends on the documents and the tokenizer alone, so shards can be made by anybody in
any order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from train.data.tokenizer import encoded_bytes, tokenizers_errors
from train.data.worker import doing

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 2**20
"""Documents are tokenised together until there are as many of either: the library needs a hundred
bytes and more for every character meanwhile.
"""
SECONDS_A_BATCH, CHARACTERS_A_SECOND = 60.0, 10_000.0
"""Of processor time a batch may take: a hundred times what slow tokenizers need."""
LONGEST = 2**22
"""Characters of a document that are tokenised at once. A longer one is taken in windows."""
OVERLAP = 2**12
"""Characters that neighbouring windows share, to find where their tokens agree."""
AGREEING = 16
"""As many tokens in a row must be the same in both."""


class Encoded(NamedTuple):
    """A document's tokens, without the one that ends it."""

    ids: np.ndarray
    """[tokens] int64."""
    offsets: np.ndarray | None
    """[tokens, 2] int64: the characters that each stands for. None where nobody asked."""


class Shard(NamedTuple):
    """The tokens of some documents of a source that follow each other."""

    tokens: np.ndarray
    """[tokens]: all documents, each with the token that ends it."""
    lengths: np.ndarray
    """[documents] int64: how many of the tokens are whose."""
    keys: np.ndarray
    """[documents] uint64: document_key of their texts."""
    text_bytes: np.ndarray
    """[documents] int64: of the texts in UTF-8."""
    is_candidate: np.ndarray
    """[documents] bool: may be held out."""
    token_bytes: np.ndarray
    """[tokens of the candidates] uint32: bytes of text that each stands for. Of conversations
    nothing: nobody asks.
    """
    is_target: np.ndarray = np.empty(0, dtype=bool)
    """Of conversations [tokens] bool: whether a token is learnt."""
    bad: np.ndarray = np.empty(0, dtype=np.uint8)
    """JSON of the conversations that cannot be learnt from (chat.py)."""


def document_key(text: str) -> int:
    """A number of 64 bits that equal texts share."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class Encoder:
    """A tokenizer, told how documents end and which may be held out.

    Args:
        tokenizer: None where all sources are tokens already, which need none.
        about: the tokenizer in messages; spelled: its token_bytes; held_out_below: documents with
            smaller keys are held out. The one with the smallest key of a shard is a candidate too,
            in case that no document of the corpus is below.
    """

    def __init__(
        self,
        tokenizer: Any,
        about: str,
        end_of_document: int,
        spelled: np.ndarray,
        dtype: Any,
        held_out_below: float,
    ):
        self.tokenizer = tokenizer
        self.about = about
        self.end_of_document = end_of_document
        self.spelled = spelled
        self.dtype = np.dtype(dtype)
        self.held_out_below = held_out_below

    @property
    def identity(self) -> bytes:
        """What tells it from others that would make other tokens."""
        if self.tokenizer is None:
            return f"{len(self.spelled)} ids, {self.end_of_document} ends".encode()
        said: str = self.tokenizer.to_str()
        return said.encode()

    def shard(self, texts: Sequence[Any], source: str, is_validation: bool = False) -> Shard:
        """
        Args:
            texts: of the documents; source: as messages name it; is_validation: all of it is held
                out.

        Raises:
            ValueError: the tokenizer cannot encode one of the texts.
        """
        keys = [document_key(text) for text in texts]
        smallest = min(keys)
        is_candidate = [
            is_validation or key < self.held_out_below or key == smallest for key in keys
        ]

        # Offsets cost a third of the time, and only held-out documents need them.
        encoded: list[Encoded | None] = [None] * len(texts)
        for wanted in (False, True):
            chosen = [i for i, is_one in enumerate(is_candidate) if is_one == wanted]
            tokens = self.encode([texts[i] for i in chosen], source, offsets=wanted)
            for i, one in zip(chosen, tokens, strict=True):
                encoded[i] = one

        ended: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        end = np.array([self.end_of_document], dtype=self.dtype)
        for text, found in zip(texts, encoded, strict=True):
            assert found is not None
            ended += [found.ids.astype(self.dtype), end]
            if found.offsets is not None:
                counts.append(encoded_bytes(text, found, self.spelled).astype(np.uint32))
        return Shard(
            np.concatenate(ended),
            np.array([len(found.ids) + 1 for found in encoded if found is not None], np.int64),
            np.array(keys, dtype=np.uint64),
            np.array([len(text.encode()) for text in texts], dtype=np.int64),
            np.array(is_candidate, dtype=bool),
            np.concatenate(counts),
        )

    def encode(self, texts: Iterable[str], source: str, offsets: bool) -> Iterator[Encoded]:
        """Tokens of every text, in their order.

        Raises:
            ValueError: the tokenizer cannot encode one of them.
        """
        for batch in batches(texts):
            characters = sum(map(len, batch))
            with (
                doing(
                    f"tokenising {len(batch)} documents of {characters:,} characters",
                    SECONDS_A_BATCH + characters / CHARACTERS_A_SECOND,
                ),
                tokenizers_errors(f"{self.about} cannot encode source {source}"),
            ):
                if len(batch) == 1 and len(batch[0]) > LONGEST:
                    whole = in_windows(batch[0], self._window)
                    found = [whole if offsets else Encoded(whole.ids, None)]
                else:
                    found = self._batch(batch, offsets)
            yield from found

    def _batch(self, texts: list[str], offsets: bool) -> list[Encoded]:
        encode = self.tokenizer.encode_batch if offsets else self.tokenizer.encode_batch_fast
        encodings = encode(texts, add_special_tokens=False)
        if offsets:
            return [
                Encoded(
                    np.array(encoding.ids, dtype=np.int64),
                    np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2),
                )
                for encoding in encodings
            ]

        # one array for all: a small one costs as much as a hundred tokens
        ids = [encoding.ids for encoding in encodings]
        ends = np.cumsum([len(one) for one in ids])
        joined = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=int(ends[-1]))
        return [Encoded(part, None) for part in np.split(joined, ends[:-1])]

    def _window(self, text: str) -> Encoded:
        return self._batch([text], offsets=True)[0]


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in their order; one that is longer than a window is alone."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        if batch and len(text) > LONGEST:
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# --- long documents -------------------------------------------------------------------------------


def in_windows(text: str, encode: Callable[[str], Encoded]) -> Encoded:
    """The tokens of a text, without ever encoding more than LONGEST characters of it.

    Each window begins before the end of the one before. Where both give the same tokens, one
    continues the other: what a tokenizer does to a text depends on what is near. Where they never
    agree (a token as long as the overlap), the next window begins at the end.
    """
    ids: list[np.ndarray] = []
    offsets: list[np.ndarray] = []
    begin = 0
    kept = 0
    """Characters that the accepted tokens stand for: the next window's tokens begin there."""
    window = encode(text[:LONGEST])
    while True:
        end = begin + LONGEST
        places = begin + window.offsets if window.offsets is not None else None
        assert places is not None
        first = int(np.searchsorted(places[:, 0], kept)) if kept else 0
        if end >= len(text):
            return Encoded(
                np.concatenate([*ids, window.ids[first:]]),
                np.concatenate([*offsets, places[first:]]),
            )

        following = encode(text[end - OVERLAP : end - OVERLAP + LONGEST])
        assert following.offsets is not None
        meeting = _meeting(window.ids, places, following.ids, end - OVERLAP + following.offsets)
        if meeting is None:
            following, begin, kept = encode(text[end : end + LONGEST]), end, end
            last = len(window.ids)
        else:
            begin, last, kept = end - OVERLAP, *meeting
        ids.append(window.ids[first:last])
        offsets.append(places[first:last])
        window = following


def _meeting(
    left: np.ndarray, left_places: np.ndarray, right: np.ndarray, right_places: np.ndarray
) -> tuple[int, int] | None:
    """The token of the left window, and the character, from which the right one continues: after
    AGREEING tokens that both have, at the first character of one that no other token shares.
    """
    begin = right_places[0, 0] if len(right_places) else 0
    start = int(np.searchsorted(left_places[:, 0], begin))
    rows = {
        (int(a), int(b), int(token)): place
        for place, ((a, b), token) in enumerate(zip(left_places[start:], left[start:], strict=True))
    }
    agreeing, before = 0, -2
    for place, ((a, b), token) in enumerate(zip(right_places, right, strict=True)):
        found = rows.get((int(a), int(b), int(token)))
        if found is None and a > left_places[-1, 0]:
            return None
        agreeing = agreeing + 1 if found is not None and found == before + 1 else 0
        before = found if found is not None else -2
        is_first = place > 0 and right_places[place - 1, 1] <= a
        if agreeing > AGREEING and is_first and found is not None:
            return start + found, int(a)
    return None
