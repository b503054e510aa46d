"""Two passes by turns: who runs when, what they return, and what happens when one fails."""

from __future__ import annotations

import pytest
import torch

from ops.all_to_all import by_turns
from ops.all_to_all.turns import give_way, rows_have_left


def passing(name: str, exchanges: int, said: list[str], flights: int = 1):
    """A pass that exchanges rows so many times; each exchange is of `flights`, as rows and their
    gates are.
    """

    def run() -> str:
        for number in range(exchanges):
            said.append(f"{name}{number}")
            for _ in range(flights):
                rows_have_left()
            for _ in range(flights):
                give_way()
        said.append(f"{name} ends")
        return name

    return run


@pytest.mark.parametrize("flights", [1, 2])
def test_each_computes_while_the_others_rows_travel(flights):
    said: list[str] = []
    assert by_turns(passing("a", 2, said, flights), passing("b", 3, said, flights)) == ("a", "b")
    assert said == ["a0", "b0", "a1", "b1", "a ends", "b2", "b ends"]


def test_what_sends_nothing_is_not_interrupted():
    said: list[str] = []
    by_turns(passing("a", 0, said), passing("b", 2, said))
    assert said == ["a ends", "b0", "b1", "b ends"]
    # Nothing that was sent since the last time, nothing to wait for.
    give_way()


def test_alone_nobody_gives_way():
    said: list[str] = []
    passing("a", 2, said)()
    assert said == ["a0", "a1", "a ends"]


@pytest.mark.parametrize("who", ["first", "second"])
def test_an_error_of_one_is_raised_after_the_other_has_ended(who):
    said: list[str] = []

    def failing() -> None:
        rows_have_left()
        give_way()
        raise ValueError("out of luck")

    other = passing("b", 3, said)
    with pytest.raises(ValueError, match="out of luck"):
        by_turns(failing, other) if who == "first" else by_turns(other, failing)
    assert said[-1] == "b ends"
    assert by_turns(passing("a", 1, said), passing("b", 1, said)) == ("a", "b")


@pytest.mark.parametrize("wanted", [True, False])
def test_both_have_gradients_or_neither(wanted):
    with torch.set_grad_enabled(wanted):
        assert by_turns(torch.is_grad_enabled, torch.is_grad_enabled) == (wanted, wanted)


def test_gradients_of_two_graphs_made_by_turns_are_those_of_each_alone():
    """Backward passes give way inside autograd, as exchanges do."""

    class Exchanged(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            rows_have_left()
            give_way()
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            rows_have_left()
            give_way()
            return grad * 2

    def graph(weight: torch.Tensor) -> torch.Tensor:
        x = torch.arange(4.0)
        for _ in range(3):
            x = Exchanged.apply((x * weight).sin())
        return x.sum()

    alone = torch.tensor(0.7, requires_grad=True)
    graph(alone).backward()
    weight, other = (torch.tensor(v, requires_grad=True) for v in (0.7, 0.9))
    before = graph(weight)
    loss, _ = by_turns(lambda: graph(other), before.backward)
    assert torch.equal(weight.grad, alone.grad)
    assert torch.equal(loss, graph(other))
