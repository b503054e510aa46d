"""The engine over ranks that share experts: every request gets what it gets in one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import generation_worker


@pytest.fixture(scope="module")
def lines(run_ranks) -> dict[tuple[str, int], dict]:
    """One run of two ranks serves all tests of this file."""
    found = run_ranks("distributed/generation_worker.py", 2)
    return {(line["case"], line["rank"]): line for line in found}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", generation_worker.CASES)
def test_ragged_decode_equals_one_process_under_ep2(lines, case, rank):
    requests = generation_worker.requests_of(case, rank)
    model = generation_worker.model_of(case, None)
    expected, _ = generation_worker.tokens_of(case, model, requests)
    assert lines[case, rank]["tokens"] == expected
    assert len(expected) == generation_worker.CASES[case][1][rank]


@pytest.mark.slow
@pytest.mark.parametrize("case", generation_worker.CASES)
def test_ranks_compute_as_often_as_each_other(lines, case):
    """A forward pass that one rank leaves out would leave the others waiting."""
    assert lines[case, 0]["forwards"] == lines[case, 1]["forwards"]
    assert lines[case, 0]["forwards"]["decode"] > 0
