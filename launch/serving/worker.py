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
    from launch.serving.ranks import EngineOverRanks

LONGEST_WAIT = 120
"""Seconds that a client is told to wait at most."""
RESTART_SECONDS = 10
"""That a client is told to wait where the engine has failed or the server is ending: about what
loading a small model takes.
"""


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
            returns False: it has nothing to do. Not with `pause`.
        failed: called once, when the engine has failed.
        pause: seconds after which the engine steps though it has nothing to do, as one over ranks
            must; None: it waits for a request.

    Attributes:
        failure: what the engine has raised, or why it cannot go on; None: it works.
    """

    def __init__(
        self,
        engine: Engine | EngineOverRanks,
        max_waiting: int,
        told: Callable[[Request, Completion], None] = lambda request, completion: None,
        failed: Callable[[], None] = lambda: None,
        taken: Callable[[Request], None] = lambda request: None,
        stepped: Callable[[float, int, float], None] = lambda seconds, rows, held: None,
        pause: float | None = None,
        idle: Callable[[], bool] = lambda: False,
    ):
        self.engine, self.max_waiting, self._pause = engine, max_waiting, pause
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
        return self.engine.num_running

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
            slots = self.engine.num_slots
            free = slots - self.num_running
            if self.num_waiting + len(given) > max(0, free) + self.max_waiting:
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

    @property
    def is_over(self) -> bool:
        """Whether the engine's thread has ended."""
        return not self._thread.is_alive()

    def fail(self, error: BaseException) -> None:
        """The engine has failed: every client is told, and nothing is taken any more. From any
        thread, since a lost rank may leave the engine's own waiting for it; the first error counts.
        """
        with self._wake:
            if self.failure is not None:
                return
            self.failure = error
            waiting, self._inbox = self._inbox, []
            self._wake.notify()
        for _, deliver in (*list(self._taken.values()), *waiting):
            deliver(None)
        self._failed()

    # --- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take():
                if self._pause is None and not self.engine.has_work:
                    self._rests = not self._idle()
                    continue
                before, began = self.engine.rows_decoded, time.monotonic()
                for event in self.engine.step():
                    self._tell(event)
                if rows := self.engine.rows_decoded - before:
                    running = self.engine.num_running
                    mean = self.engine.tokens_held / running if running else 1.0
                    self._stepped(time.monotonic() - began, rows, mean)
                self._num_waiting = self.engine.num_waiting
        except BaseException as error:
            self.fail(error)

    def _take(self) -> bool:
        """Wait for something to do and note what has come; False: it is over."""
        with self._wake:
            while not (self._inbox or self._cancelled or self.engine.has_work):
                if self._closing or self.failure is not None:
                    return False
                if self._pause is None and not self._rests:
                    return True
                if not self._wake.wait(self._pause):
                    break
            if self.failure is not None:
                return False
            inbox, cancelled = self._inbox, self._cancelled
            self._inbox, self._cancelled = [], []
            for request, deliver in inbox:
                self._taken[request.name] = (request, deliver)
                self._given(request)
                self.engine.add(request)
            self._num_waiting = self.engine.num_waiting
        for name in cancelled:
            if (taken := self._taken.get(name)) is None:
                continue
            # None: another rank has it, and its end comes as an event.
            if (completion := self.engine.cancel(name)) is not None:
                del self._taken[name]
                self._told(taken[0], completion)
        self._num_waiting = self.engine.num_waiting
        return True

    def _tell(self, event: Event) -> None:
        request, deliver = self._taken[event.name]
        if (done := event.completion) is not None:
            del self._taken[event.name]
            if done.started:  # or it was given up before it had a slot
                self._seconds += 0.1 * (time.monotonic() - done.started - self._seconds)
            self._told(request, done)
            self._rests = False
        deliver(event)
