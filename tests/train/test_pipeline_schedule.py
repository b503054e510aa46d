"""The order of passes in a pipeline, for every number of stages and micro-batches: no process."""

from __future__ import annotations

import itertools

import pytest

from train.pipeline.schedule import (
    Action,
    Exchange,
    Pair,
    Pass,
    actions,
    actions_in_pairs,
    in_flight,
)

SIZES = list(itertools.product(range(1, 9), (*range(1, 10), 16, 31, 32)))


def partner(place: int, exchange: Exchange) -> int:
    return place + (1 if exchange.with_next else -1)


def fits(one: Exchange, other: Action) -> bool:
    """Both sides of one exchange: what one sends is what the other waits for."""
    return (
        isinstance(other, Exchange)
        and one.with_next != other.with_next
        and (one.send, one.receive) == (other.receive, other.send)
    )


def passes_of(action: Pass | Pair) -> list[Pass]:
    if isinstance(action, Pass):
        return [action]
    return [Pass("forward", action.forward), Pass("backward", action.backward)]


def play(num_stages: int, num_micro: int, order=None) -> list[list[Pass]]:
    """The passes of all stages where an exchange takes place once both sides have come to it.

    Raises AssertionError where they wait for each other, or pass what has not come.
    """
    plans = [list((order or actions)(place, num_stages, num_micro)) for place in range(num_stages)]
    at, done = [0] * num_stages, [list[Pass]() for _ in plans]
    there: list[set[tuple[str, int]]] = [set() for _ in plans]
    while any(at[place] < len(plan) for place, plan in enumerate(plans)):
        moved = False
        for place, plan in enumerate(plans):
            if at[place] == len(plan):
                continue
            action = plan[at[place]]
            if not isinstance(action, Exchange):
                for one in passes_of(action):
                    neighbour = place > 0 if one.kind == "forward" else place < num_stages - 1
                    assert not neighbour or (one.kind, one.number) in there[place], action
                    done[place].append(one)
            else:
                other = partner(place, action)
                if other < place or at[other] == len(plans[other]):
                    continue
                if not fits(action, plans[other][at[other]]):
                    continue
                # Every exchange is of a place with the next one: the earlier place plays it.
                if action.send is not None:
                    assert Pass("forward", action.send) in done[place]
                    there[other].add(("forward", action.send))
                if action.receive is not None:
                    assert Pass("backward", action.receive) in done[other]
                    there[place].add(("backward", action.receive))
                at[other] += 1
            at[place] += 1
            moved = True
        assert moved, f"all wait: {[plan[i : i + 1] for plan, i in zip(plans, at, strict=True)]}"
    return done


@pytest.mark.parametrize("in_pairs", [False, True])
@pytest.mark.parametrize(("num_stages", "num_micro"), SIZES)
def test_every_micro_batch_goes_forward_and_backward_once_and_nobody_waits_for_ever(
    num_stages, num_micro, in_pairs
):
    order = actions_in_pairs if in_pairs else actions
    for place, passes in enumerate(play(num_stages, num_micro, order)):
        for kind in ("forward", "backward"):
            assert [p.number for p in passes if p.kind == kind] == list(range(num_micro))
        held = most = 0
        for one in passes:
            held += 1 if one.kind == "forward" else -1
            most = max(most, held)
        assert held == 0 and most == in_flight(place, num_stages, num_micro, in_pairs)


def test_one_stage_alone_takes_forward_and_backward_in_turn():
    assert list(actions(0, 1, 2)) == [
        Pass("forward", 0),
        Pass("backward", 0),
        Pass("forward", 1),
        Pass("backward", 1),
    ]


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_all_stages_are_at_a_pair_at_once(num_stages):
    """In the middle of a step, where an exchange with a neighbour takes no time."""
    num_micro = 20
    plans = [list(actions_in_pairs(place, num_stages, num_micro)) for place in range(num_stages)]
    pairs = [sum(isinstance(a, Pair) for a in plan) for plan in plans]
    assert pairs == [num_micro - 2 * (num_stages - place) + 1 for place in range(num_stages)]

    # Rounds in which every stage goes on as far as it can without what its neighbours do in the
    # same one.
    at, rounds = [0] * num_stages, 0
    there: list[set[tuple[str, int]]] = [set() for _ in plans]
    while any(at[place] < len(plan) for place, plan in enumerate(plans)):
        rounds += 1
        sent: list[tuple[int, tuple[str, int]]] = []
        for place, plan in enumerate(plans):
            while at[place] < len(plan) and isinstance(action := plan[at[place]], Exchange):
                at[place] += 1
                if action.send is not None:
                    kind = "forward" if action.with_next else "backward"
                    sent.append((partner(place, action), (kind, action.send)))
            if at[place] == len(plan):
                continue
            ready = all(
                (place == 0 if one.kind == "forward" else place == num_stages - 1)
                or (one.kind, one.number) in there[place]
                for one in passes_of(plan[at[place]])
            )
            at[place] += ready
        for place, plan in enumerate(plans):
            while at[place] < len(plan) and isinstance(action := plan[at[place]], Exchange):
                at[place] += 1
                if action.send is not None:
                    kind = "forward" if action.with_next else "backward"
                    sent.append((partner(place, action), (kind, action.send)))
        for place, what in sent:
            there[place].add(what)
    # Forward passes alone, pairs, backward passes alone: as long as without pairs.
    assert rounds == num_stages + (num_micro - 1) + num_stages


def test_an_order_in_which_stages_wait_for_each_other_is_found(monkeypatch):
    """The checker itself: one that receives before it sends, on both sides."""

    def crossed(place: int, num_stages: int, num_micro: int):
        if place == 0:
            yield Pass("forward", 0)
            yield Exchange(True, None, 0)
            yield Exchange(True, 0, None)
        else:
            yield Exchange(False, None, 0)
            yield Exchange(False, 0, None)

    monkeypatch.setitem(globals(), "actions", crossed)
    with pytest.raises(AssertionError, match="all wait"):
        play(2, 1)
