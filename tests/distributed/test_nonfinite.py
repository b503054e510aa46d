"""A NaN or infinity on one rank is seen by all, and changes neither weights nor moments."""

from __future__ import annotations

import json

import pytest

CASES = [
    {"zero": zero, "precision": precision, "where": where}
    for zero, precision in (
        (0, "fp32"),
        (1, "fp32"),
        (1, "bf16"),
        (2, "bf16"),
        (3, "fp32"),
        (3, "bf16"),
    )
    for where in ("loss", "dense", "expert")
]
CASES += [
    {"zero": zero, "precision": precision, "where": where, "stages": 2, "rank": rank}
    for zero, precision, where, rank in (
        (0, "fp32", "dense", 0),
        (1, "fp32", "dense", 0),
        (1, "bf16", "expert", 1),
        (2, "bf16", "loss", 1),
        (2, "fp32", "dense", 1),
    )
]
"""The first stage's own gradient is the one that no later stage sees."""
CASES += [
    {
        **{"zero": zero, "precision": precision, "where": where, "stages": 2, "rank": rank},
        "virtual": 2,
    }
    for zero, precision, where, rank in (
        (1, "fp32", "dense", 0),
        (0, "fp32", "expert", 1),
        (2, "bf16", "loss", 0),
        (1, "bf16", "loss", 1),
    )
]
"""Of two laps, the first to come back."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [CASES[::2], pytest.param(CASES[1::2], marks=[pytest.mark.nightly])],
    ids=["some", "the others"],
)
def test_a_poisoned_step_is_seen_by_all_ranks_and_changes_nothing(run_ranks, cases):
    results = run_ranks("distributed/nonfinite_worker.py", 2, json.dumps(cases))
    for case, result in zip(cases, results, strict=True):
        assert result["finite"] == [[True, False, True]] * 2, case
        assert result["changed"] == [[], []], case
