"""Making a file that is appended to smaller, a little with every write, beside the file itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from pathlib import Path

log = logging.getLogger("loadstone")
START, KEEP = 0.75, 0.2
"""Shares of the limit: where thinning begins; what then stays of the newest records, untouched, and
of the old ones.
"""


class Thinning:
    """When a file is thinned, and what is left of a thinning that is given up: nothing. Its work is
    a generator that writes `scratch` and lets it take the file's place at its end.

    Args:
        max_bytes: the file is to stay below; 0: it may grow for ever.

    Attributes:
        scratch: beside the file.
        size_after: bytes of the last result, which the work says: the next thinning begins when the
            file has grown by a quarter, whatever the limit.
    """

    def __init__(self, path: Path, max_bytes: int):
        self.path, self.max_bytes = path, max_bytes
        self.scratch = path.with_name(f".{path.name}.tmp")
        self.scratch.unlink(missing_ok=True)  # of a thinning that was killed
        self.size_after = 0
        self._work: Generator[None] | None = None

    @property
    def is_on(self) -> bool:
        return self._work is not None

    def go_on(self, size: int, begin: Callable[[], Generator[None]], pieces: int = 1) -> None:
        """Do so many pieces of the work, of a new one where the file of `size` bytes is due. An
        error is logged, and the file stays as it is.
        """
        if self._work is None:
            if not self.max_bytes or size <= max(START * self.max_bytes, 1.25 * self.size_after):
                return
            self._work = begin()
        try:
            for _ in range(pieces):
                next(self._work)
        except StopIteration:
            self._work = None
        except OSError as error:
            log.warning(
                "%s could not be thinned (%s) and stays as it is", self.path, error.strerror
            )
            self.give_up()
            self.size_after = size

    def give_up(self) -> None:
        """End the work, if there is one, without a result."""
        if self._work is not None:
            self._work.close()
            self._work = None
        self.scratch.unlink(missing_ok=True)
