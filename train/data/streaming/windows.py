"""What a stream is: the tokens of a source in an order that its documents, a seed and the size of a
window decide, whoever makes them.

A pass reads a source in its own order, without what is held out. It is cut into windows: a window
ends with the document by which it has as many characters as asked for, or with the pass. The
documents of a window are shuffled with each other, and end with the token that says so. All windows
of all passes, one after another, are the stream; row k of the source is its tokens k * seq_len to
(k + 1) * seq_len, both included.

    RUN/data/stream/SOURCE/NUMBER.bin     the tokens of a window, while it is needed
    RUN/data/stream/SOURCE/windows.jsonl  a line for every window that was ever made

The second file saves a resumed run from making all windows again to count their tokens.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.data.shards.encode import Shard
from train.files.manifest import require_owned
from train.files.strict_json import dumps

RECORDS = "windows.jsonl"


class Position(NamedTuple):
    """Where reading goes on."""

    number_of_pass: int = 0
    file: int = 0
    """Files of the pass that are behind; 0 of a source that is not read file by file."""
    documents: int = 0
    """Of this file that are behind, or of the pass."""


@dataclass(frozen=True)
class Window:
    """What is known of a window."""

    number: int
    tokens: int
    documents: int
    crc: int
    """CRC-32 of its file."""
    end: Position
    """Where the next one begins."""


def folder_of(run_data: Path, source: int) -> Path:
    return run_data / "stream" / str(source)


def token_file(folder: Path, number: int) -> Path:
    return folder / f"{number}.bin"


def shuffled(shards: list[Shard], chosen: list[np.ndarray], seed: int) -> tuple[np.ndarray, int]:
    """Tokens and number of the documents of a window.

    Args:
        shards: of all its documents, in their order; chosen: [documents] bool of each, those that
            are trained on; seed: see seed_of.
    """
    documents = [
        tokens
        for shard, wanted in zip(shards, chosen, strict=True)
        for tokens, is_one in zip(
            np.split(shard.tokens, np.cumsum(shard.lengths)[:-1]), wanted, strict=True
        )
        if is_one
    ]
    # The generator whose stream numpy has promised never to change: an order outlives versions.
    order = np.random.RandomState(seed).permutation(len(documents))
    parts = [documents[i] for i in order]
    empty = np.empty(0, shards[0].tokens.dtype if shards else np.uint16)
    return np.concatenate([empty, *parts]), len(documents)


def seed_of(seed: int, source: int, window: int) -> int:
    """That of the order of a window."""
    return (seed + 104729 * source + 7919 * window) % 2**32


class Records:
    """The windows of a source that were ever made, in a file."""

    def __init__(self, folder: Path):
        self.path = folder / RECORDS

    def read(self) -> list[Window]:
        """Windows 0, 1, ...: as far as the lines are whole and in order."""
        found: list[Window] = []
        if not self.path.is_file():
            return found
        require_owned(self.path)
        for line in self.path.read_bytes().splitlines():
            try:
                facts = json.loads(line)
                window = Window(**{**facts, "end": Position(*facts["end"])})
                counts = (window.number, window.tokens, window.documents, *window.end, window.crc)
            except (ValueError, TypeError, KeyError, RecursionError):
                break
            if any(type(n) is not int or n < 0 for n in counts) or window.number != len(found):
                break
            found.append(window)
        return found

    def keep(self, windows: list[Window]) -> None:
        """Leave these lines in the file and no other."""
        self.path.write_text("".join(map(_line, windows)))

    def add(self, window: Window) -> None:
        with self.path.open("a") as file:
            file.write(_line(window))


def _line(window: Window) -> str:
    return dumps(asdict(window)) + "\n"


def write_tokens(folder: Path, number: int, tokens: np.ndarray) -> int:
    """Put the file of a window into its place; returns its checksum."""
    path = token_file(folder, number)
    scratch = path.with_suffix(".tmp")
    content = tokens.tobytes()
    scratch.write_bytes(content)
    os.replace(scratch, path)
    return zlib.crc32(content)
