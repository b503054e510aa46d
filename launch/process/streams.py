"""Standard output and error that no longer take part in how a command ends.

Who reads them may leave (`| head`, a closed terminal), their disk may fill, or the shell may have
closed them (`>&-`): what is written then goes nowhere, the work goes on, and the exit code is the
work's own.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import subprocess
import sys
import threading
from typing import Any

OUTPUTS = {"stdout": 1, "stderr": 2}
DRAIN_SECONDS = 2.0
GONE = (errno.EPIPE, errno.EBADF, errno.EIO)
"""What a write says when nobody reads: a closed pipe, a closed descriptor, a terminal that hung
up.
"""


class _Forgiving(io.RawIOBase):
    """A descriptor whose first failed write turns it into /dev/null."""

    def __init__(self, descriptor: int, name: str):
        self.descriptor, self.output = descriptor, name

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while len(rest):
            try:
                rest = rest[os.write(self.descriptor, rest) :]
            except BlockingIOError:
                # somebody else has made the shared pipe non-blocking
                select.select([], [self.descriptor], [])
            except OSError as error:
                self._give_up(error)
                break
        return size

    def _give_up(self, error: OSError) -> None:
        _to_nowhere(self.descriptor)
        if error.errno not in GONE and self.output == "stdout":
            print(
                f"stdout cannot be written ({error.strerror}): what "
                "it would say from here on is lost, the work goes on",
                file=sys.stderr,
                flush=True,
            )


def forgive() -> None:
    """Make this process's stdout and stderr forgiving. Streams that a caller has put in their
    place, as tests do, stay.
    """
    for descriptor in (0, *OUTPUTS.values()):
        try:
            os.fstat(descriptor)
        except OSError:
            # Else the next file that is opened gets the number, and whoever prints writes into it.
            _to_nowhere(descriptor)
    for name, descriptor in OUTPUTS.items():
        stream = getattr(sys, name)
        if stream is None:  # closed when the interpreter started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
            continue
        if stream is not getattr(sys, f"__{name}__") or isinstance(_raw(stream), _Forgiving):
            continue
        stream.flush()
        raw = _Forgiving(descriptor, name)
        # python -u: nothing between the text and the descriptor
        buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
        ours = io.TextIOWrapper(
            buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering or name == "stderr",
            write_through=stream.write_through,
        )
        setattr(sys, name, ours)
        setattr(sys, f"__{name}__", ours)
        _kept.append(stream)


_kept: list[Any] = []
"""The interpreter's own streams: collected, they would close the descriptors."""


def _raw(stream: Any) -> Any:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


class Relay:
    """Hands what a foreign program prints on to this process's stdout and stderr, where these are
    pipes: a program of the launchers that is not ours may end when its reader does.

    Attributes:
        streams: stdout and stderr for subprocess.Popen.
    """

    def __init__(self) -> None:
        self.streams: dict[str, int] = {}
        self._threads: list[threading.Thread] = []
        self._writes: list[int] = []
        pipes = {name: _pipe_of(descriptor) for name, descriptor in OUTPUTS.items()}
        for name, pipe in pipes.items():
            if pipe is None:
                continue
            if name == "stderr" and pipe == pipes["stdout"]:  # `2>&1 |`: in one order
                self.streams[name] = subprocess.STDOUT
                continue
            read, write = os.pipe()
            self.streams[name] = write
            self._writes.append(write)
            self._threads.append(
                threading.Thread(target=_pump, args=(read, name), daemon=True, name=f"relay-{name}")
            )

    def started(self) -> None:
        """The program holds its ends now."""
        for write in self._writes:
            os.close(write)
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Wait for the last lines, unless a process that has outlived the program keeps them
        open.
        """
        for thread in self._threads:
            thread.join(DRAIN_SECONDS)


def _pipe_of(descriptor: int) -> tuple[int, int] | None:
    """Device and inode of a pipe or socket; None for files, terminals and /dev/null."""
    facts = os.fstat(descriptor)
    if stat.S_ISFIFO(facts.st_mode) or stat.S_ISSOCK(facts.st_mode):
        return facts.st_dev, facts.st_ino
    return None


def _pump(read: int, name: str) -> None:
    with os.fdopen(read, "rb", buffering=0) as pipe:
        while data := pipe.read(65536):
            stream = getattr(sys, name)
            stream.buffer.write(data)
            stream.buffer.flush()
