"""The order of forward and backward passes on one stage of a pipeline: one forward, one backward
(1F1B, PipeDream-Flush, arXiv 2006.09503). A function of numbers alone.

The stage at place s of n first goes forward n - s - 1 times, then alternates, and in the end goes
backward as often as it is ahead: it never holds more than n - s micro-batches. Of m micro-batches'
time, (n - 1) / (m + n - 1) is spent waiting where all stages take as long.

With virtual stages (interleaved 1F1B, arXiv 2104.04473, section 2.2) a stage has several runs of
layers, and a micro-batch goes round all stages several times; once round is a lap. Micro-batches
take their laps in groups of at least n, so that a group's first one comes home from a lap no later
than its last one has left for it. With v laps a stage is ahead by 2 (n - s - 1) + (v - 1) g forward
passes of a lap, g the size of the largest group, and then makes one pass each way in every round,
as all others do. The last place makes its first backward pass after (n - 1) + (v - 1) g rounds,
whatever comes before is forward passes alone, and likewise at the end: the share of waiting is
(n - 1) / (m v + n - 1).

Where the exchange of experts is to travel while another micro-batch is computed, a forward and a
backward pass are made together, by turns. The micro-batch that comes back must then be there before
the other goes forward, for which a stage is ahead by one pass more, 2 (n - s - 1) + 1 where there
is one lap. The share of waiting is the same, n forward passes before the last stage's first pair
and n backward passes after its last, around m - 1 pairs; the micro-batches held are up to twice as
many as without pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple


class Pass(NamedTuple):
    """Work on one micro-batch."""

    kind: Literal["forward", "backward"]
    number: int
    """Of the micro-batch, from 0."""
    lap: int = 0
    """How often the micro-batch has been round all stages before it goes forward here: which of the
    stage's runs of layers the pass is of.
    """

    @property
    def unit(self) -> tuple[int, int]:
        """What the passes both ways have in common."""
        return self.number, self.lap


class Exchange(NamedTuple):
    """What this stage and its neighbours hand each other at once, so that some who all send cannot
    wait for each other. Hidden states go to the stage after this one, and from the last to the
    first where another lap begins; gradients go the other way. Neighbours list what they hand each
    other in the same order.
    """

    sends: tuple[Pass, ...]
    """Passes of this stage whose results are sent."""
    receives: tuple[Pass, ...]
    """Passes of this stage that what comes is for."""


class Pair(NamedTuple):
    """A forward pass of one micro-batch and a backward pass of an earlier one, by turns."""

    forward: Pass
    backward: Pass


Action = Pass | Pair | Exchange


def actions(
    place: int, num_stages: int, num_micro_batches: int, laps: int = 1, in_pairs: bool = False
) -> Iterator[Action]:
    """What the stage at `place` does in a step. Of every lap, forward passes come in the order of
    the micro-batches, and so do backward passes.

    Args:
        laps: runs of layers of every stage; more than one takes several stages.
        in_pairs: with as many pairs as there can be.
    """
    if laps > 1 or in_pairs:
        return _by_rounds(place, num_stages, num_micro_batches, laps, in_pairs, True)
    return _one_each_way(place, num_stages, num_micro_batches)


def forward_actions(
    place: int, num_stages: int, num_micro_batches: int, laps: int = 1
) -> Iterator[Action]:
    """As `actions`, of forward passes alone."""
    return _by_rounds(place, num_stages, num_micro_batches, laps, False, False)


def in_flight(
    place: int, num_stages: int, num_micro_batches: int, laps: int = 1, in_pairs: bool = False
) -> int:
    """How many micro-batches a stage holds at most between forward and backward; with virtual
    stages, how many of a lap, each of which is of one of the stage's runs of layers.
    """
    if laps == 1:
        ahead = _ahead(place, num_stages, 1) if in_pairs else num_stages - place - 1
        return min(ahead + 1, num_micro_batches)
    if num_micro_batches >= num_stages:
        more = (laps - 1) * _groups(num_stages, num_micro_batches)[0] + in_pairs
        return min(_ahead(place, num_stages, more) + 1, num_micro_batches * laps)
    # Of fewer, some of those that a stage is ahead by are missing.
    held = most = 0
    for action in actions(place, num_stages, num_micro_batches, laps, in_pairs):
        if isinstance(action, Pair):
            most = max(most, held + 1)
        elif isinstance(action, Pass):
            held += 1 if action.kind == "forward" else -1
            most = max(most, held)
    return most


def waiting(num_stages: int, num_micro_batches: int, laps: int = 1) -> int:
    """How many passes there and back of one lap a stage could make in the time that it waits for
    others, where all take as long: n - 1 where the micro-batches are at least as many as the
    stages. Of fewer, every lap but the last waits for those that are missing.
    """
    missing = max(0, num_stages - num_micro_batches)
    return num_stages - 1 + (laps - 1) * missing


def _one_each_way(place: int, num_stages: int, num_micro_batches: int) -> Iterator[Action]:
    """One stage alone takes its passes in turn."""
    warm_up = min(num_stages - place - 1, num_micro_batches)

    def exchanged(has_neighbour: bool, send: Pass | None, receive: Pass | None) -> Iterator[Action]:
        sends = () if send is None else (send,)
        receives = () if receive is None else (receive,)
        if has_neighbour and (sends or receives):
            yield Exchange(sends, receives)

    def before(send: int | None = None, receive: int | None = None) -> Iterator[Action]:
        """Gradients for hidden states, with the stage before."""
        yield from exchanged(
            place > 0,
            None if send is None else Pass("backward", send),
            None if receive is None else Pass("forward", receive),
        )

    def after(send: int | None = None, receive: int | None = None) -> Iterator[Action]:
        """Hidden states for gradients, with the stage after."""
        yield from exchanged(
            place < num_stages - 1,
            None if send is None else Pass("forward", send),
            None if receive is None else Pass("backward", receive),
        )

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


def _groups(num_stages: int, num_micro_batches: int) -> list[int]:
    """Sizes of the groups that micro-batches take their laps in, the largest first: as many groups
    as have a micro-batch for every stage. One of fewer micro-batches is as large as if none were
    missing.
    """
    number = max(1, num_micro_batches // num_stages)
    each, more = divmod(max(num_stages, num_micro_batches), number)
    return [each + 1] * more + [each] * (number - more)


def _ahead(place: int, num_stages: int, more: int) -> int:
    """How many forward passes a stage makes before its first round with a backward pass, where the
    last one makes so many.
    """
    return 2 * (num_stages - place - 1) + more


def _by_rounds(
    place: int,
    num_stages: int,
    num_micro_batches: int,
    laps: int,
    in_pairs: bool,
    comes_back: bool,
) -> Iterator[Action]:
    """Rounds that all stages are in together: each with at most a forward and a backward pass, and
    behind them one exchange of what they came to. comes_back: whether there are backward passes.
    """
    assert laps == 1 or num_stages > 1, "a stage alone has no others to go round"
    groups = _groups(num_stages, num_micro_batches)
    # None for one that is missing.
    forward: list[Pass | None] = []
    backward: list[Pass | None] = []
    first = 0
    for size in groups:
        numbers = range(first, first + size)
        for lap in range(laps):
            for number in numbers:
                is_there = number < num_micro_batches
                forward.append(Pass("forward", number, lap) if is_there else None)
                is_there = is_there and comes_back
                backward.append(Pass("backward", number, laps - 1 - lap) if is_there else None)
        first += size
    more = (laps - 1) * groups[0] + in_pairs

    def passes(other: int, turn: int) -> tuple[Pass | None, Pass | None]:
        """What the stage at a place does in a round."""

        def at(order: list[Pass | None], index: int) -> Pass | None:
            return order[index] if 0 <= index < len(order) else None

        later = turn - other
        return at(forward, later), at(backward, later - _ahead(other, num_stages, more))

    def goes_to(one: Pass | None, other: int) -> Pass | None:
        """The pass that the result of one at a place is for, on the neighbour that gets it; None at
        either end of the model.
        """
        if one is None:
            return None
        step, end = (1, num_stages - 1) if one.kind == "forward" else (-1, 0)
        lap = one.lap + step * (other == end)
        return one._replace(lap=lap) if 0 <= lap < laps else None

    last = place + _ahead(place, num_stages, more) + len(backward)
    for turn in range(last):
        there, back = passes(place, turn)
        if in_pairs and there is not None and back is not None:
            yield Pair(there, back)
        else:
            yield from (one for one in (there, back) if one is not None)

        before, after = (place - 1) % num_stages, (place + 1) % num_stages
        sends = [one for one in (there, back) if one is not None and goes_to(one, place)]
        come = (goes_to(passes(before, turn)[0], before), goes_to(passes(after, turn)[1], after))
        receives = [one for one in come if one is not None]
        if sends or receives:
            yield Exchange(tuple(sends), tuple(receives))
