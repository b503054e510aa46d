"""Two passes of one rank by turns: whichever has sent its rows lets the other compute until they
have come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

First = TypeVar("First")
Second = TypeVar("Second")


class _Turns:
    """Whose turn it is, of two. Only that one runs: the other waits in `give_way`, or has not
    begun.

    Nothing here asks which thread calls, since autograd runs a backward pass on a CUDA device in a
    thread of its own: whoever runs is the one whose turn it is.
    """

    def __init__(self) -> None:
        self._turn = 0
        self._may_go_on = (threading.Semaphore(0), threading.Semaphore(0))
        self._has_sent = [False, False]
        self._has_ended = [False, False]

    def sent(self) -> None:
        self._has_sent[self._turn] = True

    def give_way(self) -> None:
        """Before waiting for rows. Once for all that was sent since the last time: rows and their
        gates travel together, and are waited for one after the other.
        """
        own, other = self._turn, 1 - self._turn
        if self._has_ended[other] or not self._has_sent[own]:
            return
        self._has_sent[own] = False
        self._pass_on()
        self._may_go_on[own].acquire()

    def end(self, number: int) -> None:
        """The other goes on alone. It may be its turn: an interrupt ends one that waits, too."""
        self._has_ended[number] = True
        if self._turn == number and not self._has_ended[1 - number]:
            self._pass_on()

    def wait_to_begin(self, number: int) -> None:
        self._may_go_on[number].acquire()

    def _pass_on(self) -> None:
        self._turn = 1 - self._turn
        self._may_go_on[self._turn].release()


_turns: _Turns | None = None
_worker: ThreadPoolExecutor | None = None


def rows_have_left() -> None:
    """An exchange has begun."""
    if _turns is not None:
        _turns.sent()


def give_way() -> None:
    """An exchange is about to be waited for: the other pass computes meanwhile."""
    if _turns is not None:
        _turns.give_way()


def by_turns(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
    """What both return. The first begins, in this thread; they change places wherever rows of an
    exchange are waited for, and where one ends.

    Each computes what it would alone, in the same order. Where they change places follows from
    their own exchanges, not from time, so that ranks which make the same exchanges make them in the
    same order: that is what collectives need.

    Raises:
        whatever one of them raises, after the other has come to its end; of the first where both
        do.
    """
    global _turns, _worker
    assert _turns is None, "two passes at a time"
    _worker = _worker or ThreadPoolExecutor(1, thread_name_prefix="second pass")
    turns = _Turns()
    _turns = turns

    # A thread begins with the first device and with gradients.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    with_gradients = torch.is_grad_enabled()

    def in_worker() -> Second:
        turns.wait_to_begin(1)
        try:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.set_grad_enabled(with_gradients):
                return second()
        finally:
            turns.end(1)

    later: Any = _worker.submit(in_worker)
    try:
        try:
            found = first()
        finally:
            turns.end(0)
            # It has ended, whatever came of it, before anything else of this rank goes on.
            later.exception()
    finally:
        _turns = None
    return found, later.result()
