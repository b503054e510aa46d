"""The binary files of the routing audit: what a record is, reading them piece by piece, and writing
one that stays below a limit by keeping of older steps only those whose number a power of two
divides. Imports no torch.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np

from train.files.thinning import KEEP, Thinning

log = logging.getLogger("loadstone")

HEADER = np.dtype(
    [
        ("step", "<u4"),
        ("token", "<u4"),
        ("layer", "<u2"),
        ("k", "u1"),
        ("reasons", "u1"),
        ("margin", "<f2"),
        ("entropy", "<f2"),
    ]
)
EXPERT = np.dtype([("expert", "<u2"), ("gate", "u1")])
PIECE = 1 << 22
"""Bytes of a file read at once."""
_RUN, _SINGLE = 16, 4096
"""Records of one size in a row that make it worth looking for runs; records read one by one where
there are none.
"""


def pieces(path: Path, length: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Whole records of a file, piece by piece: bytes uint8, start of each record [n], end of the
    last. Stops before a torn last record. length: bytes of the file to read; None: all.
    """
    rest = b""
    left = path.stat().st_size if length is None else length
    with path.open("rb") as file:
        while piece := file.read(min(PIECE, left)):
            left -= len(piece)
            data = rest + piece
            starts, end = _starts(data)
            rest = data[end:]
            yield np.frombuffer(data, np.uint8), starts, end


def _starts(data: bytes) -> tuple[np.ndarray, int]:
    """Where the whole records of some bytes begin [n] int64, and where the last of them ends."""
    found = [np.empty(0, np.int64)]
    at = 0
    ahead = 64
    bytes_, last = np.frombuffer(data, np.uint8), len(data) - HEADER.itemsize

    while at <= last:
        # Neighbours often have as many experts: such a run is found at once, by a guess that grows
        # while it holds.
        k = data[at + 10]  # experts of the record: it has 16 + 3k bytes
        size = HEADER.itemsize + EXPERT.itemsize * k
        number = min(ahead, (len(data) - at) // size)
        if number == 0:
            break
        other = np.flatnonzero(bytes_[at + 10 : at + 10 + number * size : size][:number] != k)
        run = int(other[0]) if len(other) else number

        found.append(at + size * np.arange(run))
        at += run * size
        ahead = 4 * ahead if run == number else 64

        # Where runs are short, single steps cost less than another guess.
        if run < min(_RUN, number):
            starts = []
            for _ in range(_SINGLE):
                if at > last or (end := at + 16 + 3 * data[at + 10]) > len(data):
                    break
                starts.append(at)
                at = end
            found.append(np.array(starts, np.int64))
    return np.concatenate(found), at


def headers(data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[n] of dtype HEADER."""
    return np.ascontiguousarray(data[starts[:, None] + np.arange(HEADER.itemsize)]).view(HEADER)[
        :, 0
    ]


def cut_records_after(path: Path, step: int) -> None:
    """Cut a file after its last whole record of that step or an earlier one."""
    length = 0
    for data, starts, end in pieces(path):
        later = np.flatnonzero(headers(data, starts)["step"] > step)
        length += int(starts[later[0]]) if len(later) else end
        if len(later):
            break
    with path.open("r+b") as binary:
        binary.truncate(length)


class RecordFile:
    """One rank's records, appended. Above its limit older steps are left out, a piece with every
    end_step(), beside the file; the result takes its place by a rename, so that a kill leaves the
    one or the other whole.

    Args:
        max_bytes: the file stays below; 0: it may grow for ever.
    """

    def __init__(self, path: Path, max_bytes: int = 0):
        self.path, self.max_bytes = path, max_bytes
        self._thinning = Thinning(path, max_bytes)
        self._file = path.open("ab")

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._thinning.give_up()
        self._file.close()

    def end_step(self) -> None:
        """The records of a step are complete: flush them, and thin the file a little where that is
        due.
        """
        self._file.flush()
        size = self._file.tell()
        self._thinning.go_on(size, lambda: self._leaving_out(size))

    def _leaving_out(self, size: int) -> Generator[None]:
        """One thinning of the first `size` bytes, which hold whole steps."""
        first = 0
        newest = 0
        stride = 1
        place, newest_from = 0, size - KEEP * self.max_bytes
        for data, starts, end in pieces(self.path, size):
            if not len(starts):
                continue
            steps = headers(data, starts)["step"]
            first = first or int(steps[0])
            old = starts + place <= newest_from
            # this step and those before it are the old ones
            newest = int(steps[old][-1]) if old.any() else newest
            place, last = place + end, int(steps[-1])
            yield
        per_step = KEEP * self.max_bytes / max(1, last - newest)
        while (newest - first + 1) / stride * per_step > KEEP * self.max_bytes:
            stride *= 2
        with self._thinning.scratch.open("wb") as target:
            for data, starts, end in pieces(self.path, size):
                steps = headers(data, starts)["step"]
                kept = (steps > newest) | (steps % stride == 0)
                edges = np.flatnonzero(
                    np.diff(np.concatenate(([False], kept, [False])).astype(np.int8))
                )
                bounds = np.append(starts, end)[edges]
                for begin, stop in bounds.reshape(-1, 2):
                    target.write(data[begin:stop].tobytes())
                yield
            self._file.flush()
            with self.path.open("rb") as source:
                source.seek(size)
                shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
            self._thinning.size_after = target.tell()
        self._file.close()
        self._thinning.scratch.replace(self.path)
        self._file = self.path.open("ab")


def bytes_by_step(folder: Path) -> dict[int, int]:
    """Bytes of records of every step, over all ranks."""
    found: dict[int, int] = {}
    for path in sorted(folder.glob("records-*.bin")):
        for data, starts, end in pieces(path):
            steps, where = np.unique(headers(data, starts)["step"], return_inverse=True)
            sizes = np.bincount(where, np.diff(starts, append=end), len(steps)).astype(int)
            for step, size in zip(steps.tolist(), sizes.tolist(), strict=True):
                found[step] = found.get(step, 0) + size
    return found


def steps_that_fit(
    folder: Path, max_bytes: int, at_most: int, lines: np.ndarray
) -> list[int] | None:
    """Steps to read of an audit above max_bytes: evenly spread, at most so many, and so many as fit
    (one at least). None: the whole audit fits. lines: [N] int64, the steps of steps.jsonl.
    """
    if sum(path.stat().st_size for path in folder.glob("records-*.bin")) <= max_bytes:
        return None
    known = set(lines.tolist())
    sizes = {step: size for step, size in bytes_by_step(folder).items() if step in known}
    largest = max(sizes.values(), default=0)
    # of all ranks, not of some
    whole = np.array(sorted(step for step, size in sizes.items() if 2 * size >= largest))
    most = max(1, min(at_most, max_bytes // max(1, largest)))
    return [int(step) for step in whole[evenly_over(whole, most)]]


def evenly_over(steps: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most `most` of some steps [N], ascending: those nearest to places spread evenly
    over the steps, the first and the last among them.
    """
    if len(steps) <= most:
        return np.arange(len(steps))
    places = np.linspace(steps[0], steps[-1], most) if most > 1 else np.array([steps[-1]])
    after = np.searchsorted(steps, places).clip(1, len(steps) - 1)
    return np.unique(np.where(places - steps[after - 1] <= steps[after] - places, after - 1, after))
