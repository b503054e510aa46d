"""The order of passes in a pipeline, for every number of stages, micro-batches and laps: no
process.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest

from train.pipeline.schedule import (
    Action,
    Exchange,
    Pair,
    Pass,
    actions,
    forward_actions,
    in_flight,
    waiting,
)

SIZES = list(itertools.product(range(1, 9), (*range(1, 10), 16, 31, 32)))
LAPS = [
    *itertools.product((2, 3, 4), (1, 2, 3, 4, 5, 7, 8, 13), (2, 3)),
    *((2, 16, 4), (2, 31, 2), (4, 16, 4), (8, 9, 2), (8, 16, 2), (8, 5, 3)),
]
FORWARD, BACKWARD = 1, 2
"""How long a pass of a lap takes."""


class Played(NamedTuple):
    passes: list[list[Pass]]
    """Of every place, in their order."""
    ends: list[int]
    """When every place is done."""


def result_for(place: int, one: Pass, num_stages: int) -> tuple[int, Pass]:
    """Who gets the result of a pass, and what pass it is for, as a lap goes round the places."""
    step = 1 if one.kind == "forward" else -1
    other = (place + step) % num_stages
    wraps = other != place + step
    return other, one._replace(lap=one.lap + step * wraps)


def passes_of(action: Pass | Pair) -> list[Pass]:
    return [action] if isinstance(action, Pass) else [action.forward, action.backward]


def play(
    num_stages: int,
    num_micro: int,
    laps: int = 1,
    in_pairs: bool = False,
    forward_alone: bool = False,
) -> Played:
    """The passes of all places where each does what comes next once it can: an exchange is over
    when all whom it names have come to theirs, and theirs name the same passes.

    Raises AssertionError where they wait for each other, pass what has not come, or hand over what
    was not made.
    """
    plans = [
        list(
            forward_actions(place, num_stages, num_micro, laps)
            if forward_alone
            else actions(place, num_stages, num_micro, laps, in_pairs)
        )
        for place in range(num_stages)
    ]
    at, clocks = [0] * num_stages, [0] * num_stages
    done = [list[Pass]() for _ in plans]
    there: list[set[Pass]] = [set() for _ in plans]
    # When a place came to its exchange; what of it has found its other side, and when that came.
    came: list[dict[tuple[str, Pass], int | None]] = [{} for _ in plans]

    def is_end(place: int, one: Pass) -> bool:
        first = (0, 0) if one.kind == "forward" else (num_stages - 1, laps - 1)
        return (place, one.lap) == first

    def enter(place: int, exchange: Exchange) -> None:
        for one in exchange.sends:
            assert one in done[place], f"{place} sends what it has not: {one}"
        came[place] = dict.fromkeys(
            [("send", one) for one in exchange.sends] + [("get", one) for one in exchange.receives]
        )

    def meet(place: int) -> None:
        """Every message that this place sends and whose receiver is at the exchange, too."""
        for (kind, one), other_came in came[place].items():
            if kind == "send" and other_came is None:
                other, what = result_for(place, one, num_stages)
                if ("get", what) in came[other]:
                    came[place][kind, one] = clocks[other]
                    came[other]["get", what] = clocks[place]

    while any(at[place] < len(plan) for place, plan in enumerate(plans)):
        moved = False
        for place, plan in enumerate(plans):
            if at[place] == len(plan):
                continue
            action = plan[at[place]]
            if not isinstance(action, Exchange):
                for one in passes_of(action):
                    assert is_end(place, one) or one in there[place], (place, one)
                    if one.kind == "backward":
                        assert one._replace(kind="forward") in done[place], (place, one)
                    done[place].append(one)
                    clocks[place] += FORWARD if one.kind == "forward" else BACKWARD
                at[place], moved = at[place] + 1, True
            elif not came[place]:
                enter(place, action)
                moved = True
        for place in range(num_stages):
            meet(place)
        # A place goes on when the last one that it exchanges with has come.
        over = [p for p in range(num_stages) if came[p] and None not in came[p].values()]
        leave = {p: max(clocks[p], *(t for t in came[p].values() if t is not None)) for p in over}
        for place in over:
            there[place] |= {one for kind, one in came[place] if kind == "get"}
            clocks[place], came[place], at[place], moved = leave[place], {}, at[place] + 1, True
        assert moved, f"all wait: {[plan[i : i + 1] for plan, i in zip(plans, at, strict=True)]}"
    return Played(done, clocks)


@pytest.mark.parametrize("in_pairs", [False, True])
@pytest.mark.parametrize(
    ("num_stages", "num_micro", "laps"), [*((n, m, 1) for n, m in SIZES), *LAPS]
)
def test_every_micro_batch_makes_every_pass_once_and_nobody_waits_for_ever(
    num_stages, num_micro, laps, in_pairs
):
    played = play(num_stages, num_micro, laps, in_pairs)
    for place, passes in enumerate(played.passes):
        assert len(passes) == 2 * num_micro * laps
        for kind, lap in itertools.product(("forward", "backward"), range(laps)):
            found = [p.number for p in passes if (p.kind, p.lap) == (kind, lap)]
            assert found == list(range(num_micro))
        # The gradients of a step are complete with the last pass, which is of the first layers.
        assert passes[-1] == Pass("backward", num_micro - 1, 0)
        held = most = 0
        for one in passes:
            held += 1 if one.kind == "forward" else -1
            most = max(most, held)
        assert held == 0 and most == in_flight(place, num_stages, num_micro, laps, in_pairs)


@pytest.mark.parametrize(("num_stages", "num_micro", "laps"), LAPS)
def test_laps_shorten_the_waiting_as_the_formula_says(num_stages, num_micro, laps):
    """Where all passes take as long, and exchanges none."""
    took = max(play(num_stages, num_micro, laps).ends)
    work = (FORWARD + BACKWARD) * num_micro * laps
    waits = waiting(num_stages, num_micro, laps)
    assert took == work + (FORWARD + BACKWARD) * waits
    if num_micro >= num_stages:
        assert waits == num_stages - 1
        share = (num_stages - 1) / (num_micro * laps + num_stages - 1)
        assert (took - work) / took == pytest.approx(share)


@pytest.mark.parametrize(
    ("num_stages", "num_micro", "laps"), [*((n, m, 1) for n, m in SIZES[::3]), *LAPS]
)
def test_held_out_batches_go_forward_alone(num_stages, num_micro, laps):
    played = play(num_stages, num_micro, laps, forward_alone=True)
    for passes in played.passes:
        assert {one.kind for one in passes} == {"forward"}
        for lap in range(laps):
            assert [p.number for p in passes if p.lap == lap] == list(range(num_micro))
    assert max(played.ends) == FORWARD * (num_micro * laps + waiting(num_stages, num_micro, laps))


@pytest.mark.parametrize(("num_stages", "num_micro"), [(2, 4), (4, 8), (8, 32)])
def test_one_lap_waits_as_long_as_it_says(num_stages, num_micro):
    took = max(play(num_stages, num_micro).ends)
    assert took == (FORWARD + BACKWARD) * (num_micro + waiting(num_stages, num_micro))


@pytest.mark.parametrize(("num_stages", "num_micro", "laps"), LAPS)
def test_what_laps_hold_is_bounded(num_stages, num_micro, laps):
    """By the warm-up of the first stage (Megatron-LM's interleaved schedule), whatever the number
    of micro-batches, where groups are of as many as there are stages.
    """
    for place in range(num_stages):
        held = in_flight(place, num_stages, num_micro, laps)
        ahead = 2 * (num_stages - place - 1) + (laps - 1) * num_stages
        if num_micro % num_stages == 0:
            assert held == min(ahead + 1, num_micro * laps)
        assert held <= num_micro * laps
        if num_micro >= 4 * num_stages**2:
            assert held <= ahead + laps


def test_one_stage_alone_takes_forward_and_backward_in_turn():
    assert list(actions(0, 1, 2)) == [
        Pass("forward", 0),
        Pass("backward", 0),
        Pass("forward", 1),
        Pass("backward", 1),
    ]


def test_micro_batches_go_round_in_groups():
    """Of the first of two stages: two micro-batches take their first lap, then their second, and
    their gradients come back from the second lap first.
    """
    order = [
        (one.kind[0], one.number, one.lap)
        for one in actions(0, 2, 4, 2)
        if not isinstance(one, Exchange)
    ]
    assert [one for one in order if one[0] == "f"] == [
        ("f", number, lap) for group in ((0, 1), (2, 3)) for lap in (0, 1) for number in group
    ]
    assert [one for one in order if one[0] == "b"] == [
        ("b", number, lap) for group in ((0, 1), (2, 3)) for lap in (1, 0) for number in group
    ]


@pytest.mark.parametrize(
    ("num_stages", "laps"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (3, 3), (4, 4)]
)
def test_all_stages_are_at_a_pair_at_once(num_stages, laps):
    """In the middle of a step, where an exchange with a neighbour takes no time."""
    num_micro = 5 * num_stages
    plans = [list(actions(place, num_stages, num_micro, laps, True)) for place in range(num_stages)]
    pairs = [sum(isinstance(a, Pair) for a in plan) for plan in plans]
    assert pairs == [
        num_micro * laps - 2 * (num_stages - place) + 1 - (laps - 1) * num_stages
        for place in range(num_stages)
    ]
    # As long as without pairs.
    took = max(play(num_stages, num_micro, laps, True).ends)
    assert took == (FORWARD + BACKWARD) * (num_micro * laps + num_stages - 1)


@pytest.mark.parametrize("fault", ["receives before it sends", "sends to itself", "skips a lap"])
def test_an_order_that_cannot_be_is_found(monkeypatch, fault):
    """The checker itself."""
    right = actions

    def crossed(place: int, num_stages: int, num_micro: int, laps: int, in_pairs: bool):
        plan: list[Action] = list(right(place, num_stages, num_micro, laps, in_pairs))
        if fault == "receives before it sends":
            for action in plan:
                if isinstance(action, Exchange) and action.sends and action.receives:
                    yield Exchange((), action.receives)
                    yield Exchange(action.sends, ())
                else:
                    yield action
        elif fault == "sends to itself":
            yield Exchange((), (Pass("forward", 0, 1),))
            yield from plan
        else:
            yield from (a for a in plan if not (isinstance(a, Pass) and a.lap == 1))

    monkeypatch.setitem(globals(), "actions", crossed)
    with pytest.raises(AssertionError, match=r"all wait|sends what it has not|Pass"):
        play(2, 2, 2)
