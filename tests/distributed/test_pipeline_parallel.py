"""Stages of a pipeline train exactly as one process does: every kind of layer at every place, under
ZeRO 0 to 2, with experts and shared rows inside a stage.
"""

from __future__ import annotations

import json

import pytest

from tests.distributed.test_context_parallel import LEVELS, SINKS_AHEAD, check_that_it_shows
from tests.distributed.test_parity import (
    BY_BLOCK,
    ENTRIES,
    ENTRIES_SHAPE,
    FOLLOWED,
    GATED,
    GPT_OSS,
    LATENT,
    LEARNED,
    check,
    muon,
)

WORKER = "distributed/parity_worker.py"
LATENT_SHAPE = {"num_kv_heads": 4, "qk_norm": "none"}
FOUR_LAYERS = {"num_layers": 4}


def case(pp: int, ep: int, zero: int, accumulation: int, scope: str, **more) -> dict:
    return {
        "pp": pp,
        "ep": ep,
        "zero": zero,
        "accumulation": accumulation,
        "clip": 0.5,
        "scope": scope,
        "steps": 3,
        **more,
    }


# The first stage has a dense layer alone where the split is [1, 2]: no router, no experts.
TWO_RANKS = [
    case(2, 1, 1, 4, "global_batch", split=[1, 2]),
    case(
        *(2, 1, 2, 3, "sequence"),
        model={"recompute": "block", "tie_embeddings": True, "num_mtp_layers": 1},
        router="top_p",
        balance={"bias_update": "quantile"},
        budget_scope="model",
    ),
    # Each of two ranks has two runs of layers; micro-batches that the ranks do not divide.
    case(
        *(2, 1, 1, 5, "global_batch"),
        virtual=2,
        split=[1, 1, 1, 2],
        model={"num_layers": 5, "tie_embeddings": True, "num_mtp_layers": 1},
        router="top_p",
        balance={"bias_update": "quantile"},
        budget_scope="model",
    ),
]
FAULTS = [
    case(2, 1, 1, 2, "batch", fault="gradients carried twice"),
    case(
        *(2, 1, 1, 2, "batch"),
        fault="gradient of the loan dropped",
        model={"tie_embeddings": True},
    ),
    case(2, 1, 1, 2, "batch", fault="gradients of first laps alone", virtual=2, model=FOUR_LAYERS),
]
MORE_ON_TWO = [
    case(2, 1, 0, 1, "sequence", split=[2, 1]),
    case(2, 1, 0, 3, "batch", model={"tie_embeddings": True, "loss_chunk_size": 7}),
    case(2, 1, 1, 2, "batch", attention=LEARNED, model={"recompute": "block"}),
    case(2, 1, 2, 2, "global_batch", attention=GATED),
    case(2, 1, 1, 2, "sequence", attention=LEVELS),
    # Layers that follow the choice of the one before, on each stage.
    case(2, 1, 1, 2, "batch", attention=FOLLOWED, model=FOUR_LAYERS),
    case(2, 1, 2, 2, "batch", attention=LATENT, model=LATENT_SHAPE),
    case(2, 1, 1, 2, "batch", attention=BY_BLOCK),
    case(2, 1, 1, 2, "batch", attention=ENTRIES, model=ENTRIES_SHAPE),
    case(2, 1, 1, 2, "batch", **GPT_OSS),
    case(2, 1, 1, 5, "sequence", **SINKS_AHEAD),
    case(2, 1, 2, 2, "batch", model={"num_experts": 0}),
    case(2, 1, 1, 2, "batch", router="threshold", split=[1, 2]),
    case(2, 1, 1, 2, "batch", router="relu", balance={"aux_loss_coeff": 0.0}),
    case(
        *(2, 1, 1, 2, "global_batch"),
        router="null_experts",
        balance={"bias_update": "quantile"},
        budget_scope="model",
        split=[1, 2],
    ),
    case(2, 1, 1, 2, "batch", balance={"bias_update": "sign", "bias_update_rate": 0.01}),
    case(2, 1, 1, 2, "batch", zero_options={"overlap_comm": True}),
    case(2, 1, 2, 2, "batch", zero_options={"offload_optimizer": {"device": "cpu"}}),
    {**muon(1, 1, 2), "pp": 2},
    {**muon(1, 2, 2, model={"tie_embeddings": True}), "pp": 2},
]
FOUR_RANKS = [
    case(2, 2, 1, 4, "batch"),
    case(2, 2, 0, 2, "sequence", split=[1, 2], model={"tie_embeddings": True}),
    case(2, 2, 2, 3, "global_batch", model={"recompute": "block"}, split=[2, 1]),
    case(2, 1, 1, 2, "sequence", cp=2, attention=LEARNED, model={"recompute": "block"}),
    case(2, 2, 1, 2, "sequence", cp=2, model={"num_mtp_layers": 1}),
    case(4, 1, 1, 6, "batch", model=FOUR_LAYERS),
    case(4, 1, 0, 2, "global_batch", model={**FOUR_LAYERS, "tie_embeddings": True}),
    case(4, 1, 2, 5, "sequence", model={**FOUR_LAYERS, "num_mtp_layers": 1}),
    case(
        *(2, 2, 1, 2, "batch"),
        router="top_p",
        balance={"bias_update": "quantile"},
        dispatcher={"num_chunks": 2},
        lent=1,
    ),
    {**muon(2, 1, 2), "pp": 2},
]
# Four such layers round as far without virtual stages, and twice as far without stages.
ROUNDED = {"tolerance": {"parameter": 3e-6}}
VIRTUAL_ON_TWO = [
    case(2, 1, 0, 1, "sequence", virtual=2, model=FOUR_LAYERS),
    case(2, 1, 2, 3, "batch", virtual=2, model={**FOUR_LAYERS, "recompute": "block"}),
    case(2, 1, 1, 4, "sequence", virtual=3, model={"num_layers": 7}),
    case(2, 1, 0, 3, "batch", virtual=2, model={**FOUR_LAYERS, "tie_embeddings": True}),
    case(2, 1, 1, 3, "batch", virtual=2, attention=LEARNED, model=FOUR_LAYERS, **ROUNDED),
    case(2, 1, 1, 2, "batch", virtual=2, attention=FOLLOWED, model={"num_layers": 8}, **ROUNDED),
    case(2, 1, 1, 2, "batch", virtual=2, model={**FOUR_LAYERS, "num_experts": 0}),
    # Routers at both ends of what a rank has, and of one rank none in its first run.
    case(
        *(2, 1, 1, 2, "global_batch"),
        virtual=2,
        router="null_experts",
        balance={"bias_update": "quantile"},
        budget_scope="model",
        split=[1, 2, 1, 1],
        model={"num_layers": 5},
    ),
    case(2, 1, 2, 2, "batch", virtual=2, model=FOUR_LAYERS, zero_options={"overlap_comm": True}),
    {**muon(1, 1, 2, model=FOUR_LAYERS), "pp": 2, "virtual": 2},
]
VIRTUAL_ON_FOUR = [
    case(2, 1, 1, 3, "batch", virtual=2, model=FOUR_LAYERS),
    case(2, 2, 2, 3, "global_batch", virtual=2, model={"num_layers": 5, "num_mtp_layers": 1}),
    case(2, 1, 1, 3, "sequence", virtual=2, cp=2, attention=LEARNED, model=FOUR_LAYERS, **ROUNDED),
    case(2, 2, 1, 2, "batch", virtual=2, tp=2, model=FOUR_LAYERS),
    case(2, 2, 2, 2, "batch", virtual=2, model=FOUR_LAYERS, zero_options={"overlap_comm": True}),
    case(
        *(2, 1, 1, 3, "batch"),
        virtual=2,
        model=FOUR_LAYERS,
        zero_options={"offload_optimizer": {"device": "cpu"}},
    ),
    # Of four ranks in a row: groups of five, and fewer micro-batches than ranks.
    case(4, 1, 1, 5, "batch", virtual=2, model={"num_layers": 8, "tie_embeddings": True}),
    case(4, 1, 2, 3, "sequence", virtual=2, model={"num_layers": 8, "recompute": "block"}),
    {**case(2, 2, 1, 4, "batch", virtual=2, model=FOUR_LAYERS), "overlap": True},
    {**muon(2, 1, 2, model=FOUR_LAYERS), "pp": 2, "virtual": 2},
]
# What launch.config refuses, and why: what other laps have learnt does not reach the update.
REFUSED = [
    case(2, 1, 1, 3, "batch", virtual=2, model=FOUR_LAYERS, zero_options={"overlap_comm": True}),
    case(
        *(2, 1, 2, 3, "batch"),
        virtual=2,
        model=FOUR_LAYERS,
        zero_options={"offload_optimizer": {"device": "cpu"}},
    ),
]
EIGHT_RANKS = [
    case(
        *(2, 2, 1, 3, "sequence"),
        virtual=2,
        cp=2,
        tp=2,
        model={**FOUR_LAYERS, "num_kv_heads": 4},
    ),
    case(2, 4, 1, 2, "sequence", cp=2),
    case(4, 2, 1, 6, "batch", model=FOUR_LAYERS, split=[1, 1, 1, 1]),
]
HALF_PRECISION = [
    case(2, 1, 1, 4, "batch", precision="bf16", virtual=2, model=FOUR_LAYERS),
    case(2, 1, 2, 3, "batch", precision="bf16", virtual=2, model=FOUR_LAYERS),
    case(2, 1, 1, 2, "batch", precision="bf16"),
    case(2, 1, 2, 4, "batch", precision="bf16", model={"loss_chunk_size": 24}),
    case(
        *(2, 1, 1, 4, "batch"),
        precision="bf16",
        model={"tie_embeddings": True, "num_mtp_layers": 1},
    ),
]


@pytest.fixture(scope="module")
def two_ranks(run_ranks):
    """Of TWO_RANKS and then of FAULTS: starting ranks costs as much as some of the cases."""
    return run_ranks(WORKER, 2, json.dumps(TWO_RANKS + FAULTS))


@pytest.mark.slow
def test_two_stages_train_as_one_process(two_ranks):
    check(two_ranks[: len(TWO_RANKS)], TWO_RANKS)


@pytest.mark.slow
def test_a_mistake_between_stages_shows(two_ranks):
    check_that_it_shows(two_ranks[len(TWO_RANKS) :])


@pytest.mark.nightly
def test_more_in_two_stages_trains_as_one_process(run_ranks):
    check(run_ranks(WORKER, 2, json.dumps(MORE_ON_TWO)), MORE_ON_TWO)


@pytest.mark.nightly
def test_stages_of_experts_and_shared_rows_train_as_one_process(run_ranks):
    check(run_ranks(WORKER, 4, json.dumps(FOUR_RANKS)), FOUR_RANKS)


@pytest.mark.nightly
def test_virtual_stages_train_as_one_process(run_ranks):
    check(run_ranks(WORKER, 2, json.dumps(VIRTUAL_ON_TWO)), VIRTUAL_ON_TWO)


@pytest.mark.nightly
def test_virtual_stages_of_experts_and_shared_rows_train_as_one_process(run_ranks):
    check(run_ranks(WORKER, 4, json.dumps(VIRTUAL_ON_FOUR)), VIRTUAL_ON_FOUR)


@pytest.mark.nightly
def test_what_is_refused_of_virtual_stages_would_be_wrong(run_ranks):
    check_that_it_shows(run_ranks(WORKER, 4, json.dumps(REFUSED)))


@pytest.mark.nightly
def test_eight_ranks_in_stages_train_as_one_process(run_ranks):
    check(run_ranks(WORKER, 8, json.dumps(EIGHT_RANKS)), EIGHT_RANKS)


@pytest.mark.nightly
def test_stages_train_in_half_precision_as_one_process(run_ranks):
    check(run_ranks(WORKER, 2, json.dumps(HALF_PRECISION)), HALF_PRECISION)
