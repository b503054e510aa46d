"""Windows made in the background: a process of rank 0 reads the sources, and workers of its own
tokenise.

It makes windows when it is told up to which they are wanted, so that memory and disk are bounded:
text of one window, and the files from the oldest that is read to AHEAD behind the newest.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.config.data import DataConfig, SourceConfig
from train.data.files import Meter
from train.data.shards.encode import Encoder, Shard, document_key
from train.data.shards.make import bad_rows_of, in_shards
from train.data.shards.pool import Pool
from train.data.sources import documents, placed_documents
from train.data.streaming.windows import (
    Position,
    Records,
    Window,
    folder_of,
    seed_of,
    shuffled,
    token_file,
    write_tokens,
)
from train.data.worker import Child, tell

log = logging.getLogger("loadstone")
AHEAD = 1
"""Windows of a source that are made before anybody asks for them."""
WINDOW_UNIT = 2**20
"""Characters that data.stream.window_mib counts."""
LONGEST_WAIT = 5.0
"""Seconds after which somebody who waits is told that nothing is new."""


class Task(NamedTuple):
    """Documents to be tokenised."""

    number: int
    texts: list[str]
    source: str


class HeldOut:
    """Which documents of the sources are not trained on, by their keys."""

    def __init__(self, config: DataConfig, smallest: int | None):
        """
        Args:
            smallest: the key that is held out where the head has none below the fraction.
        """
        self.below = config.validation_fraction * 2**64
        keys = [
            document_key(text)
            for source in config.validation.sources
            for text in documents(source, bad_rows_of(source, config))
        ]
        keys += [] if smallest is None else [smallest]
        self._keys = np.unique(np.array(keys, dtype=np.uint64))

    def among(self, keys: np.ndarray) -> np.ndarray:
        """[documents] bool."""
        # Python's numbers compare exactly; numpy would make floats of keys.
        below = np.fromiter((int(key) < self.below for key in keys), dtype=bool, count=len(keys))
        return below | np.isin(keys, self._keys)


class Reader:
    """The windows of a source, one after another from any of them on."""

    def __init__(
        self,
        config: DataConfig,
        number: int,
        seed: int,
        encoder: Encoder,
        held_out: HeldOut,
        folder: Path,
    ):
        self.config, self.number, self.seed = config, number, seed
        self.source: SourceConfig = config.sources[number]
        self.encoder, self.held_out, self.folder = encoder, held_out, folder
        self.records = Records(folder)

    def windows(self, first: int, pool: Pool[Task, tuple[int, Shard]]) -> Iterator[Window]:
        """Make window `first` and all that follow.

        Raises:
            ValueError: a window is another than it was when it was made before: the source has
                changed; or the source cannot be read.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self.records.read()
        self.records.keep(known)  # half a line of a killed process goes
        # What was never counted has to be made, if only for that.
        window = min(first, len(known))
        place = known[window - 1].end if window else Position()
        texts, self._place = self._texts(place), place
        # Of a pass that was begun by others, something was trained on.
        trained = place != Position(place.number_of_pass)
        while True:
            found = list(self._shards(texts, pool))
            chosen = [~self.held_out.among(shard.keys) for shard in found]
            seed = seed_of(self.seed, self.number, window)
            tokens, count = shuffled(found, chosen, seed)
            trained = trained or count > 0
            if self._place.number_of_pass > place.number_of_pass:
                if not trained:
                    raise ValueError(
                        f"source {self.source.told!r} left no training document; lower "
                        f"data.validation_fraction {self.config.validation_fraction} or give more "
                        "text"
                    )
                trained = False
            crc = write_tokens(self.folder, window, tokens)
            made = Window(window, len(tokens), count, crc, self._place)
            if window < len(known) and known[window] != made:
                raise ValueError(
                    f"source {self.source.told!r} has changed since the run has read it: window "
                    f"{window} of the stream holds other tokens; put its files back, or start a "
                    "new run"
                )
            if window >= len(known):
                self.records.add(made)
            if window >= first:
                yield made
            else:
                token_file(self.folder, window).unlink()
            window, place = window + 1, self._place

    def _shards(self, texts: Iterator[str | None], pool: Pool[Task, Any]) -> Iterator[Shard]:
        """Those of the next window, in the order of its documents."""

        def tasks() -> Iterator[Task | None]:
            number = 0
            for found in in_shards(self._of_a_window(texts)):
                if found is not None:
                    yield Task(number, found, self.source.told)
                    number += 1
                else:
                    yield None

        for _, shard in sorted(pool.map(tasks()), key=lambda made: made[0]):
            yield shard

    def _of_a_window(self, texts: Iterator[str | None]) -> Iterator[str]:
        most, characters = self.config.stream.window_mib * WINDOW_UNIT, 0
        for text in texts:
            if text is None:  # the end of a pass
                return
            yield text
            characters += len(text)
            if characters >= most:
                return

    def _texts(self, place: Position) -> Iterator[str | None]:
        """Documents of all passes from a place on, None after each pass; `_place` is behind the
        one that was given last.
        """
        number, skipped_files, behind = place
        while True:
            # Files can be left out where all of them are read, each once.
            by_file = self.source.max_documents is None and self.source.split.isidentifier()
            meter = Meter()
            begun: dict[int, int] = {}
            bad_rows = bad_rows_of(self.source, self.config)
            for _, text in placed_documents(
                self.source,
                bad_rows,
                meter=meter,
                first_file=skipped_files,
                keep_files=False,
            ):
                file = meter.number if by_file else 0
                here = begun[file] = begun.get(file, 0) + 1
                if file == skipped_files and here <= behind:
                    continue
                self._place = Position(number, file, here)
                yield text
            if bad_rows.count:
                tell(f"source {self.source.told}: left out {bad_rows}{bad_rows.by_kind}")
            number, skipped_files, behind = number + 1, 0, 0
            self._place = Position(number)
            yield None


class Producer:
    """The process that makes windows, as rank 0 sees it. It is a fork, to be made before what it
    should not hold.

    Args:
        encoder: of the head's store; smallest: see HeldOut.
    """

    def __init__(
        self, config: DataConfig, encoder: Encoder, seed: int, smallest: int | None, run_data: Path
    ):
        here, there = multiprocessing.Pipe()

        def work() -> None:
            _produce(config, encoder, seed, smallest, run_data, there)

        self._child = Child(work, here, there)
        # A process that ends in any other way would wait for this one.
        atexit.register(self.close)

    def begin(self, first: list[int]) -> None:
        """Begin with these windows of the sources."""
        self._send("begin", first)

    def want(self, source: int, last: int, oldest: int) -> None:
        """Windows of a source up to `last` are wanted, and none before `oldest` any more."""
        self._send("want", source, last, oldest)

    def _send(self, *order: Any) -> None:
        # What has ended the process is told to whoever waits for a window.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._child.pipe.send(order)

    def made(self) -> list[tuple[int, Window]]:
        """Windows that have come, each with its source; waits a while for the first.

        Raises:
            ValueError, OSError, LibraryError: as raised in the process.
        """
        found: list[tuple[int, Window]] = []
        until = time.monotonic() + LONGEST_WAIT
        while not found and (left := until - time.monotonic()) > 0:
            while self._child.pipe.poll(0 if found else min(left, 1.0)):
                kind, *rest = self._child.hear()
                if kind == "result":
                    found.append(rest[0])
                elif kind == "report":
                    log.info("%s", *rest)
            self._child.check()
        return found

    def close(self) -> None:
        atexit.unregister(self.close)
        self._child.end()


def _produce(
    config: DataConfig,
    encoder: Encoder,
    seed: int,
    smallest: int | None,
    run_data: Path,
    orders: Any,
) -> None:
    """In the process: make what is wanted, the source that is most behind first."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    kind, first = orders.recv()
    assert kind == "begin"
    held_out = HeldOut(config, smallest)
    readers = [
        Reader(config, i, seed, encoder, held_out, folder_of(run_data, i))
        for i in range(len(config.sources))
    ]
    last, made = [n - 1 for n in first], [n - 1 for n in first]

    def work(task: Task) -> tuple[int, Shard]:
        return task.number, encoder.shard(task.texts, task.source)

    workers = config.stream.workers or max(1, len(os.sched_getaffinity(0)) // 2)
    with Pool(work, workers) as pool:
        windows = [r.windows(n, pool) for r, n in zip(readers, first, strict=True)]
        while True:
            behind = [wanted - done for wanted, done in zip(last, made, strict=True)]
            source = int(np.argmax(behind))
            # Only where nothing is to be done, orders are waited for.
            while orders.poll(None if behind[source] <= 0 else 0):
                _, asked, wanted, oldest = orders.recv()
                last[asked] = max(last[asked], wanted)
                _remove_before(readers[asked].folder, oldest)
                behind[asked] = last[asked] - made[asked]
                source = int(np.argmax(behind))
            window = next(windows[source])
            made[source] = window.number
            orders.send(("result", (source, window)))


def _remove_before(folder: Path, oldest: int) -> None:
    for path in folder.glob("*.bin"):
        if int(path.stem) < oldest:
            path.unlink()


def encoder_of(store: Any, config: DataConfig) -> Encoder:
    """What tokenises the rest as the head was.

    Args:
        store: the TokenStore of the head.
    """
    tokenizer = store.tokenizer()
    tokenizer.encode_special_tokens = True  # text that spells a special token is text
    tokenizer.post_processor = None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    dtype = np.dtype(store.manifest["token_dtype"])
    about = f"the tokenizer of {store.path}"
    spelled = store.token_bytes()
    # Nothing is a candidate: what is held out of a stream is left out, and needs no offsets.
    return NoCandidates(tokenizer, about, store.end_of_document, spelled, dtype, 0.0)


class NoCandidates(Encoder):
    """An encoder that spends nothing on documents that may be held out."""

    def shard(self, texts: Any, source: str, is_validation: bool = False) -> Shard:
        end = np.array([self.end_of_document], dtype=self.dtype)
        ended: list[np.ndarray] = []
        lengths = []
        for found in self.encode(texts, source, offsets=False):
            ended += [found.ids.astype(self.dtype), end]
            lengths.append(len(found.ids) + 1)
        keys = np.array([document_key(text) for text in texts], dtype=np.uint64)
        empty = np.empty(0, np.int64)
        none = np.zeros(len(texts), dtype=bool)
        return Shard(np.concatenate(ended), np.array(lengths, np.int64), keys, empty, none, empty)
