"""One process at a time in a run directory, on one machine or on many that share a file system.

    RUN/lock          {"host", "boot_id", "pid_namespace", "pid", "process_start", "token"},
                      mode 600
    RUN/alive/<rank>  the same record of a rank's agent, refreshed like the lock while the rank
                      lives

The owner refreshes the file's time every few seconds. A lock whose owner is gone counts as
abandoned: at once where this machine can see that the process is gone, otherwise when it was not
refreshed for STALE_SECONDS by the clock of the file system (machines' own clocks may differ). An
abandoned lock is not enough to take over: ranks outlive a supervisor that was killed or stopped,
and write until they have noticed. While one of them shows a sign of life the directory is in use.
Imports no torch: the launcher and the agents use it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from train.files.durable import remove
from train.files.strict_json import dumps

REFRESH_SECONDS = 5.0
STALE_SECONDS = 30.0
SETTLE_SECONDS = 0.2
"""After a take-over: time for contenders that judged the same lock to move away, or put back, what
they took for it.
"""
NAME = "lock"
ALIVE = "alive"
_NO_FLOCK = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLocked(ValueError):
    """Another process works in the run directory; the message names it."""


@dataclass(frozen=True)
class _Found:
    """A lock file as it was when it was looked at."""

    file: tuple[int, int]
    """Device and inode."""
    refreshed: int
    """Time of the last refresh, ns, by the file system's clock."""
    owner: dict[str, Any] | None
    """None when its content is no record of ours."""

    def is_still(self, path: Path) -> bool:
        """Whether this very file, not refreshed since, is at the path."""
        facts = path.lstat()
        return (facts.st_dev, facts.st_ino, facts.st_mtime_ns) == (*self.file, self.refreshed)


class RunLock:
    """The right to write in a run directory; a context manager.

    Args:
        on_lost: called once, from another thread, with the reason when the lock was taken over or
            deleted. The owner must stop writing: another may have begun.

    Attributes:
        lost: why the lock is no longer ours; None while it is.
    """

    def __init__(
        self,
        run_dir: Path,
        on_lost: Callable[[str], None] | None = None,
        refresh_seconds: float = REFRESH_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ):
        self.path = Path(run_dir) / NAME
        self.on_lost = on_lost
        self.refresh_seconds, self.stale_seconds = refresh_seconds, stale_seconds
        self.token = secrets.token_hex(16)
        self.lost: str | None = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> RunLock:
        """Take the lock, from an owner that is gone if need be.

        Raises:
            RunLocked: another process holds it.
            ValueError: the directory cannot be written.
        """
        try:
            if not self.path.exists():
                self._refuse_living_ranks()
            if not self._create():
                with _alone_in(self.path.parent):
                    self._take_over()
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be written ({error.strerror}); "
                "choose a run directory that exists and can be written"
            ) from error
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Remove the lock if it is still ours; without effect the second time."""
        self._end.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        found = _look(self.path)
        if found is not None and self._is_ours(found):
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    # --- taking -----------------------------------------------------------------------------------

    def _create(self) -> bool:
        """Make the file; False when there is one."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(dumps(_record(self.token)))
            file.flush()
            os.fsync(file.fileno())
        return True

    def _take_over(self) -> None:
        """Replace an abandoned lock. Only the lock that was judged is moved away, and creating
        decides who gets it.
        """
        while True:
            found = _look(self.path)
            if found is not None:
                age = self._age(found)
                if not _is_gone(found.owner) and age < self.stale_seconds:
                    raise RunLocked(self._refusal(found.owner, age))
                self._refuse_living_ranks()
                if not self._move_away(found):
                    continue
            if self._create():
                time.sleep(SETTLE_SECONDS)
                found = _look(self.path)
                if found is not None and self._is_ours(found):
                    return

    def _refuse_living_ranks(self) -> None:
        """
        Raises:
            RunLocked: a rank of a job before still lives.
        """
        for path in sorted((self.path.parent / ALIVE).glob("*")):
            found = _look(path)
            if found is None or _is_gone(found.owner):
                continue
            age = self._age(found)
            if age < self.stale_seconds:
                who = (
                    f"process {found.owner['pid']} on {found.owner['host']}"
                    if found.owner
                    else "its agent"
                )
                raise RunLocked(
                    f"{self.path.parent} is in use: rank {path.name} of a job whose supervisor is "
                    f"gone still lives ({who}, heard {max(0.0, age):.0f} s ago). It saves and ends "
                    "by itself; wait for it, or end it. A rank that gives no sign for "
                    f"{self.stale_seconds:.0f} s counts as gone"
                )

    def still_ours(self) -> bool:
        """Whether the lock is ours at this moment; refreshes it if so."""
        try:
            return self._refresh() is None
        except OSError:
            return True  # the refreshing thread decides how long that may last

    def _move_away(self, judged: _Found) -> bool:
        """False when the lock that is there is another by now; it stays, or is put back."""
        aside = self.path.with_name(f"{NAME}.stale-{self.token}")
        try:
            if not judged.is_still(self.path):
                return False
            self.path.rename(aside)
            is_judged = judged.is_still(aside)
        except FileNotFoundError:
            return False
        if not is_judged:
            with suppress(FileExistsError):
                os.link(aside, self.path)  # fails rather than replace a third one
        remove(aside)
        return is_judged

    def _age(self, found: _Found) -> float:
        """Seconds since the last refresh. The time of a file made now is the file system's idea of
        now.
        """
        scratch = self.path.with_name(f".{NAME}-clock-{self.token}")
        descriptor = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            return (os.fstat(descriptor).st_mtime_ns - found.refreshed) / 1e9
        finally:
            os.close(descriptor)
            scratch.unlink()

    def _refusal(self, owner: dict[str, Any] | None, age: float) -> str:
        who = (
            f"process {owner['pid']} on {owner['host']}"
            if owner
            else "a process that cannot be named (damaged lock file)"
        )
        return (
            f"{self.path.parent} is in use by {who}: {self.path} was refreshed "
            f"{max(0.0, age):.0f} s ago. Wait for it or stop it; a lock that "
            f"nobody refreshes is taken over after {self.stale_seconds:.0f} s"
        )

    # --- keeping ----------------------------------------------------------------------------------

    def _keep(self) -> None:
        refreshed = time.monotonic()
        while not self._end.wait(self.refresh_seconds):
            try:
                reason = self._refresh()
                refreshed = time.monotonic()
            except OSError as error:
                # the file system may come back before others may take over
                silent = time.monotonic() - refreshed
                reason = (
                    f"{self.path} could not be refreshed for {silent:.0f} s ({error.strerror})"
                    if silent > self.stale_seconds
                    else None
                )
            if reason is not None:
                self.lost = reason
                if self.on_lost is not None:
                    self.on_lost(reason)
                return

    def _refresh(self) -> str | None:
        """Why the lock is lost; None: it is ours and refreshed."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
        except (FileNotFoundError, IsADirectoryError):
            return f"{self.path} was deleted"
        try:
            owner = _parse(os.read(descriptor, 2**16))
            if owner is None or owner["token"] != self.token:
                by = f" by process {owner['pid']} on {owner['host']}" if owner else ""
                return f"{self.path} was taken over{by}"
            os.utime(descriptor)
        finally:
            os.close(descriptor)
        return None

    def _is_ours(self, found: _Found) -> bool:
        return found.owner is not None and found.owner["token"] == self.token


class SignOfLife:
    """A file RUN/alive/<rank> that says that a rank can still write; kept by the rank's agent."""

    def __init__(self, run_dir: Path, rank: int):
        self.path = run_dir / ALIVE / str(rank)
        self._shown = -math.inf

    def show(self) -> None:
        """Make or refresh the file, at most every REFRESH_SECONDS. A file system that refuses costs
        nothing.
        """
        now = time.monotonic()
        if now - self._shown < REFRESH_SECONDS:
            return
        with suppress(OSError):
            if self._shown == -math.inf:
                self.path.parent.mkdir(exist_ok=True)
                scratch = self.path.with_name(f".{self.path.name}-{os.getpid()}")
                scratch.write_text(dumps(_record("")))
                scratch.replace(self.path)
            os.utime(self.path)
        self._shown = now

    def end(self) -> None:
        with suppress(OSError):
            self.path.unlink()
        with suppress(OSError):
            self.path.parent.rmdir()  # by the last one


def _record(token: str) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot_id": _boot_id(),
        "pid_namespace": _pid_namespace(),
        "pid": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "token": token,
    }


# --- looking --------------------------------------------------------------------------------------


def _look(path: Path) -> _Found | None:
    """The lock file, or None when there is none. One that is still empty gets a second to be
    written by its owner.
    """
    for _ in range(20):
        try:
            facts = path.lstat()
            content = _content(path) if stat.S_ISREG(facts.st_mode) else None
        except FileNotFoundError:
            return None
        if content != b"":
            break
        time.sleep(0.05)
    return _Found((facts.st_dev, facts.st_ino), facts.st_mtime_ns, _parse(content or b""))


def _content(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(2**16)
    except FileNotFoundError:
        raise
    except OSError:
        return None


def _parse(content: bytes) -> dict[str, Any] | None:
    """The record in a lock file; None when it is damaged."""
    kinds = {
        "host": str,
        "boot_id": str,
        "pid_namespace": str,
        "pid": int,
        "process_start": int,
        "token": str,
    }
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not all(
        type(record.get(key)) is kind for key, kind in kinds.items()
    ):
        return None
    return record if record["host"].isprintable() else None


def _is_gone(owner: dict[str, Any] | None) -> bool:
    """Whether this machine can tell that the owner's process has ended."""
    if owner is None or not _boot_id() or not _pid_namespace():
        return False
    here = (socket.gethostname(), _boot_id(), _pid_namespace())
    if (owner["host"], owner["boot_id"], owner["pid_namespace"]) != here:
        return False
    return bool(_process_start(owner["pid"]) != owner["process_start"])


def _process_start(pid: int) -> int:
    """When a living process began, in clock ticks since the machine started; -1: there is none of
    this id.

    Not psutil's create_time, which moves with the wall clock: setting that would make every owner
    look like a reused id.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps others on this machine from judging a lock at the same time, where the file system can.

    Elsewhere one of them could move away, for some microseconds, what the winner has made; hence
    SETTLE_SECONDS.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(100):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                break
        else:
            raise RunLocked(f"{folder} is in use: another process is just starting in it")
        yield
    finally:
        os.close(descriptor)
