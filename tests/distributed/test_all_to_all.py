"""Rows travel between ranks as ops/all_to_all/README.md defines, and a spread MoE layer equals the local one."""

from __future__ import annotations

import pytest
import torch

from ops.all_to_all import all_to_all_rows, exchange_counts

EXPERT_SIZES = (2, 4)
SPLITS = ("variable", "zeros", "a_rank_sends_nothing", "a_rank_receives_nothing", "all_to_one", "nobody_sends")
ROUTINGS = ("even", "one_expert_gets_everything", "experts_with_none", "a_rank_without_tokens", "no_tokens_anywhere",
            "unused_slots", "no_slot_used")
four_ranks = [pytest.mark.slow]


@pytest.fixture(scope="module")
def errors(run_ranks) -> dict[tuple[str, str], dict[str, float]]:
    """One run of four ranks serves all tests of this file."""
    lines = run_ranks("distributed/all_to_all_worker.py", 4)
    return {(line["check"], line["case"]): line["errors"] for line in lines}


def cases(names: tuple[str, ...]) -> list:
    return [pytest.param(f"{name}-ep{size}", marks=four_ranks) for size in EXPERT_SIZES for name in names]


@pytest.mark.parametrize("case", cases(SPLITS))
def test_rows_arrive_by_source_rank_and_the_gradient_is_the_transposed_exchange(errors, case):
    assert errors["exchange", case] == {"rows": 0.0, "gradient": 0.0, "counts": 0.0}


@pytest.mark.parametrize("case", cases(ROUTINGS))
def test_spread_experts_compute_what_one_process_computes(errors, case):
    found = dict(errors["dispatcher", case])
    assert (found.pop("rows"), found.pop("counts")) == (0.0, 0.0)  # the same rows in the same order
    found.pop("token order")
    assert set(found) == {"out", "grad hidden", "grad gates", "grad gate_up", "grad down"}
    assert all(error < 1e-11 for error in found.values()), found


@pytest.mark.parametrize("case", cases(ROUTINGS))
def test_combine_restores_token_order(errors, case):
    assert errors["dispatcher", case]["token order"] < 1e-13


def test_splits_that_do_not_add_up_to_the_rows_are_refused():
    with pytest.raises(ValueError, match=r"5 rows but input_splits \[2, 2\] sum to 4"):
        all_to_all_rows(torch.zeros(5, 3), [2, 2], [1, 1], None)


def test_without_a_group_rows_and_counts_stay_where_they_are():
    rows, counts = torch.randn(5, 3), torch.tensor([[2, 3]])
    assert all_to_all_rows(rows, [5], [5], None) is rows and exchange_counts(counts, None) is counts
