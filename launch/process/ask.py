"""Asking another program, without waiting for ever."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
MAX_THREADS = 64


@dataclass(frozen=True)
class Answer:
    """What a program said."""

    code: int | None
    """Its exit code; None: it is not installed or did not end in time, which `errors` says."""
    output: str
    """What it wrote to stdout."""
    errors: str
    """What it wrote to stderr."""
    ended: float
    """Wall clock, seconds since the epoch."""

    @property
    def reason(self) -> str:
        """Why it failed: its last words, or its code."""
        lines = [line for line in self.errors.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"it ended with code {self.code}"


def ask(command: list[str], seconds: float, environ: Mapping[str, str] | None = None) -> Answer:
    """Run a program; it and its children are killed after `seconds`."""
    try:
        process = subprocess.Popen(
            command,
            env=None if environ is None else dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Answer(None, "", f"{command[0]}: {error.strerror}", time.time())

    def kill() -> None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)

    # an interrupt ends the threads that wait for programs, not the programs
    atexit.register(kill)
    try:
        output, errors = process.communicate(timeout=seconds)
        return Answer(process.returncode, output, errors, time.time())
    except subprocess.TimeoutExpired:
        kill()
        return Answer(None, "", f"no answer within {seconds:g} s", time.time())
    finally:
        atexit.unregister(kill)


def in_parallel(function: Callable[[T], R], items: Iterable[T], seconds: float) -> dict[T, R]:
    """Item -> result, of those that are there after `seconds`. Threads that hang in the system are
    left behind.
    """
    todo, results = list(items), {}
    until = time.monotonic() + seconds
    places = threading.Semaphore(MAX_THREADS)

    def work(item: T) -> None:
        try:
            results[item] = function(item)
        finally:
            places.release()

    threads = []
    for item in todo:
        if not places.acquire(timeout=max(0.0, until - time.monotonic())):
            break
        threads.append(threading.Thread(target=work, args=(item,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(results)
