"""The engine in a thread of its own: requests come in from the server's loop, events go back."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infer.engine import Engine
    from infer.request import Completion, Event, Request

LONGEST_WAIT = 120
"""Seconds that a client is told to wait at most."""


class QueueFull(Exception):
    """Requests wait already. retry_after: seconds, at least 1."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Ended(Exception):
    """The engine takes no more requests."""


Deliver = Callable[["Event | None"], None]
"""Called in the engine's thread with what comes of a request; None: the engine has failed."""


class Worker:
    """Runs an engine until it is told to end.

    Args:
        max_waiting: requests that may wait for a slot.
        told: sees every completion, in the engine's thread.
        taken: sees every request before the engine does, in the engine's thread, and may fill in
            what it leaves open.
        stepped: called there after a step in which requests got a token, with its seconds, their
            number and the mean of the tokens that running requests hold.
        idle: called there while nobody asks for anything, after requests have ended, until it
            returns False: it has nothing to do.
        failed: called once, in the engine's thread, when the engine has raised.

    Attributes:
        failure: what the engine has raised; None: it works.
    """

    def __init__(
        self,
        engine: Engine,
        max_waiting: int,
        told: Callable[[Request, Completion], None] = lambda request, completion: None,
        failed: Callable[[], None] = lambda: None,
        taken: Callable[[Request], None] = lambda request: None,
        stepped: Callable[[float, int, float], None] = lambda seconds, rows, held: None,
        idle: Callable[[], bool] = lambda: False,
    ):
        self.engine, self.max_waiting = engine, max_waiting
        self.failure: BaseException | None = None
        self._told, self._failed, self._given, self._stepped = told, failed, taken, stepped
        self._wake = threading.Condition()
        self._inbox: list[tuple[Request, Deliver]] = []
        self._cancelled: list[str] = []
        self._closing = False
        self._idle, self._rests = idle, True
        """What there is to do when nothing is asked, and whether that is nothing."""
        self._num_waiting = 0
        self._seconds = 1.0
        """Of a request in its slot, a running mean."""
        self._taken: dict[str, tuple[Request, Deliver]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._inbox) + self._num_waiting

    @property
    def num_running(self) -> int:
        return len(self.engine.running)

    def submit(self, requests: Iterable[tuple[Request, Deliver]]) -> None:
        """Take all of them, or none.

        Raises:
            ValueError: a request can never be served.
            QueueFull: more would wait than may. Ended: nothing is taken any more.
        """
        given = list(requests)
        for request, _ in given:
            if (problem := self.engine.problem(request)) is not None:
                raise ValueError(problem)
        with self._wake:
            if self._closing or self.failure is not None:
                raise Ended
            free = self.engine.settings.max_slots - self.num_running
            if self.num_waiting + len(given) > max(0, free) + self.max_waiting:
                slots = self.engine.settings.max_slots
                wait = math.ceil(self._seconds * (self.num_waiting + 1) / slots)
                raise QueueFull(min(LONGEST_WAIT, max(1, wait)))
            self._inbox += given
            self._wake.notify()

    def cancel(self, names: Iterable[str]) -> None:
        """Give up requests; those that have ended, or are not known, are left alone."""
        with self._wake:
            self._cancelled += names
            self._wake.notify()

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, and end when those that are there have ended."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    # --- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take():
                if not self.engine.has_work:
                    self._rests = not self._idle()
                    continue
                before, began = self.engine.rows_decoded, time.monotonic()
                for event in self.engine.step():
                    self._tell(event)
                if rows := self.engine.rows_decoded - before:
                    held = [sequence.held for sequence in self.engine.running]
                    mean = sum(held) / len(held) if held else 1.0
                    self._stepped(time.monotonic() - began, rows, mean)
                self._num_waiting = len(self.engine.waiting)
        except BaseException as error:
            with self._wake:
                self.failure = error
                waiting, self._inbox = self._inbox, []
            for _, deliver in (*self._taken.values(), *waiting):
                deliver(None)
            self._failed()

    def _take(self) -> bool:
        """Wait for something to do and note what has come; False: it is over."""
        with self._wake:
            while not (self._inbox or self._cancelled or self.engine.has_work):
                if self._closing:
                    return False
                if not self._rests:
                    return True
                self._wake.wait()
            inbox, cancelled = self._inbox, self._cancelled
            self._inbox, self._cancelled = [], []
            for request, deliver in inbox:
                self._taken[request.name] = (request, deliver)
                self._given(request)
                self.engine.add(request)
            self._num_waiting = len(self.engine.waiting)
        for name in cancelled:
            if (taken := self._taken.pop(name, None)) is None:
                continue
            if (completion := self.engine.cancel(name)) is not None:
                self._told(taken[0], completion)
        self._num_waiting = len(self.engine.waiting)
        return True

    def _tell(self, event: Event) -> None:
        request, deliver = self._taken[event.name]
        if (done := event.completion) is not None:
            del self._taken[event.name]
            self._seconds += 0.1 * (time.monotonic() - done.started - self._seconds)
            self._told(request, done)
            self._rests = False
        deliver(event)
