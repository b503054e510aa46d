"""Folders that are whole or absent: made beside their place and renamed, by one process or by
several at once.

    NAME                 the folder
    .NAME-XXXXXXXX       the scratch folder that becomes it
    .NAME-XXXXXXXX.lock  {"host"}, flocked by the process that makes it for as long as it lives

What a process that was killed has left is told by its lock, which nobody holds, and removed by the
next one that makes a folder in the same place.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from train.files.durable import remove
from train.files.strict_json import dumps

IDLE_SECONDS = 7 * 86400
"""What no process of this machine holds and nothing has changed for as long is abandoned, whoever
made it.
"""
_SCRATCH = re.compile(r"\.(.+)-[a-z0-9_]{8}\Z")


def make_folder(
    folder: Path, build: Callable[[Path], object], is_whole: Callable[[], bool]
) -> None:
    """Put what `build` writes into an empty folder in the place of `folder`.

    Args:
        is_whole: whether another process has put its own there meanwhile, which then stays.

    Raises:
        OSError: the place cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    with _locked_name(folder) as scratch:
        try:
            scratch.mkdir(mode=0o700)
            build(scratch)

            # Two processes may build the same folder: the first to finish wins, and the other takes
            # its work.
            if not is_whole():
                remove(folder)
            try:
                scratch.rename(folder)
            except OSError:  # another process finished first
                if not is_whole():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _locked_name(folder: Path) -> Iterator[Path]:
    """A name for a scratch folder, locked until the block ends."""
    while True:
        descriptor, name = tempfile.mkstemp(
            prefix=f".{folder.name}-", suffix=".lock", dir=folder.parent
        )
        with os.fdopen(descriptor, "w") as file:
            # no locks on this file system: nothing is ever taken for abandoned before its time
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            lock = Path(name)
            # between its making and its locking somebody took it for abandoned
            if not lock.exists():
                continue
            file.write(dumps({"host": socket.gethostname()}))
            file.flush()
            try:
                yield lock.with_suffix("")
            finally:
                lock.unlink(missing_ok=True)
            return


def remove_abandoned(folder: Path) -> None:
    """Remove the scratch folders beside `folder` whose makers are gone, those of other folders
    too.
    """
    for lock in sorted(folder.parent.glob(".*-????????.lock")):
        scratch = lock.with_suffix("")
        if not _SCRATCH.match(scratch.name):
            continue
        with suppress(OSError, ValueError), lock.open("r+") as file:
            # Fails where the maker lives, and where there are no locks. Another machine may not see
            # its lock.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            record = json.loads(file.read() or "{}")
            if record == {} or record == {"host": socket.gethostname()} or _idle(scratch, lock):
                shutil.rmtree(scratch, ignore_errors=True)
                lock.unlink()
    # of versions that knew no locks
    for scratch in sorted(folder.parent.glob(f".{folder.name}-????????")):
        if (
            not scratch.with_name(scratch.name + ".lock").exists()
            and scratch.is_dir()
            and _idle(scratch, scratch)
        ):
            shutil.rmtree(scratch, ignore_errors=True)


def _idle(scratch: Path, beside: Path) -> bool:
    """Whether nothing in the folder has changed for IDLE_SECONDS, by the file system's clock."""
    times: list[float] = [
        path.stat().st_mtime for path in (beside, *(scratch.iterdir() if scratch.is_dir() else ()))
    ]
    with tempfile.TemporaryFile(dir=scratch.parent) as now:
        return os.fstat(now.fileno()).st_mtime - max(times) > IDLE_SECONDS
