"""Reading files of ids through, once: ids are held against the vocabulary, documents told apart by
what they hold, and a checksum of every piece is kept, by which later changes are found.

The work is cut into ranges of documents, done by anybody in any order (train/data/shards/make.py).
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from train.data.damage import PIECE_BYTES
from train.data.tokens.files import IdFile

RANGE_IDS = 2**22
RANGE_DOCUMENTS = 2**15
"""A range ends when it has as many of either."""
MAX_LENGTH = 2**31 - 2
"""Ids of a document, with one more that ends it: megatron-core counts with 32 bits."""
CHUNK_IDS = 2**20
"""Ids that are looked at together."""


class Range(NamedTuple):
    """Documents of a file that follow each other."""

    path: str
    dtype: str
    begin: int
    """Bytes before the first id of the file."""
    bounds: np.ndarray
    """[documents + 1] int64: the first id of each, and the end of the last."""
    size: int
    """Bytes of all ids of the file."""
    file: int
    """The file's number in the source."""

    @property
    def num_bytes(self) -> int:
        return int(self.bounds[-1] - self.bounds[0]) * np.dtype(self.dtype).itemsize

    def facts(self) -> bytes:
        """What tells it from other ranges, and from itself when the file was another."""
        facts = os.stat(self.path)
        named = (os.path.abspath(self.path), facts.st_size, facts.st_mtime_ns, self.dtype)
        return repr((named, self.begin, self.size)).encode() + self.bounds.tobytes()


class ReadRange(NamedTuple):
    """What a range holds, but for its tokens."""

    of_file: np.ndarray
    """[1] int64: the file's number in the source."""
    starts: np.ndarray
    """[documents] int64: the first id of each, in its file."""
    lengths: np.ndarray
    """[documents] int64: ids of each, with the one that ends it if it is there."""
    has_end: np.ndarray
    """[documents] bool: whether that is there."""
    keys: np.ndarray
    """[documents] uint64: keys of their ids without it, which equal documents share."""
    text_bytes: np.ndarray
    """[documents] int64: bytes that their tokens spell."""
    pieces: np.ndarray
    """CRC-32 of every piece of the file that begins in the range."""
    hashed: np.ndarray
    """[32] uint8: of all ids."""


def ranges(number: int, found: IdFile) -> Iterator[Range]:
    """The ranges of a file, its `number` in the source.

    Raises:
        ValueError: a document is too long.
    """
    bounds, itemsize = found.bounds, found.dtype.itemsize
    first, last = 0, len(bounds) - 1
    if last > 0 and int(np.diff(bounds).max()) > MAX_LENGTH:
        raise ValueError(
            f"{found.path} has a document of {int(np.diff(bounds).max()):,} tokens, more than "
            f"{MAX_LENGTH:,}; an array of one dimension is divided by its ids that end documents "
            "(data.tokenizer.end_of_document) or by the places in NAME.ends.npy"
        )
    while first < last:
        most = int(np.searchsorted(bounds, bounds[first] + RANGE_IDS))
        end = min(last, first + RANGE_DOCUMENTS, max(first + 1, most))
        yield Range(
            found.path,
            found.dtype.str,
            found.begin,
            bounds[first : end + 1],
            found.count * itemsize,
            number,
        )
        first = end


def read_range(asked: Range, end_of_document: int, spelled: np.ndarray) -> ReadRange:
    """
    Args:
        spelled: [vocab_size] bytes that each token spells, 0 where that is not known.

    Raises:
        ValueError: an id is not in the vocabulary.
    """
    dtype = np.dtype(asked.dtype)
    count = asked.size // dtype.itemsize
    ids = np.memmap(asked.path, dtype, "r", asked.begin, (count,)) if count else np.empty(0, dtype)
    keys, ends, sizes = [], [], []
    whole = hashlib.sha256()
    for start, stop in zip(asked.bounds[:-1].tolist(), asked.bounds[1:].tolist(), strict=True):
        has_end = stop > start and int(ids[stop - 1]) == end_of_document
        hashed, size = hashlib.sha256(), 0
        for first in range(start, stop - has_end, CHUNK_IDS):
            chunk = ids[first : min(first + CHUNK_IDS, stop - has_end)]
            _check(chunk, len(spelled), asked, first)
            hashed.update(chunk.astype("<i8").tobytes())
            size += int(spelled[chunk].sum())
        keys.append(int.from_bytes(hashed.digest()[:8], "big"))
        whole.update(hashed.digest())
        ends.append(has_end)
        sizes.append(size)
    return ReadRange(
        np.array([asked.file], dtype=np.int64),
        asked.bounds[:-1],
        np.diff(asked.bounds),
        np.array(ends, dtype=bool),
        np.array(keys, dtype=np.uint64),
        np.array(sizes, dtype=np.int64),
        _checksums(asked),
        np.frombuffer(whole.digest(), dtype=np.uint8),
    )


def _check(ids: np.ndarray, vocab_size: int, asked: Range, first: int) -> None:
    if int(ids.min()) >= 0 and int(ids.max()) < vocab_size:
        return
    place = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
    document = int(np.searchsorted(asked.bounds, first + place, side="right")) - 1
    raise ValueError(
        f"{asked.path}: token {first + place:,} is {int(ids[place])} (in a document that begins at "
        f"token {int(asked.bounds[document]):,}), and ids of this vocabulary are below "
        f"{vocab_size:,}; give the tokenizer that made them (data.tokenizer.path), or without one "
        "data.tokenizer.vocab_size and model.vocab_size"
    )


def _checksums(asked: Range) -> np.ndarray:
    """Of the pieces that begin in the range: the first may have begun before, the last end
    after it.
    """
    itemsize = np.dtype(asked.dtype).itemsize
    first = -(-int(asked.bounds[0]) * itemsize // PIECE_BYTES)
    last = -(-int(asked.bounds[-1]) * itemsize // PIECE_BYTES)
    with open(asked.path, "rb") as file:
        file.seek(asked.begin + first * PIECE_BYTES)
        sizes = (min(PIECE_BYTES, asked.size - i * PIECE_BYTES) for i in range(first, last))
        pieces = (zlib.crc32(file.read(size)) for size in sizes)
        return np.fromiter(pieces, dtype="<u4", count=max(0, last - first))
