"""All shards of a corpus: read by one process in the order of the sources, tokenised by many.

Where one shard ends and the next begins depends on the documents alone. So whatever a preparation
had made when it was killed is what any other would make.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from train.config.data import DataConfig, SourceConfig
from train.data.files import Meter, Odd, Row
from train.data.shards.chat import bad_in
from train.data.shards.encode import Encoder
from train.data.shards.parts import Parts, digest
from train.data.shards.pool import Pool
from train.data.sources import BadRows, checked_files, placed_documents
from train.data.tokens.files import IdFile, id_files
from train.data.tokens.read import Range, ranges, read_range
from train.data.worker import doing, show, tell

T = TypeVar("T")
SHARD_DOCUMENTS = 2**15
SHARD_CHARACTERS = 2**22
"""A shard ends when it has as many of either: a second's work, which is what a kill can cost each
process.
"""
LOOK_CHARACTERS = 2**18
"""After reading as many, it is looked whether a process has become free."""
SHOW_SECONDS = 0.5
"""Between two signs of how far it is."""


class Progress(NamedTuple):
    """How far a source has been tokenised."""

    source: str
    done: int
    """Bytes of its files that have been read, as they lie on disk."""
    total: int | None
    """Of so many; None where nobody knows."""
    documents: int
    """Of all sources: tokenised, by this process or one before it."""
    tokens: int
    """Of all sources: made by this process."""
    bytes: int
    """Of text, which it made them from."""


class Task(NamedTuple):
    """A shard to be made."""

    source: int
    number: int
    documents: list[Any] | Range
    """Their texts; of conversations their rows; of tokens where they are."""


class Made(NamedTuple):
    """What a shard holds."""

    documents: int
    tokens: int
    bytes: int


class Shards:
    """The shards of a corpus.

    Args:
        parts: where they are, and come to be.
    """

    def __init__(self, config: DataConfig, encoder: Encoder, parts: Parts):
        self.config = config
        self.sources = (*config.sources, *config.validation.sources)
        self.encoder = encoder
        self.parts = parts
        self._tokenizer = encoder.identity
        self.id_files: dict[int, list[IdFile]] = {}
        """Of sources that are tokens already: their files, when `make` has returned."""
        self._kept = 0
        self._done = 0
        self._found: list[tuple[int, BadRows]] = []
        self._meter = Meter()

    def make(self, num_workers: int) -> list[tuple[int, BadRows]]:
        """Make what is not there yet.

        Returns:
            Of every source how many shards it has, and which of its rows were bad.

        Raises:
            ValueError: a source cannot be read, or the tokenizer cannot encode it.
        """
        # The library's own threads would not survive the fork, and every core has a process.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokens = text = 0
        shown = time.monotonic()
        with Pool(self._work, num_workers) as pool:
            for made in pool.map(self._missing()):
                self._done += made.documents
                tokens, text = tokens + made.tokens, text + made.bytes
                if time.monotonic() - shown > SHOW_SECONDS:
                    shown = time.monotonic()
                    source = self.sources[min(len(self._found), len(self.sources) - 1)]
                    meter = self._meter
                    show(
                        Progress(
                            source.told,
                            meter.position,
                            meter.total,
                            self._done,
                            tokens,
                            text,
                        )
                    )
        if self.config.format == "chat":
            self._add_bad_conversations()
        if self._kept:
            tell(f"{self._kept:,} shards of an earlier preparation were kept")
        return self._found

    def _work(self, task: Task) -> Made:
        """In a process of the pool."""
        if isinstance(task.documents, Range):
            return self._read(task, task.documents)
        is_validation = task.source >= len(self.config.sources)
        shard = self.encoder.shard(task.documents, self.sources[task.source].path, is_validation)
        of = digest(self._texts(task.documents), self._tokenizer)
        self.parts.write(task.source, task.number, of, shard)
        return Made(len(shard.lengths), len(shard.tokens), int(shard.text_bytes.sum()))

    def _read(self, task: Task, asked: Range) -> Made:
        """Of a source that is tokens already."""
        with doing(f"reading {asked.path}"):
            read = read_range(asked, self.encoder.end_of_document, self.encoder.spelled)
        self.parts.write(task.source, task.number, self._digest_of(asked), read)
        return Made(len(read.lengths), int(read.lengths.sum()), int(read.text_bytes.sum()))

    def _digest_of(self, asked: Range) -> bytes:
        return hashlib.sha256(self._tokenizer + asked.facts()).digest()

    def _missing_ranges(self, i: int, source: SourceConfig) -> Iterator[Task | None]:
        files = list(id_files(source, checked_files(source), self.encoder.end_of_document))
        self.id_files[i] = files
        self._meter = Meter()
        self._meter.total = sum(found.count * found.dtype.itemsize for found in files)
        number = 0
        for place, found in enumerate(files):
            for asked in ranges(place, found):
                if self.parts.holds(i, number, self._digest_of(asked)):
                    self._kept += 1
                    self._done += len(asked.bounds) - 1
                else:
                    yield Task(i, number, asked)
                self._meter.skip(asked.num_bytes)
                number += 1
        self._found.append((number, bad_rows_of(source, self.config)))

    def _missing(self) -> Iterator[Task | None]:
        for i, source in enumerate(self.sources):
            if source.holds_tokens:
                yield from self._missing_ranges(i, source)
                continue
            bad_rows = bad_rows_of(source, self.config)
            number = 0
            self._meter = Meter()
            for found in in_shards(self._documents(source, bad_rows), self._length):
                if found is None:
                    yield None
                    continue
                of = self._digest_if_there(i, number, found)
                if of is not None and self.parts.holds(i, number, of):
                    self._kept += 1
                    self._done += len(found)
                else:
                    yield Task(i, number, found)
                number += 1
            self._found.append((number, bad_rows))

    def _documents(self, source: SourceConfig, bad_rows: BadRows) -> Iterator[Any]:
        chat = self.config.format == "chat"
        for row, text in placed_documents(source, bad_rows, chat, self._meter):
            yield row if chat else text

    def _length(self, document: Any) -> int:
        return len(document.text if self.config.format == "chat" else document)

    def _texts(self, found: list[Any]) -> list[str]:
        return [row.text for row in found] if self.config.format == "chat" else found

    def _add_bad_conversations(self) -> None:
        """What the processes of the pool could not learn from, or those of an earlier preparation.

        Raises:
            ValueError: more rows are bad than may be.
        """
        for source, (num_shards, bad_rows) in enumerate(self._found):
            for number in range(num_shards):
                for bad in bad_in(self.parts.read(source, number)):
                    bad_rows.add(Row(bad.file, bad.number, ""), Odd(bad.reason))
            bad_rows.check()

    def _digest_if_there(self, source: int, number: int, found: list[Any]) -> bytes | None:
        there = self.parts.path(source, number).is_file()
        return digest(self._texts(found), self._tokenizer) if there else None


def bad_rows_of(source: SourceConfig, config: DataConfig) -> BadRows:
    """Counts the rows of a source that are left out, none so far."""
    fails = config.on_bad_row == "fail"
    if config.format == "chat":
        lacking = "that cannot be learnt from"
        return BadRows(source, config.max_bad_rows, lacking=lacking, fails=fails)
    return BadRows(source, config.max_bad_rows, fails=fails)


def in_shards(
    documents: Iterable[T],
    length: Callable[[T], int] = len,  # type: ignore[assignment]
) -> Iterator[list[T] | None]:
    """The documents of every shard; between them None, when it is time to look around.

    Args:
        length: characters of a document.
    """
    shard: list[T] = []
    characters = looked = 0
    for document in documents:
        shard.append(document)
        characters += length(document)
        if len(shard) == SHARD_DOCUMENTS or characters >= SHARD_CHARACTERS:
            yield shard
            shard, characters, looked = [], 0, 0
        elif characters - looked >= LOOK_CHARACTERS:
            looked = characters
            yield None
    if shard:
        yield shard
