"""Shards on disk: what a killed preparation has done stays done.

    .NAME.parts/             beside the store NAME, until that is whole
        lock                 flocked by the process that makes the store
        tokenizer.json       the one that was trained
        SOURCE/THOUSAND/NUMBER.npz
                             a shard: the arrays of encode.Shard, and the digest of its texts;
                             of tokens those of tokens/read.ReadRange, and of file and place

A shard is on disk before it has its name. Its digest says what texts it was made of, so a shard
whose texts have changed is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from train.data.shards.encode import Shard
from train.data.tokens.read import ReadRange
from train.data.worker import tell
from train.files.manifest import require_owned
from train.files.scratch import IDLE_SECONDS

WAIT_SECONDS = 10.0
"""What killed processes held is free after so long at most."""
LOCK = "lock"
SUFFIX = ".parts"


class DamagedShard(ValueError):
    """A shard is not what was written; all others stay."""


def digest(texts: Sequence[str], tokenizer: bytes) -> bytes:
    """Of documents and of what tokenises them."""
    found = hashlib.sha256(tokenizer)
    for text in texts:
        encoded = text.encode()
        found.update(len(encoded).to_bytes(8, "big"))
        found.update(encoded)
    return found.digest()


class Parts:
    """The folder of the shards of one store."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, source: int, number: int) -> Path:
        return self.folder / str(source) / str(number // 1000) / f"{number}.npz"

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"

    def holds(self, source: int, number: int, of: bytes) -> bool:
        """Whether the shard is there, and was made of texts with this digest."""
        try:
            with np.load(self.path(source, number), allow_pickle=False) as arrays:
                return bool(arrays["digest"].tobytes() == of)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False

    def write(self, source: int, number: int, of: bytes, shard: Shard | ReadRange) -> None:
        path = self.path(source, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp")
        with scratch.open("wb") as file:
            arrays: dict[str, Any] = shard._asdict()
            np.savez(file, digest=np.frombuffer(of, dtype=np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)

    def read(self, source: int, number: int) -> Shard:
        """
        Raises:
            DamagedShard: the file is damaged, and removed.
        """
        with self._arrays(source, number) as arrays:
            return Shard(*(arrays[name] for name in Shard._fields))

    def read_range(self, source: int, number: int) -> ReadRange:
        """The same, of a source that is tokens already."""
        with self._arrays(source, number) as arrays:
            return ReadRange(*(arrays[name] for name in ReadRange._fields))

    def keys(self, source: int, number: int) -> np.ndarray:
        """[documents] uint64: those of the shard's documents, without reading its tokens."""
        with self._arrays(source, number) as arrays:
            keys: np.ndarray = arrays["keys"]
            return keys

    def discard(self) -> None:
        """Remove all shards."""
        for path in self.folder.glob("[0-9]*"):
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _arrays(self, source: int, number: int) -> Iterator[Any]:
        path = self.path(source, number)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                yield arrays
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            path.unlink(missing_ok=True)
            raise DamagedShard(
                f"{path} is damaged ({error}), and removed: prepare again, which makes it anew and "
                "keeps the others"
            ) from error


@contextmanager
def parts_beside(store: Path, scratch: Path) -> Iterator[Parts]:
    """The shards that earlier processes have left for the store, and those that this one makes.

    Where another process makes the same store, or there are no locks, shards are made in `scratch`
    for this process alone, and removed when the block ends.
    """
    _remove_abandoned(store.parent)
    folder = _folder_of(store)
    folder.mkdir(mode=0o700, exist_ok=True)
    require_owned(folder)
    lock = _locked(folder, WAIT_SECONDS)
    if lock is None:
        tell("another process prepares the same store: this one makes its own shards")
        scratch.mkdir()
        yield Parts(scratch)
        shutil.rmtree(scratch)
        return
    try:
        yield Parts(folder)
    finally:
        # nothing was made: there is nothing to keep
        if not any(folder.glob("*/*/*.npz")):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_parts(store: Path) -> None:
    """Remove the shards that a whole store was made of, unless some process uses them."""
    folder = _folder_of(store)
    with suppress(OSError):
        lock = _locked(folder, 0)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _folder_of(store: Path) -> Path:
    return store.with_name(f".{store.name}{SUFFIX}")


def _locked(folder: Path, seconds: float) -> int | None:
    """A descriptor that holds the folder's lock for as long as it is open."""
    until = time.monotonic() + seconds
    while True:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError) or time.monotonic() >= until:
                return None
            time.sleep(0.1)
        else:
            # its holder may have removed it between its opening and its locking, and a third
            # process have made another
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(folder / LOCK)):
                    return descriptor
            os.close(descriptor)
            folder.mkdir(mode=0o700, exist_ok=True)


def _remove_abandoned(place: Path) -> None:
    """Shards that nobody has touched for as long as scratch folders are kept."""
    for folder in place.glob(f".*{SUFFIX}"):
        with suppress(OSError):
            newest = max((path.stat().st_mtime for path in folder.rglob("*")), default=0.0)
            if time.time() - newest > IDLE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
