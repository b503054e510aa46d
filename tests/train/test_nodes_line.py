"""The banner's line of which groups of ranks stay inside a node."""

from __future__ import annotations

import pytest

from model.parallel.groups import ParallelGroups
from train.fit import nodes_line


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"context_size": 8, "gather_size": 2}, "context, heads, gather within nodes"),
        (
            {"context_size": 16, "gather_size": 4, "expert_size": 8},
            "heads, expert within nodes; context, gather across nodes",
        ),
        ({"context_size": 16, "gather_size": 16}, "context, gather across nodes"),
        (
            {"context_size": 8, "gather_size": 4, "tensor_size": 2},
            "tensor, heads within nodes; context, gather across nodes",
        ),
        ({"context_size": 4, "expert_size": 16}, "context within nodes; expert across nodes"),
    ],
)
def test_groups_that_gather_are_told_from_those_that_exchange_heads(sizes, said):
    found = nodes_line(ParallelGroups(stage_size=16, **sizes), 8, 2)
    assert found == [f"nodes    2 of 8 ranks: {said}"]


def test_on_one_node_there_is_nothing_to_say():
    assert nodes_line(ParallelGroups(stage_size=8, context_size=8, gather_size=8), 8, 1) == []
