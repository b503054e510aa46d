"""Files that one process appends to for days: noticed when somebody removes or replaces them."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import IO, Any

log = logging.getLogger("loadstone")
_told: set[Path] = set()
"""Files that cannot be made again: said once."""


def followed(file: IO[Any], path: Path) -> IO[Any]:
    """The file to append the next record to: the open one, or where `path` no longer leads to it a
    new one, after saying what is lost. One that cannot be made stays as it is, and work goes on."""
    found = _what_happened(file, path)
    if found is None:
        return file

    try:
        again = path.open(file.mode)
    except OSError as error:
        if path not in _told:
            _told.add(path)
            log.warning(
                "%s %s and cannot be made again (%s): what would "
                "be written to it is lost, the run goes on",
                path,
                found,
                error.strerror,
            )
        return file

    _told.discard(path)
    log.warning(
        "%s %s while the run writes it: its records up to here are lost%s; it goes on in a new one",
        path,
        found,
        "" if found == "was removed" else " unless you have moved them",
    )
    file.close()
    return again


def _what_happened(file: IO[Any], path: Path) -> str | None:
    own = os.fstat(file.fileno())
    try:
        facts = path.stat()
    except OSError:
        return "was removed"
    if (facts.st_dev, facts.st_ino) != (own.st_dev, own.st_ino):
        return "was replaced"
    return "was cut short" if own.st_size < file.tell() else None
