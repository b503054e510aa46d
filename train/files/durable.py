"""Files that are whole or not there, whenever the machine stops."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.files.strict_json import dumps


def write_json(path: Path, data: Any) -> None:
    write_text(path, dumps(data, indent=1))


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically; its content is on disk when this returns, its name once the folder
    is synced.
    """
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to, which takes its place when the block ends well and
    is removed when it does not: whatever ends the process, nobody finds half a file."""
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, which takes that name when the block ends well and is
    removed when it does not: nothing half written is ever found there."""
    scratch = path.with_name(f".{path.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        sync_folder(scratch)
        scratch.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, link or folder as far as possible; what is left is not an error."""
    try:
        path.unlink()
    except IsADirectoryError:
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass
