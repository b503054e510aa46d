"""Passes by turns (parallel.overlap_experts) train as one process does, and to the last bit as
passes one after the other.
"""

from __future__ import annotations

import json

import pytest

from tests.distributed.test_parity import check, muon
from tests.distributed.test_pipeline_parallel import case

WORKER = "distributed/parity_worker.py"
CHUNKS = {"dispatcher": {"num_chunks": 2}, "lent": 1}
CONTROLLED = {
    "router": "top_p",
    "balance": {"bias_update": "quantile"},
    "budget_scope": "model",
}


def overlapping(pp: int, ep: int, zero: int, accumulation: int, scope: str, **more) -> dict:
    return {**case(pp, ep, zero, accumulation, scope, **more), "overlap": True}


TWO_RANKS = [
    overlapping(1, 2, 1, 4, "global_batch", model={"recompute": "block"}),
    overlapping(1, 2, 2, 3, "batch", **CONTROLLED, **CHUNKS),
]
MORE_ON_TWO = [
    overlapping(1, 2, 0, 2, "sequence"),
    overlapping(1, 2, 1, 1, "batch"),
    overlapping(1, 2, 1, 2, "sequence", model={"num_mtp_layers": 1, "tie_embeddings": True}),
    overlapping(1, 2, 2, 5, "batch", router="threshold"),
    overlapping(1, 2, 1, 2, "batch", zero_options={"overlap_comm": True}),
    {**muon(2, 1, 2), "overlap": True},
    overlapping(1, 2, 1, 4, "batch", precision="bf16"),
]
FOUR_RANKS = [
    overlapping(2, 2, 1, 6, "batch"),
    overlapping(2, 2, 0, 2, "sequence", split=[1, 2], model={"tie_embeddings": True}),
    overlapping(2, 2, 2, 3, "global_batch", model={"recompute": "block"}, split=[2, 1]),
    overlapping(2, 2, 1, 5, "sequence", cp=2, model={"num_mtp_layers": 1}),
    overlapping(2, 2, 1, 4, "batch", **CONTROLLED, **CHUNKS),
    overlapping(1, 4, 1, 3, "batch"),
    overlapping(1, 2, 1, 3, "global_batch", cp=2),
    overlapping(1, 2, 2, 3, "batch", tp=2),
]


@pytest.mark.slow
def test_passes_by_turns_train_as_one_process(run_ranks):
    check(run_ranks(WORKER, 2, json.dumps(TWO_RANKS)), TWO_RANKS)


@pytest.mark.nightly
def test_more_passes_by_turns_train_as_one_process(run_ranks):
    check(run_ranks(WORKER, 2, json.dumps(MORE_ON_TWO)), MORE_ON_TWO)


@pytest.mark.nightly
def test_by_turns_in_stages_and_with_shared_rows_as_one_process(run_ranks):
    check(run_ranks(WORKER, 4, json.dumps(FOUR_RANKS)), FOUR_RANKS)
