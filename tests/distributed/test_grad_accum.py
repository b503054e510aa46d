"""Gradients of bf16 weights are added up in fp32, over micro-batches and over ranks, under every
ZeRO stage.
"""

from __future__ import annotations

import json

import pytest

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def case(
    zero: int, ep: int = 1, dtype: str = "fp32", counts: tuple[int, ...] = (32, 128), **zero_options
) -> dict:
    return {
        "zero": zero,
        "ep": ep,
        "grad_accum_dtype": dtype,
        "micro_batches": list(counts),
        "zero_options": zero_options,
    }


ONE_RANK = [
    *(case(zero, counts=(8, 32)) for zero in (1, 2, 3)),
    *(case(zero, dtype="bf16", counts=(32,)) for zero in (1, 2, 3)),
]
TWO_RANKS = [
    *(case(zero, 2, counts=(32,)) for zero in (1, 2, 3)),
    *(case(zero, 1, counts=(32,), **OFFLOAD) for zero in (1, 2)),
    case(3, 2, counts=(32,), offload_param={"device": "cpu"}, **OFFLOAD),
]
LONG_ALONE, LONG = ([case(zero, ep) for zero in (1, 2, 3)] for ep in (1, 2))
# a number that bf16 does not divide by exactly
THREE_RANKS = [case(zero, counts=(8,)) for zero in (1, 2)]


def check(rows: list[dict], cases: list[dict]) -> None:
    assert [row["case"] for row in rows] == cases
    for row in rows:
        assert row["lost"] == [], row
        if row["case"]["grad_accum_dtype"] == "fp32":
            assert max(row["errors"].values()) < 1e-6, row
        else:  # what the switch costs: bf16 keeps 8 binary digits of every partial sum
            assert 3e-3 < row["errors"]["dense"] < 0.1 and 3e-3 < row["errors"]["expert"] < 0.1, row


def measured(run_ranks, world_size: int, cases: list[dict]) -> None:
    check(run_ranks("distributed/grad_accum_worker.py", world_size, json.dumps(cases)), cases)


@pytest.mark.slow
def test_the_gradient_of_equal_micro_batches_is_exact_on_one_rank(run_ranks):
    measured(run_ranks, 1, ONE_RANK[::2])


@pytest.mark.slow
def test_the_gradient_of_equal_micro_batches_is_exact_on_two_ranks(run_ranks):
    measured(run_ranks, 2, TWO_RANKS[::2])


@pytest.mark.nightly
def test_it_is_exact_under_every_stage_on_one_rank(run_ranks):
    measured(run_ranks, 1, ONE_RANK + LONG_ALONE)


@pytest.mark.nightly
def test_it_is_exact_over_more_micro_batches_on_two_ranks(run_ranks):
    measured(run_ranks, 2, TWO_RANKS + LONG)


@pytest.mark.slow
def test_the_sum_over_three_ranks_is_exact(run_ranks):
    check(run_ranks("distributed/grad_accum_worker.py", 3, json.dumps(THREE_RANKS)), THREE_RANKS)
