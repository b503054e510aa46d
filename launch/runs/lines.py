"""Some records of a long log, without holding the others: a file is indexed line by line, and only
what is asked for is parsed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train.audit.files import evenly_over
from train.files.log_file import Record, parsed, step_of_line


class LineIndex:
    """Where the lines of a log begin that name a step; the file is read once, and memory holds a
    line of it.

    The file stays open, so that a run which replaces it meanwhile (train/files/log_file.py) changes
    nothing here. A file that is not there has no lines.

    Attributes:
        step, start, size: [N] int64; the step of a line, where it begins and how many bytes it has.
    """

    def __init__(self, path: Path):
        self._file = path.open("rb") if path.is_file() else None
        found, at = [], 0
        for line in self._file or ():
            if (step := step_of_line(line)) is not None:
                found.append((step, at, len(line)))
            at += len(line)
        self.step, self.start, self.size = np.array(found, np.int64).reshape(-1, 3).T

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self.step)

    def lines(self, rows: np.ndarray) -> Iterator[bytes]:
        """Some lines, in the order of `rows`."""
        for row in rows.tolist():
            assert self._file is not None
            self._file.seek(int(self.start[row]))
            yield self._file.read(int(self.size[row]))

    def spread(self, most: int) -> np.ndarray:
        """Rows of at most so many lines, spread evenly over the steps, the first and the last among
        them.
        """
        return evenly_over(self.step, most)


def spread_records(path: Path, most: int) -> list[Record]:
    """At most so many records of a log, spread evenly over its steps. A last line that a crash cut
    off gives way to the one before it.
    """
    index = LineIndex(path)
    rows = np.arange(len(index))
    if len(rows) and parsed(next(index.lines(rows[-1:]))) is None:
        rows = rows[:-1]
    chosen = rows[evenly_over(index.step[rows], most)]
    return [record for line in index.lines(chosen) if (record := parsed(line)) is not None]
