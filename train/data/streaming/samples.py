"""The training rows of a stream, in any layout of ranks."""

from __future__ import annotations

import logging
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch.distributed as dist

from train.config.data import DataConfig, labels
from train.data.mixture import Blend, Mixture
from train.data.store import TokenStore, TrainingSamples
from train.data.streaming.producer import AHEAD, Producer, encoder_of
from train.data.streaming.windows import Records, Window, folder_of, token_file

log = logging.getLogger("loadstone")
T = TypeVar("T")
SEEN_SECONDS = 120.0
"""In which a file that rank 0 has written is seen by all ranks."""


class StreamingSamples(TrainingSamples):
    """All sources, blended by weight. Sample i is [seq_len + 1] token ids.

    Which they are depends on the documents, the seed and the settings of the stream alone
    (windows.py). Rank 0 has windows made; every rank reads its rows of their files. Rank 0 is to
    make this before the model, as its process is a fork.

    Args:
        store: of the head of the sources; run_data: RUN/data, which all ranks share.
    """

    def __init__(
        self, store: TokenStore, config: DataConfig, seq_len: int, seed: int, run_data: Path
    ):
        self.store, self.config, self.seq_len = store, config, seq_len
        self.run_data, self.names = run_data, labels(config.sources)
        number = len(config.sources)
        weights = tuple(source.weight for source in config.sources)
        self.begin_blend(weights)
        self._producer: Producer | None = None
        if _is_first_rank():
            smallest = store.manifest.get("held_out_key")
            self._producer = Producer(
                config,
                encoder_of(store, config),
                seed,
                None if smallest is None else int(smallest),
                run_data,
            )
        self._windows: list[list[Window]] = _of_rank_zero(self._recorded)
        self._ends = [list(np.cumsum([w.tokens for w in found])) for found in self._windows]
        self._next: list[int] = []
        """Of every source the first window that was not made by this job yet."""
        self._asked = [(-1, -1)] * number
        self._files: dict[tuple[int, int], np.ndarray] = {}

    def mix(self, config: DataConfig) -> None:
        self._blend = Blend(Mixture.of(config, (), (None,) * len(config.sources), self.seq_len))

    def samples_in(self, source: int, epochs: float) -> int:
        raise AssertionError("nobody knows how many samples a stream has")

    def epochs(self, count: int) -> list[float]:
        """Nothing: passes are told as they are read."""
        return []

    def close(self) -> None:
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def open(self, start: int, stop: int) -> None:
        """Make samples start..stop-1 readable. Collective."""
        if not self._next:
            self._begin(start)
        rows: dict[int, list[int]] = {}
        for index in range(start, stop):
            source, within = self._locate(index)
            rows.setdefault(source, []).append(within)
        spans = {
            source: (min(found) * self.seq_len, (max(found) + 1) * self.seq_len + 1)
            for source, found in sorted(rows.items())
        }

        # All ranks know of the same windows, so all of them wait together and go on together.
        while any(self._end_of(source) < end for source, (_, end) in spans.items()):
            for source, (begin, end) in spans.items():
                if self._end_of(source) < end:
                    self._ask(source, self._next[source] + AHEAD, self._window_of(source, begin))
            for source, window in _of_rank_zero(self._made):
                self._take(source, window)
        for source, (begin, end) in spans.items():
            oldest = self._window_of(source, begin)
            self._ask(source, self._window_of(source, end - 1) + AHEAD, oldest)
            for key in [key for key in self._files if key[0] == source and key[1] < oldest]:
                del self._files[key]

    def tokens(self, index: int) -> np.ndarray:
        """[seq_len + 1] int64."""
        source, within = self._locate(index)
        first = within * self.seq_len
        return self._tokens_between(source, first, first + self.seq_len + 1)

    # --- windows ----------------------------------------------------------------------------------

    def _begin(self, start: int) -> None:
        """Have windows made from the first that a sample behind `start` may need."""
        counts = self._blend.counts(start)
        self._next = [
            self._window_of(source, count * self.seq_len) for source, count in enumerate(counts)
        ]
        if self._producer is not None:
            self._producer.begin(self._next)

    def _window_of(self, source: int, token: int) -> int:
        return bisect_right(self._ends[source], token)

    def _end_of(self, source: int) -> int:
        """Tokens before the first window that is not made yet."""
        number = self._next[source]
        return int(self._ends[source][number - 1]) if number else 0

    def _ask(self, source: int, last: int, oldest: int) -> None:
        if self._producer is not None and self._asked[source] != (last, oldest):
            self._asked[source] = (last, oldest)
            self._producer.want(source, last, oldest)

    def _made(self) -> list[tuple[int, Window]]:
        assert self._producer is not None
        return self._producer.made()

    def _recorded(self) -> list[list[Window]]:
        number = len(self.config.sources)
        return [Records(folder_of(self.run_data, source)).read() for source in range(number)]

    def _take(self, source: int, window: Window) -> None:
        """A window that was made: known before, or the next."""
        windows, ends = self._windows[source], self._ends[source]
        assert window.number == self._next[source]
        self._next[source] += 1
        if window.number == len(windows):
            windows.append(window)
            ends.append((ends[-1] if ends else 0) + window.tokens)
        before = windows[window.number - 1].end.number_of_pass if window.number else 0
        if window.end.number_of_pass > before:
            self._tell_pass(source, before)

    def _tell_pass(self, source: int, number: int) -> None:
        windows = self._windows[source]
        begun = [0, *(w.end.number_of_pass for w in windows)]
        of_it = [w for w, of in zip(windows, begun, strict=False) if of == number]
        log.info(
            "data     source %s is read to its end: pass %d has %s documents, %s tokens; the next "
            "begins",
            self.names[source],
            number + 1,
            f"{sum(w.documents for w in of_it):,}",
            f"{sum(w.tokens for w in of_it):,}",
        )

    # --- files ------------------------------------------------------------------------------------

    def _tokens_between(self, source: int, begin: int, end: int) -> np.ndarray:
        parts = []
        number = self._window_of(source, begin)
        while begin < end:
            stop = int(self._ends[source][number])
            start = stop - self._windows[source][number].tokens
            file = self._file(source, number) if stop > start else np.empty(0, np.int64)
            parts.append(file[begin - start : min(end, stop) - start])
            begin, number = min(end, stop), number + 1
        return np.concatenate(parts).astype(np.int64)

    def _file(self, source: int, number: int) -> np.ndarray:
        """The tokens of a window, verified when it is opened."""
        if (source, number) not in self._files:
            dtype = np.dtype(self.store.manifest["token_dtype"])
            window = self._windows[source][number]
            path = token_file(folder_of(self.run_data, source), number)
            _wait_for(path, window.tokens * dtype.itemsize)
            found = np.memmap(path, dtype, "r")
            if zlib.crc32(found.tobytes()) != window.crc:
                raise ValueError(
                    f"{path} is not what was written: the disk, or somebody else, has changed it; "
                    "resume the run, which makes it again"
                )
            self._files[source, number] = found
        return self._files[source, number]


def _wait_for(path: Path, size: int) -> None:
    """Until this machine sees the file as rank 0 has written it."""
    until = time.monotonic() + SEEN_SECONDS
    while not (path.is_file() and path.stat().st_size == size):
        if time.monotonic() > until:
            raise ValueError(
                f"{path} with {size:,} bytes was written by rank 0 and is not seen here after "
                f"{SEEN_SECONDS:.0f} s: the run directory must be on a file system that all nodes "
                "share"
            )
        time.sleep(0.05)


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _of_rank_zero(function: Callable[[], T]) -> T:
    if dist.is_initialized() and dist.get_world_size() > 1:
        from train.rank.runtime import from_rank_zero

        return from_rank_zero(function)
    return function()
