"""Rows travel between ranks as ops/all_to_all/README.md defines, and a spread MoE layer equals the
local one.
"""

from __future__ import annotations

import pytest
import torch

from ops.all_to_all import Hop, Meter, begin_rows, end_rows, exchange_counts

EXPERT_SIZES = (2, 4)
SPLITS = (
    "variable",
    "zeros",
    "a_rank_sends_nothing",
    "a_rank_receives_nothing",
    "all_to_one",
    "nobody_sends",
)
ROUTINGS = (
    "even",
    "as_many_everywhere",
    "one_expert_gets_everything",
    "experts_with_none",
    "a_rank_without_tokens",
    "no_tokens_anywhere",
    "unused_slots",
    "no_slot_used",
)
EVEN = ("as_many_everywhere", "one_expert_gets_everything", "no_tokens_anywhere")
"""Routings with as many tokens on every rank, as fixed buffers need."""
VARIANTS = (
    "plain",
    "chunks",
    "fixed",
    "fixed_chunks",
    "placed",
    "lent",
    "lent_fixed_chunks",
    "evaluation",
)
NODE_VARIANTS = ("nodes", "nodes_chunks", "nodes_fixed_lent")
"""Names of tests/distributed/all_to_all_worker.py; by nodes where there are two of two ranks."""


@pytest.fixture(scope="module")
def errors(run_ranks) -> dict[tuple[str, str], dict[str, float]]:
    """One run of four ranks serves all tests of this file."""
    lines = run_ranks("distributed/all_to_all_worker.py", 4)
    return {(line["check"], line["case"]): line["errors"] for line in lines}


def cases(names: tuple[str, ...]) -> list:
    return [
        pytest.param(name, size, marks=[pytest.mark.slow], id=f"{name}-ep{size}")
        for size in EXPERT_SIZES
        for name in names
    ]


@pytest.mark.parametrize(("case", "size"), cases(SPLITS))
def test_rows_arrive_by_source_rank_and_the_gradient_is_the_transposed_exchange(errors, case, size):
    assert errors["exchange", f"{case}-ep{size}"] == {
        "rows": 0.0,
        "homeward": 0.0,
        "gradient": 0.0,
        "counts": 0.0,
    }


@pytest.mark.parametrize(("case", "size"), cases(ROUTINGS))
def test_spread_experts_compute_what_one_process_computes(errors, case, size):
    found = errors["dispatcher", f"{case}-ep{size}"]
    names = [
        name
        for name in VARIANTS + (NODE_VARIANTS if size == 4 else ())
        if "fixed" not in name or case in EVEN
    ]
    assert all(found[name] < 1e-11 for name in names), found
    assert all(found[f"{name} token order"] < 1e-13 for name in names), found
    assert all(found[f"{name} processed"] == 0 for name in names), found


@pytest.mark.parametrize(("case", "size"), cases(ROUTINGS))
@pytest.mark.parametrize(("payload", "tolerance"), [("bf16", 0.02), ("fp8", 0.15)])
def test_rounded_rows_give_rounded_results(errors, case, size, payload, tolerance):
    found = errors["dispatcher", f"{case}-ep{size}"]
    assert found[payload] < tolerance, found
    if case in ("even", "unused_slots"):
        assert found[payload] > 1e-4, "rows were not rounded"


@pytest.mark.parametrize(("case", "size"), cases(ROUTINGS))
def test_chunks_nodes_and_fixed_buffers_change_no_bit(errors, case, size):
    bits = {
        name: error
        for name, error in errors["dispatcher", f"{case}-ep{size}"].items()
        if name.endswith("bits")
    }
    assert len(bits) == 3 + 2 * (size == 4) + 2 * (case in EVEN) and set(bits.values()) == {0.0}, (
        bits
    )


@pytest.mark.parametrize("homeward", [False, True])
def test_splits_that_do_not_add_up_to_the_rows_are_refused(homeward):
    path = (Hop(None, [2, 2], [2, 2]),)
    with pytest.raises(ValueError, match=r"5 rows but the splits \[2, 2\] sum to 4"):
        begin_rows(torch.zeros(5, 3), path, homeward=homeward)


@pytest.mark.parametrize("payload", ["native", "bf16"])
@pytest.mark.parametrize("homeward", [False, True])
def test_without_a_group_rows_stay_and_so_does_their_gradient(homeward, payload):
    rows = torch.randn(5, 3, requires_grad=True)
    arrived = end_rows(
        begin_rows(rows, (Hop(None, [5], [5]),), homeward=homeward, payload=payload, meter=Meter())
    )
    torch.testing.assert_close(arrived, rows, rtol=1e-2 if payload == "bf16" else 0, atol=0)
    arrived.backward(torch.ones(5, 3))
    assert rows.is_leaf and torch.equal(rows.grad, torch.ones(5, 3))
    with pytest.raises(ValueError, match="without a process group"):
        begin_rows(rows, (Hop(None, [2, 3], [2, 3]),))


def test_without_a_group_counts_stay_where_they_are():
    counts = torch.tensor([[2, 3]])
    assert exchange_counts(counts, None) is counts
