"""Ranks that share matrices and the tokens of every row train exactly as one process does: heads,
dense MLPs and vocabulary in parts, experts, routers and norms whole, under every ZeRO stage.
"""

from __future__ import annotations

import json

import pytest

from tests.distributed.test_context_parallel import (
    LATENT_SHAPE,
    LEVELS,
    SINKS_AHEAD,
    check_that_it_shows,
)
from tests.distributed.test_parity import FEATURES, GATED, GPT_OSS, LATENT, LEARNED, MUP, check

WORKER = "distributed/parity_worker.py"


def case(tp: int, ep: int, zero: int, accumulation: int, scope: str, **more) -> dict:
    return {
        "tp": tp,
        "ep": ep,
        "zero": zero,
        "accumulation": accumulation,
        "clip": 0.5,
        "scope": scope,
        "steps": 3,
        **more,
    }


TWO_RANKS = [
    case(2, 2, 1, 2, "sequence", model={"recompute": "block", "loss_chunk_size": 7}),
]
FAULTS = [
    case(2, 1, 0, 1, "batch", fault="losses of own tokens alone"),
]
MORE_ON_TWO = [
    case(2, 1, 0, 1, "batch"),
    case(2, 2, 2, 2, "global_batch", z_loss=0.02),
    case(2, 2, 3, 2, "sequence", model={"recompute": "block", "loss_chunk_size": 7}),
    case(2, 1, 3, 1, "batch", zero_options={"stage3_param_persistence_threshold": 0}),
    case(2, 1, 1, 2, "batch", **GPT_OSS),
    # What is learnt from zero is in proportion as far off as its gradients.
    case(2, 2, 2, 1, "sequence", **SINKS_AHEAD, tolerance={"parameter": 5e-6}),
    case(2, 2, 1, 1, "batch", model={**FEATURES, "tie_embeddings": True}),
    case(2, 1, 2, 1, "batch", model={"num_experts": 0}),
    case(2, 1, 0, 1, "batch", model={"num_experts": 0, "tie_embeddings": True}),
    case(2, 1, 1, 2, "sequence", model={"num_mtp_layers": 2, "loss_chunk_size": 24}),
    case(
        *(2, 2, 1, 1, "global_batch"), router="top_p", balance={"bias_update": "quantile"}, lent=1
    ),
    case(2, 2, 1, 2, "sequence", attention=LEARNED, tolerance={"parameter": 5e-6}),
    case(
        *(2, 2, 3, 1, "batch"),
        attention=LEARNED,
        model={"recompute": "block"},
        tolerance={"parameter": 5e-6},
    ),
    case(2, 1, 2, 1, "batch", attention=GATED),
    case(2, 2, 0, 1, "batch", attention=LEVELS),
    case(2, 2, 3, 2, "batch", model={"qk_norm": "hidden", "recompute": "block"}),
    case(2, 2, 3, 1, "batch", attention=LATENT, model={**LATENT_SHAPE, "recompute": "block"}),
    case(2, 1, 1, 2, "batch", attention={**LATENT, "q_lora_rank": None}, model=LATENT_SHAPE),
    case(2, 2, 2, 1, "batch", zero_options={"offload_optimizer": {"device": "cpu"}}),
    case(2, 2, 1, 2, "batch", zero_options={"overlap_comm": True}),
]
MORE_FAULTS = [
    case(2, 1, 1, 1, "sequence", fault="sequences of own tokens"),
    case(2, 1, 1, 1, "batch", fault="bias on every rank", **GPT_OSS),
    case(2, 1, 1, 1, "batch", fault="means over local heads", attention=LEARNED),
]
FOUR_KV = {"num_kv_heads": 4}
FOUR_RANKS = [
    case(2, 4, 0, 1, "sequence"),
    case(2, 2, 1, 2, "global_batch"),
    case(2, 4, 2, 1, "batch", model={"recompute": "block"}),
    case(2, 4, 3, 2, "sequence"),
    case(4, 4, 2, 1, "sequence", model=FOUR_KV, router="threshold"),
    case(4, 1, 3, 1, "batch", model={**FOUR_KV, "tie_embeddings": True, "num_mtp_layers": 1}),
    case(2, 4, 1, 2, "sequence", cp=2, model=FOUR_KV),
    case(2, 2, 2, 1, "batch", cp=2, model={**FOUR_KV, "num_mtp_layers": 1}),
    case(
        *(2, 4, 1, 1, "sequence"),
        cp=2,
        attention=LEARNED,
        model=FOUR_KV,
        tolerance={"parameter": 5e-6},
    ),
    case(2, 4, 3, 1, "batch", cp=2, attention=LATENT, model=LATENT_SHAPE),
    case(2, 2, 1, 3, "sequence", pp=2, split=[1, 2]),
    case(2, 1, 0, 2, "batch", pp=2, model={"tie_embeddings": True, "num_mtp_layers": 1}),
    case(2, 2, 2, 2, "batch", pp=2, model={"recompute": "block", "num_mtp_layers": 1}),
]
EIGHT_RANKS = [
    case(2, 4, 1, 2, "sequence", cp=2, pp=2, model=FOUR_KV),
    case(2, 8, 3, 1, "sequence", cp=2, model=FOUR_KV),
]
HALF_PRECISION = [
    case(2, 2, 1, 2, "batch", precision="bf16"),
    case(2, 1, 2, 2, "batch", precision="bf16", model={"loss_chunk_size": 24}),
    case(2, 2, 3, 2, "batch", precision="bf16", model={"tie_embeddings": True}),
    # muP divides the logits of a tied head, those of chunks as well.
    case(
        *(2, 1, 1, 1, "batch"),
        precision="bf16",
        model={**MUP, "tie_embeddings": True, "loss_chunk_size": 24},
    ),
]


@pytest.fixture(scope="module")
def two_ranks(run_ranks):
    """Of TWO_RANKS and then of FAULTS: starting ranks costs as much as some of the cases."""
    return run_ranks(WORKER, 2, json.dumps(TWO_RANKS + FAULTS))


@pytest.mark.slow
def test_two_ranks_that_share_matrices_train_as_one_process(two_ranks):
    check(two_ranks[: len(TWO_RANKS)], TWO_RANKS)


@pytest.mark.slow
def test_a_mistake_in_sharing_matrices_shows(two_ranks):
    check_that_it_shows(two_ranks[len(TWO_RANKS) :])


@pytest.mark.nightly
def test_more_on_two_ranks_that_share_matrices_trains_as_one_process(run_ranks):
    rows = run_ranks(WORKER, 2, json.dumps(MORE_ON_TWO + MORE_FAULTS))
    check(rows[: len(MORE_ON_TWO)], MORE_ON_TWO)
    check_that_it_shows(rows[len(MORE_ON_TWO) :])


@pytest.mark.nightly
def test_four_ranks_that_share_matrices_train_as_one_process(run_ranks):
    check(run_ranks(WORKER, 4, json.dumps(FOUR_RANKS)), FOUR_RANKS)


@pytest.mark.nightly
def test_eight_ranks_that_share_matrices_train_as_one_process(run_ranks):
    check(run_ranks(WORKER, 8, json.dumps(EIGHT_RANKS)), EIGHT_RANKS)


@pytest.mark.nightly
def test_ranks_that_share_matrices_train_in_half_precision_as_one_process(run_ranks):
    check(run_ranks(WORKER, 2, json.dumps(HALF_PRECISION)), HALF_PRECISION)
