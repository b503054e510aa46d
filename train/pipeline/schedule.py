"""The order of forward and backward passes on one stage of a pipeline: one forward, one backward
(1F1B, PipeDream-Flush, arXiv 2006.09503). A function of numbers alone.

The stage at place s of n first goes forward n - s - 1 times, then alternates, and in the end goes
backward as often as it is ahead: it never holds more than n - s micro-batches. Of m micro-batches'
time, (n - 1) / (m + n - 1) is spent waiting where all stages take as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple


class Pass(NamedTuple):
    """Work on one micro-batch."""

    kind: Literal["forward", "backward"]
    number: int
    """Of the micro-batch, from 0."""


class Exchange(NamedTuple):
    """What this stage and a neighbour hand each other at once, so that two who both send cannot
    wait for each other: hidden states go on to the later one, their gradients come back.
    """

    with_next: bool
    """With the stage after this one, or with the one before."""
    send: int | None
    """Micro-batch whose hidden states (to the next) or gradients (to the one before) are sent."""
    receive: int | None
    """Micro-batch whose gradients (from the next) or hidden states (from the one before) come."""


Action = Pass | Exchange


def in_flight(place: int, num_stages: int, num_micro_batches: int) -> int:
    """How many micro-batches a stage holds at most between forward and backward."""
    return min(num_stages - place, num_micro_batches)


def actions(place: int, num_stages: int, num_micro_batches: int) -> Iterator[Action]:
    """What the stage at `place` does in a step. Forward passes come in the order of the
    micro-batches, and so do backward passes; one stage alone takes them in turn.
    """
    warm_up = min(num_stages - place - 1, num_micro_batches)

    def before(send: int | None = None, receive: int | None = None) -> Iterator[Action]:
        if place > 0 and (send is not None or receive is not None):
            yield Exchange(False, send, receive)

    def after(send: int | None = None, receive: int | None = None) -> Iterator[Action]:
        if place < num_stages - 1:
            yield Exchange(True, send, receive)

    for number in range(warm_up):
        yield from before(receive=number)
        yield Pass("forward", number)
        yield from after(send=number)

    if warm_up < num_micro_batches:
        yield from before(receive=warm_up)
    for number in range(num_micro_batches - warm_up):
        ahead = warm_up + number
        yield Pass("forward", ahead)
        yield from after(send=ahead, receive=number)
        yield Pass("backward", number)
        more = ahead + 1 < num_micro_batches
        yield from before(send=number, receive=ahead + 1 if more else None)

    for number in range(num_micro_batches - warm_up, num_micro_batches):
        yield from after(receive=number)
        yield Pass("backward", number)
        yield from before(send=number)
