"""Files of the run directory that a job needs as they were when it started."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class KeptFile:
    """Content and mode of a file, to put it back when somebody removes or changes it.

    Raises:
        OSError: it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.content = path.read_bytes()
        facts = path.stat()
        self.mode = stat.S_IMODE(facts.st_mode)
        self._seen = _identity(facts)

    def intact(self) -> bool:
        """Whether the file is as it was. One that cannot be looked at counts as intact."""
        try:
            return self._what_happened() is None
        except OSError:
            return True

    def mend(self) -> str | None:
        """Put the file back if it is not as it was; says what had become of it. One that was
        changed is kept beside it, as NAME.edited.

        Raises:
            OSError: it cannot be put back.
        """
        found = self._what_happened()
        if found == "changed":
            self.path.replace(self.path.with_name(f"{self.path.name}.edited"))
        if found is not None:
            self._write()
        return found

    def _what_happened(self) -> str | None:
        try:
            facts = self.path.stat()
            if _identity(facts) == self._seen:
                return None
            if self.path.read_bytes() != self.content:
                return "changed"
        except FileNotFoundError:
            return "removed"
        self._seen = _identity(facts)
        return None

    def _write(self) -> None:
        scratch = self.path.with_name(f".{self.path.name}.again")
        scratch.unlink(missing_ok=True)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        with os.fdopen(os.open(scratch, flags, self.mode), "wb") as file:
            file.write(self.content)
        scratch.replace(self.path)
        self._seen = _identity(self.path.stat())


def _identity(facts: os.stat_result) -> tuple[int, ...]:
    return facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_size
