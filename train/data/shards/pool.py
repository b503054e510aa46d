"""Processes that do the same work on many tasks.

Which process gets which task depends on who is free, and so nothing may depend on it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from train.data import worker
from train.data.worker import Child

T = TypeVar("T")
R = TypeVar("R")


class Pool(Generic[T, R]):
    """Up to `size` children, each started when there is a task and no free child.

    Args:
        work: called in the children, which are forks of this process; tasks and results can be
            pickled.
    """

    def __init__(self, work: Callable[[T], R], size: int):
        self.work = work
        self.size = size
        self._children: list[Child] = []
        self._free: list[Child] = []
        self._checked = time.monotonic()

    def __enter__(self) -> Pool[T, R]:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.end()

    def map(self, tasks: Iterable[T | None]) -> Iterator[R]:
        """Results as they come, in no order.

        Args:
            tasks: read ahead by one for each child. None among them is a moment to look whether a
                child has become free, where a task takes long to read.

        Raises:
            ValueError, OSError, LibraryError: as raised in a child, or the child is gone.
        """
        waiting: deque[T] = deque()
        for task in tasks:
            if task is not None:
                waiting.append(task)
            yield from self._hear(timeout=0)
            self._give(waiting)
            while len(waiting) >= self.size:
                yield from self._hear(worker.POLL_SECONDS)
                self._give(waiting)

        while waiting or len(self._free) < len(self._children):
            yield from self._hear(worker.POLL_SECONDS)
            self._give(waiting)

    def _give(self, waiting: deque[T]) -> None:
        while waiting:
            if not self._free and len(self._children) < self.size:
                self._start()
            if not self._free:
                return
            child = self._free.pop()
            try:
                child.pipe.send(waiting.popleft())
            except BrokenPipeError:
                while True:  # until it says what ended it
                    child.hear()

    def _start(self) -> None:
        here, there = multiprocessing.Pipe()

        def serve() -> None:
            _serve(self.work, there)

        child = Child(serve, here, there)
        self._children.append(child)
        self._free.append(child)

    def _hear(self, timeout: float) -> Iterator[R]:
        """Results that are there, or come within the time."""
        busy = {child.pipe: child for child in self._children if child not in self._free}
        pipes: list[Any] = list(busy)
        for pipe in multiprocessing.connection.wait(pipes, timeout):
            child = busy[pipe]  # type: ignore[index]
            kind, *rest = child.hear()
            if kind == "result":
                self._free.append(child)
                yield rest[0]

        if time.monotonic() - self._checked > worker.POLL_SECONDS:
            self._checked = time.monotonic()
            for child in busy.values():
                child.check()


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    while True:
        pipe.send(("result", work(pipe.recv())))
