"""Work on files of strangers, in a process of its own.

Parsers and tokenizers are native code. What a damaged or hostile file does to them can end a
process without a word (SIGSEGV, abort, no memory) or keep it busy for ever, and while they work no
signal handler of Python's runs. In a child that costs the child: the parent says what it was doing,
and whatever ends the parent ends the child at once. The files it reads come out as they would
without it.

The child is a fork: it needs nothing but files, so neither devices nor process groups are touched.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from train.rank.errors import is_ours

T = TypeVar("T")
PR_SET_PDEATHSIG = 1
POLL_SECONDS = 1.0
MAX_DEPTH = 1000
"""Of recursion in the child, whatever libraries have asked for: Python's own default. What JSON
nests deeper is an error, not the end of the stack.
"""
_parent: Connection | None = None
"""In the child: where it tells what it does."""
_tasks: list[tuple[str, float | None]] = []


class LibraryError(RuntimeError):
    """An error that no check of ours has raised; its notes hold the child's traceback."""


# --- in the child ---------------------------------------------------------------------------------


def tell(line: str) -> None:
    """A line for the parent's `report`."""
    _send("report", line)


def show(progress: Any) -> None:
    """How far the work is, for the parent's `progress`."""
    _send("progress", progress)


@contextmanager
def doing(task: str, cpu_seconds: float | None = None) -> Iterator[None]:
    """Inside, the process works on this: what the error says if it does not survive it.

    Args:
        task: as in "reading FILE"; cpu_seconds: of all its threads. Beyond that the parent gives it
            up. Not wall time, for processes are stopped and machines are shared.
    """
    entry = (task, cpu_seconds)
    _tasks.append(entry)
    _send("doing", *entry)
    try:
        yield
    finally:
        _tasks.remove(entry)  # a reader that was left half-way ends after others
        _send("doing", *(_tasks[-1] if _tasks else ("", None)))


def _send(*message: Any) -> None:
    if _parent is not None:
        _parent.send(message)


def is_panic(error: BaseException) -> bool:
    """Whether it is how Rust code fails: no Exception, and of a class that cannot be imported."""
    return type(error).__name__ == "PanicException"


def _child(work: Callable[[], Any], pipe: Connection, parent: int) -> None:
    global _parent
    _parent = pipe
    _tasks.clear()
    # Cycles that the parent dropped hold native objects whose threads are not here (process groups,
    # say); collecting one of them here has ended children by SIGSEGV.
    gc.freeze()
    # the parent's to answer
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _bound_memory()
    sys.setrecursionlimit(MAX_DEPTH)
    _silence_native_code()
    try:
        _send("done", work())
    except BaseException as error:
        _send("failed", _portable(error))


def _bound_memory() -> None:
    """Let a file that grows without end fail here, before the machine runs out of memory."""
    with suppress(OSError, ValueError):
        # the one to be ended where memory does run out
        Path("/proc/self/oom_score_adj").write_text("1000")
        held = _kibibytes("/proc/self/status", "VmData:")
        available = _kibibytes("/proc/meminfo", "MemAvailable:")
        resource.setrlimit(
            resource.RLIMIT_DATA, (2**10 * (held + available), resource.RLIM_INFINITY)
        )


def _kibibytes(file: str, name: str) -> int:
    return next(
        int(line.split()[1])
        for line in Path(file).read_text().splitlines()
        if line.startswith(name)
    )


def _silence_native_code() -> None:
    """What Python prints is seen; what native code writes when it dies is not: the parent says it
    in a line.
    """
    sys.stderr.flush()
    seen, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    sys.stderr = open(seen, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115


def _portable(error: BaseException) -> BaseException:
    """The error as one the parent can raise, and tell a user's mistake from a fault by."""
    said = " ".join(str(error).split())
    task = _tasks[-1][0] if _tasks else "preparing the data"
    if isinstance(error, MemoryError):
        return ValueError(f"{task} takes more memory than there is")
    if is_panic(error):
        return ValueError(f"{task} failed: {said}")
    ours = is_ours(error)
    with suppress(Exception):
        if ours or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
            copied = copy.copy(error)  # fails where the pipe would
            if not ours:
                copied.add_note("".join(traceback.format_tb(error.__traceback__)))
            return copied
    unknown = LibraryError(f"{type(error).__name__}: {said}")
    unknown.add_note("".join(traceback.format_tb(error.__traceback__)))
    return unknown


# --- in the parent --------------------------------------------------------------------------------


def no_progress(_: Any) -> None:
    """For `apart`: nobody looks."""


def apart(
    work: Callable[[], T],
    report: Callable[[str], None] = print,
    progress: Callable[[Any], None] = no_progress,
) -> T:
    """Call `work` in a child process and return what it returns, which can be pickled.

    Args:
        report: gets the lines that `work` tells; progress: what it shows.

    Raises:
        ValueError: from a check of ours in `work`; or the child did not survive what it was doing,
            or took more processor time for it than it was given.
        OSError: as raised in `work`.
        LibraryError: any other error of `work`.
    """
    here, there = multiprocessing.Pipe(duplex=False)
    child = Child(work, here, there)
    try:
        while True:
            if not here.poll(POLL_SECONDS):
                child.check()
                continue
            kind, *rest = child.hear()
            if kind == "report":
                report(*rest)
            elif kind == "progress":
                progress(*rest)
            elif kind == "done":
                result: T = rest[0]
                return result
    finally:  # also when a signal has raised an exception in here
        child.end()


class Child:
    """A child process at its work, and what it says that it does.

    Args:
        work: called in the child; here, there: ends of a pipe, the child's own to be closed on this
            side.
    """

    def __init__(self, work: Callable[[], Any], here: Connection, there: Connection):
        self.pipe = here
        self._task = ""
        self._limit: float | None = None
        self._begun = 0.0
        self._process: Any = multiprocessing.get_context("fork").Process(
            target=_child, args=(work, there, os.getpid())
        )

        # This end of the pipe must see the child's end close when the child dies.
        self._process.start()
        there.close()

    def hear(self) -> tuple[Any, ...]:
        """The next message: its kind and what it holds.

        Raises:
            ValueError: the child is gone; or as raised in it.
            OSError, LibraryError: as raised in the child.
        """
        try:
            kind, *rest = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            _tell_end(self._task, self._process.exitcode)
        if kind == "failed":
            raise rest[0]
        if kind == "doing":
            self._task, self._limit = rest
            self._begun = 0.0 if self._limit is None else _cpu_seconds(self._process.pid)
        return kind, *rest

    def check(self) -> None:
        """Raise ValueError if it has used more processor time than it may.

        Processor time and not the clock is limited: a busy machine is no fault of the file.
        """
        if self._limit is not None and _cpu_seconds(self._process.pid) - self._begun > self._limit:
            raise ValueError(
                f"{self._task} took more than {self._limit:.3g} s of processor time, and was given "
                "up"
            )

    def end(self) -> None:
        """The process is gone when this returns."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _tell_end(task: str, code: int) -> NoReturn:
    how = f"with exit code {code}"
    if code < 0:
        how = f"by {signal.Signals(-code).name}" + (
            ", maybe for lack of memory" if code == -signal.SIGKILL else ""
        )
    raise ValueError(
        f"{task or 'preparing the data'} ended the process that did it {how}: what it read is "
        "damaged, or made to do so; leave it out"
    )


def _cpu_seconds(pid: int) -> float:
    """Processor time of a process, all threads."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
