"""The order of forward and backward passes on one stage of a pipeline: one forward, one backward
(1F1B, PipeDream-Flush, arXiv 2006.09503). A function of numbers alone.

The stage at place s of n first goes forward n - s - 1 times, then alternates, and in the end goes
backward as often as it is ahead: it never holds more than n - s micro-batches. Of m micro-batches'
time, (n - 1) / (m + n - 1) is spent waiting where all stages take as long.

Where the exchange of experts is to travel while another micro-batch is computed, a forward and a
backward pass are made together, by turns. The micro-batch that comes back must then be there before
the other goes forward, for which a stage is ahead by 2 (n - s - 1) + 1 passes: two more for every
stage behind it, since neighbours exchange hidden states and gradients after a pair and not within
it. The share of waiting is the same, n forward passes before the last stage's first pair and n
backward passes after its last, around m - 1 pairs; the micro-batches held are up to twice as many.
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


class Pair(NamedTuple):
    """A forward pass of one micro-batch and a backward pass of an earlier one, by turns."""

    forward: int
    backward: int


Action = Pass | Pair | Exchange


def in_flight(place: int, num_stages: int, num_micro_batches: int, in_pairs: bool = False) -> int:
    """How many micro-batches a stage holds at most between forward and backward."""
    ahead = _ahead(place, num_stages) if in_pairs else num_stages - place - 1
    return min(ahead + 1, num_micro_batches)


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


def _ahead(place: int, num_stages: int) -> int:
    """How many forward passes a stage makes before its first pair."""
    return 2 * (num_stages - place - 1) + 1


def actions_in_pairs(place: int, num_stages: int, num_micro_batches: int) -> Iterator[Action]:
    """As `actions`, with as many pairs as there can be. Forward passes come in the order of the
    micro-batches, and so do backward passes, as they do there.
    """
    ahead = _ahead(place, num_stages)

    def there(number: int) -> int | None:
        return number if 0 <= number < num_micro_batches else None

    def exchanged(with_next: bool, send: int, receive: int) -> Iterator[Exchange]:
        exchange = Exchange(with_next, there(send), there(receive))
        has_neighbour = place < num_stages - 1 if with_next else place > 0
        if has_neighbour and (exchange.send is not None or exchange.receive is not None):
            yield exchange

    # One round for each micro-batch that comes back, and before them one for each that is ahead.
    # The first has no passes: it is where the first hidden states come in.
    for back in range(-ahead - 1, num_micro_batches):
        forward, backward = there(ahead + back), there(back)
        if forward is not None and backward is not None:
            yield Pair(forward, backward)
        elif forward is not None:
            yield Pass("forward", forward)
        elif backward is not None:
            yield Pass("backward", backward)
        yield from exchanged(False, send=back, receive=ahead + back + 1)
        yield from exchanged(True, send=ahead + back, receive=back + 1)
