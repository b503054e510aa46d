"""Expert parallelism under ZeRO trains exactly as one process does.

This is also the contract test of DeepSpeed's private parts that train/engine.py relies on.
"""

from __future__ import annotations

import itertools
import json

import pytest

SCOPES = ("sequence", "batch", "global_batch")
FP32_TOLERANCE = {"loss": 2e-6, "gradient": 1e-5, "norm": 5e-6, "moment": 1e-5, "parameter": 1e-6, "controller": 1e-5,
                  "attention": 1e-4}
# Rounding flips a few expert choices, which moves single router and expert gradients visibly but loss and norm hardly.
BF16_TOLERANCE = {"loss": 1e-3, "gradient": 0.4, "norm": 2e-2, "moment": 0.3, "parameter": 1e-2,
                  "controller": 0.1, "attention": 0.1}


def matrix(expert_sizes: tuple[int, ...]) -> list[dict]:
    cases = itertools.product(expert_sizes, (0, 1, 2, 3), (1, 2), (0.0, 0.5))
    return [{"ep": ep, "zero": zero, "accumulation": accumulation, "clip": clip, "scope": SCOPES[i % 3]}
            for i, (ep, zero, accumulation, clip) in enumerate(cases)]


VARIANTS = [
    {"ep": 2, "zero": 3, "accumulation": 2, "clip": 0.5, "scope": "batch",
     "model": {"tie_embeddings": True, "loss_chunk_size": 24}},
    {"ep": 2, "zero": 3, "accumulation": 1, "clip": 0.5, "scope": "global_batch",
     "model": {"recompute": "block", "loss_chunk_size": 7}},
    {"ep": 2, "zero": 1, "accumulation": 2, "clip": 0.5, "scope": "global_batch", "model": {"recompute": "block"}},
    {"ep": 2, "zero": 2, "accumulation": 1, "clip": 0.5, "scope": "batch", "model": {"tie_embeddings": True}},
    {"ep": 1, "zero": 1, "accumulation": 2, "clip": 0.5, "scope": "batch", "model": {"num_experts": 0}},
    {"ep": 2, "zero": 2, "accumulation": 1, "clip": 0.5, "scope": "batch",
     "zero_options": {"offload_optimizer": {"device": "cpu"}}},
    {"ep": 2, "zero": 3, "accumulation": 1, "clip": 0.5, "scope": "batch",
     "zero_options": {"stage3_param_persistence_threshold": 0}},
    {"ep": 2, "zero": 1, "accumulation": 1, "clip": 0.5, "scope": "batch", "precision": "bf16"},
    {"ep": 2, "zero": 2, "accumulation": 2, "clip": 0.5, "scope": "batch", "precision": "bf16"},
    {"ep": 2, "zero": 3, "accumulation": 1, "clip": 0.5, "scope": "batch", "precision": "bf16"},
    {"ep": 2, "zero": 3, "accumulation": 1, "clip": 0.5, "scope": "batch", "precision": "bf16",
     "model": {"loss_chunk_size": 24}},
    {"ep": 2, "zero": 3, "accumulation": 2, "clip": 0.5, "scope": "batch", "precision": "bf16",
     "model": {"tie_embeddings": True, "loss_chunk_size": 24}, "zero_options": {"stage3_param_persistence_threshold": 0}},
]


# Routers with controllers, whose state must be the same as in one process, step by step.
ROUTERS = [{"ep": 2, "zero": zero, "accumulation": accumulation, "clip": 0.5, "scope": scope, "router": router,
            "balance": balance}
           for router, balance in (
               ("top_p", {"bias_update": "quantile"}), ("threshold", {}), ("relu", {"aux_loss_coeff": 0.0}),
               ("null_experts", {"bias_update": "quantile"}), ("group_limited", {}), ("capacity", {}),
               ("top_k", {"bias_update": "sign", "bias_update_rate": 0.01}),
               ("top_p", {"entropy_coeff": 0.02, "orthogonality_coeff": 0.02}))
           for zero, accumulation, scope in ((1, 2, "global_batch"), (3, 1, "batch"))]


# Sparse layers with noise in the selection, regularisers on audited rows and every learned correction; then the gated
# form after a dense step.
SPARSE = {"block_size": 2, "coarse_block_size": 2, "top_k": 2, "window_size": 1, "audit_rows": 0.5}
ATTENTIONS = [{"ep": 2, "zero": zero, "accumulation": accumulation, "clip": 0.5, "scope": "batch", "attention": attention}
              for attention in ({**SPARSE, "noise_steps": 3, "min_top_k": 1, "offset": True, "trust": True, "sink": True,
                                 "mass_kl_coeff": 0.1, "coherence_coeff": 0.1, "alignment_coeff": 0.1},
                                {**SPARSE, "merge": "gated", "dense_steps": 1, "dense_layers": [0]})
              for zero, accumulation in ((1, 2), (3, 1))]
ATTENTIONS.append({**ATTENTIONS[0], "ep": 1, "zero": 2, "model": {"recompute": "block"}})


# How rows travel, who serves which expert, and what is kept for backward.
DISPATCHES = [{"ep": ep, "zero": zero, "accumulation": accumulation, "clip": 0.5, "scope": "batch", "router": router,
               "dispatcher": dispatcher, **more}
              for zero, accumulation in ((1, 2), (3, 1))
              for ep, router, dispatcher, more in (
                  (2, "top_p", {"num_chunks": 2}, {"lent": 1}),
                  (2, "capacity", {"num_chunks": 3, "buffer_factor": 8.0}, {"experts": {"recompute": True}}),
                  (2, "threshold", {"buffer_factor": 2.0}, {"lent": 0, "model": {"recompute": "block"}}),
                  (2, "top_k", {}, {"lent": 2, "experts": {"backend": "grouped_mm"}}))]
NODES = [{"ep": 4, "zero": 2, "accumulation": 1, "clip": 0.5, "scope": "batch", "router": "top_p", "ranks_per_node": 2,
          "dispatcher": dispatcher, "lent": 1} for dispatcher in ({"num_chunks": 2}, {"buffer_factor": 4.0})]


# With 32 experts and 64 assignments a rank, some experts get no token on one of their two replicas: their gradient must
# still exist there, or the reduction over the replicas waits for ever.
STARVED = [{"ep": 2, "zero": zero, "accumulation": 1, "clip": 0.5, "scope": "batch", "model": {"num_experts": 32}}
           for zero in (0, 1, 2, 3)]


def check(rows: list[dict], cases: list[dict]) -> None:
    assert [r["case"] for r in rows] == cases
    wrong = []
    for row in rows:
        tolerance = BF16_TOLERANCE if row["case"].get("precision") == "bf16" else FP32_TOLERANCE
        wrong += [(row["case"], name, error) for name, error in row["errors"].items() if not error <= tolerance[name]]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.slow
def test_two_ranks_train_as_one_process(run_ranks):
    cases = matrix((1, 2))
    check(run_ranks("distributed/parity_worker.py", 2, json.dumps(cases)), cases)


@pytest.mark.slow
def test_four_ranks_train_as_one_process(run_ranks):
    cases = matrix((2, 4)) + STARVED + NODES + [{**case, "ep": 4, "zero": 2} for case in ROUTERS[::4]]
    check(run_ranks("distributed/parity_worker.py", 4, json.dumps(cases)), cases)


@pytest.mark.slow
def test_variants_train_as_one_process(run_ranks):
    check(run_ranks("distributed/parity_worker.py", 2, json.dumps(VARIANTS)), VARIANTS)


@pytest.mark.slow
def test_every_dispatch_trains_as_one_process(run_ranks):
    check(run_ranks("distributed/parity_worker.py", 2, json.dumps(DISPATCHES)), DISPATCHES)


@pytest.mark.slow
def test_sparse_attention_trains_as_one_process(run_ranks):
    check(run_ranks("distributed/parity_worker.py", 2, json.dumps(ATTENTIONS)), ATTENTIONS)


@pytest.mark.slow
def test_eight_ranks_route_and_train_as_one_process(run_ranks):
    cases = [{**ROUTERS[2], "ep": 8}]
    check(run_ranks("distributed/parity_worker.py", 8, json.dumps(cases)), cases)


@pytest.mark.slow
def test_routers_with_controllers_train_as_one_process(run_ranks):
    check(run_ranks("distributed/parity_worker.py", 2, json.dumps(ROUTERS)), ROUTERS)
