"""Ranks that share the tokens of every row train exactly as one process does: every attention,
router and loss, under every ZeRO stage, with experts spread over the same ranks or others.
"""

from __future__ import annotations

import json

import pytest

from tests.distributed.test_parity import (
    FP32_TOLERANCE,
    GATED,
    GPT_OSS,
    LATENT,
    LEARNED,
    SPARSE,
    check,
    muon,
)

WORKER = "distributed/parity_worker.py"
LEVELS = {**SPARSE, "num_levels": 2, "fanout": 2, "num_expanded": 1, "noise_steps": 3}
SINKS_AHEAD = {**GPT_OSS, "model": {**GPT_OSS["model"], "num_mtp_layers": 2}}
LATENT_SHAPE = {"num_kv_heads": 4, "qk_norm": "none"}


def case(cp: int, ep: int, zero: int, accumulation: int, scope: str, **more) -> dict:
    return {
        "cp": cp,
        "ep": ep,
        "zero": zero,
        "accumulation": accumulation,
        "clip": 0.5,
        "scope": scope,
        "steps": 3,
        **more,
    }


TWO_RANKS = [
    case(2, 2, 3, 1, "sequence", attention=LEARNED, model={"recompute": "block"}),
    case(
        2,
        1,
        2,
        1,
        "batch",
        attention=LATENT,
        model={**LATENT_SHAPE, "recompute": "block"},
        z_loss=0.02,
        largest=True,
    ),
    case(2, 2, 1, 2, "sequence", **SINKS_AHEAD),
    case(2, 2, 2, 2, "sequence", gather=2, attention=LEARNED, model={"recompute": "block"}),
]
FOUR_RANKS = [
    case(4, 4, 0, 1, "sequence", model={"num_kv_heads": 4}, router="threshold", largest=True),
    case(4, 4, 3, 1, "sequence", gather=2, attention=LATENT, model=LATENT_SHAPE, largest=True),
]
# A parameter that is learnt from zero is in proportion as far off as its gradients: 5e-6.
MORE_ON_TWO = [
    case(2, 2, 0, 1, "sequence"),
    case(2, 1, 1, 2, "global_batch", model={"recompute": "block", "loss_chunk_size": 7}),
    case(2, 2, 0, 2, "batch", attention=LEARNED),
    case(2, 1, 2, 1, "batch", attention=GATED),
    case(2, 2, 2, 1, "sequence", attention=LEVELS),
    case(2, 2, 3, 1, "batch", attention=LATENT, model=LATENT_SHAPE),
    case(2, 2, 3, 2, "batch", **GPT_OSS),
    case(2, 1, 2, 1, "batch", model={"num_experts": 0}),
    case(2, 1, 1, 2, "sequence", model={"num_mtp_layers": 2, "tie_embeddings": True}),
    case(2, 2, 1, 1, "global_batch", router="top_p", balance={"bias_update": "quantile"}, lent=1),
    {**muon(2, 3), "cp": 2},
    case(2, 2, 0, 1, "sequence", gather=2, largest=True),
    case(2, 1, 1, 2, "global_batch", gather=2, attention=LATENT, model=LATENT_SHAPE),
    case(2, 2, 3, 1, "batch", gather=2, attention=GATED),
    case(2, 2, 2, 1, "sequence", gather=2, attention=LEVELS),
    case(2, 2, 3, 2, "sequence", gather=2, tolerance={"parameter": 5e-6}, **SINKS_AHEAD),
    case(2, 1, 1, 1, "batch", gather=2, model={"num_experts": 0, "num_kv_heads": 1}),
    {**muon(2, 3), "cp": 2, "gather": 2},
]
MORE_ON_FOUR = [
    case(4, 2, 1, 2, "sequence", gather=2, attention=LEARNED),
    case(4, 4, 3, 1, "batch", gather=4, attention=LEARNED, model={"recompute": "block"}),
    case(4, 4, 2, 1, "global_batch", gather=2, **SINKS_AHEAD),
    case(2, 2, 1, 1, "sequence", gather=2, tp=2),
    case(2, 2, 1, 1, "sequence", gather=2, pp=2, attention=LEARNED),
]
EIGHT_RANKS = [
    case(4, 8, 3, 1, "sequence", model={"num_kv_heads": 4, "recompute": "block"}),
    case(
        *(4, 4, 1, 2, "global_batch"),
        attention=LEARNED,
        model={"num_kv_heads": 4},
        tolerance={"parameter": 5e-6},
    ),
    case(2, 8, 2, 1, "batch", router="top_p", balance={"bias_update": "quantile"}),
    case(2, 2, 0, 2, "sequence", model={"num_mtp_layers": 1}),
    case(4, 1, 2, 1, "batch", attention=LATENT, model=LATENT_SHAPE),
    case(8, 8, 3, 1, "sequence", gather=4, model={"recompute": "block"}),
    case(
        *(8, 4, 1, 2, "global_batch"),
        gather=4,
        attention=LEARNED,
        tolerance={"parameter": 5e-6},
    ),
    case(8, 2, 2, 1, "sequence", gather=2, attention=LATENT, model=LATENT_SHAPE),
]
HALF_PRECISION = [
    case(2, 2, 1, 2, "batch", precision="bf16"),
    case(2, 2, 3, 2, "batch", precision="bf16"),
    case(
        *(2, 2, 2, 2, "batch"),
        precision="bf16",
        attention=LEARNED,
        tolerance={"parameter": 0.1},
    ),
]
FAULTS = [
    case(2, 1, 0, 1, "batch", fault="scaled by rows"),
    case(2, 1, 1, 1, "batch", fault="noise of local heads", attention=LEARNED),
    case(2, 1, 1, 1, "batch", fault="gradients of other tokens", gather=2),
]
MORE_FAULTS = [
    case(2, 1, 1, 1, "sequence", fault="sequences of own tokens"),
    case(2, 1, 1, 1, "batch", fault="sinks of other heads", **GPT_OSS),
    case(2, 1, 1, 1, "batch", fault="means over local heads", attention=LEARNED),
    case(2, 1, 1, 1, "batch", fault="gradients of own queries alone", gather=2),
    case(2, 1, 1, 1, "batch", fault="noise of other tokens", gather=2, attention=LEARNED),
]


def check_that_it_shows(rows: list[dict]) -> None:
    """A fault is far outside of what rounding does."""
    for row in rows:
        largest = max(row["errors"][name] / FP32_TOLERANCE[name] for name in ("gradient", "norm"))
        assert largest > 100, row


@pytest.fixture(scope="module")
def two_ranks(run_ranks):
    """Of TWO_RANKS and then of FAULTS: starting ranks costs as much as some of the cases."""
    return run_ranks(WORKER, 2, json.dumps(TWO_RANKS + FAULTS))


@pytest.mark.slow
def test_two_ranks_that_share_rows_train_as_one_process(two_ranks):
    check(two_ranks[: len(TWO_RANKS)], TWO_RANKS)


@pytest.mark.slow
def test_a_mistake_in_sharing_rows_shows(two_ranks):
    check_that_it_shows(two_ranks[len(TWO_RANKS) :])


@pytest.mark.slow
def test_four_ranks_that_share_rows_train_as_one_process(run_ranks):
    check(run_ranks(WORKER, 4, json.dumps(FOUR_RANKS)), FOUR_RANKS)


@pytest.mark.nightly
def test_more_on_two_ranks_that_share_rows_trains_as_one_process(run_ranks):
    rows = run_ranks(WORKER, 2, json.dumps(MORE_ON_TWO + MORE_FAULTS))
    check(rows[: len(MORE_ON_TWO)], MORE_ON_TWO)
    check_that_it_shows(rows[len(MORE_ON_TWO) :])


@pytest.mark.nightly
def test_more_on_four_ranks_that_gather_trains_as_one_process(run_ranks):
    check(run_ranks(WORKER, 4, json.dumps(MORE_ON_FOUR)), MORE_ON_FOUR)


@pytest.mark.nightly
def test_eight_ranks_that_share_rows_train_as_one_process(run_ranks):
    check(run_ranks(WORKER, 8, json.dumps(EIGHT_RANKS)), EIGHT_RANKS)


@pytest.mark.nightly
def test_ranks_that_share_rows_train_in_half_precision_as_one_process(run_ranks):
    check(run_ranks(WORKER, 2, json.dumps(HALF_PRECISION)), HALF_PRECISION)
