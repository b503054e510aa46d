"""Layers that route by token id, and several residual streams, under every way to share out work,
against one process (parity_worker.py).
"""

from __future__ import annotations

import pytest

from tests.distributed.test_parity import compared

STREAMS = {"num_residual_streams": 2, "sinkhorn_steps": 3}
SIGN = {"bias_update": "sign", "bias_update_rate": 0.01, "entropy_coeff": 0.0}


def case(**more) -> dict:
    usual = {"ep": 1, "zero": 1, "accumulation": 2, "clip": 0.5, "scope": "batch", "steps": 3}
    return usual | {"router": "hashed", "balance": SIGN, "model": STREAMS} | more


DAILY = [
    case(ep=2, zero=3, accumulation=1, lent=1),
    case(pp=2),
    case(tp=2, ep=2, model={**STREAMS, "recompute": "block"}),
    case(cp=2, scope="sequence"),
]
NIGHTLY = [
    case(ep=2, zero=2, scope="global_batch"),
    case(ep=2, zero=0, accumulation=1),
    case(zero=3, model={**STREAMS, "recompute": "block", "loss_chunk_size": 24}),
    case(pp=2, split=[1, 2], model={**STREAMS, "tie_embeddings": True}),
    case(tp=2, zero=3),
    case(ep=2, zero=1, precision="bf16"),
]


def test_tables_and_streams_train_as_one_process(run_ranks):
    compared(run_ranks, 2, DAILY)


@pytest.mark.nightly
def test_tables_and_streams_train_as_one_process_in_more_ways(run_ranks):
    compared(run_ranks, 2, NIGHTLY)
