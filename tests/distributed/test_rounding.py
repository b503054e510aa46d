"""Masters of bf16 under ZeRO 1 and 2 and every layout: see rounding_worker.py."""

from __future__ import annotations

import json

import pytest

ONE_RANK = [{"zero": zero, "ep": 1} for zero in (1, 2)]
TWO_RANKS = [{"zero": zero, "ep": ep} for zero in (1, 2) for ep in (1, 2)]


def measured(run_ranks, world_size: int, cases: list[dict]) -> None:
    rows = run_ranks("distributed/rounding_worker.py", world_size, json.dumps(cases))
    assert [row["case"] for row in rows] == cases
    for row in rows:
        assert row["out_of_order"] == [] and row["not_taken_over"] == [], row
        assert row["again"] == row["losses"][len(row["losses"]) // 2 :], row
        assert row["bytes"] == [2, 4], row
        # Eight steps on one batch, which fp32 masters learn by some way.
        learnt = row["exact_losses"][0] - row["exact_losses"][-1]
        assert learnt > 0.1, row
        assert abs(row["losses"][-1] - row["exact_losses"][-1]) < 0.2 * learnt, row


@pytest.mark.slow
def test_masters_of_bf16_learn_and_resume_to_the_bit(run_ranks):
    measured(run_ranks, 2, TWO_RANKS[-1:])


@pytest.mark.nightly
def test_they_do_under_every_stage_and_layout(run_ranks):
    measured(run_ranks, 1, ONE_RANK)
    measured(run_ranks, 2, TWO_RANKS)
