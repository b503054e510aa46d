"""Expert parallelism under ZeRO trains exactly as one process does.

This is also the contract test of DeepSpeed's private parts that train/engine/deepspeed.py relies
on.
"""

from __future__ import annotations

import itertools
import json

import pytest

from tests.pairwise import cover

SCOPES = ("sequence", "batch", "global_batch")
FP32_TOLERANCE = {
    "loss": 2e-6,
    "gradient": 1e-5,
    "norm": 5e-6,
    "moment": 1e-5,
    "parameter": 1e-6,
    "controller": 1e-5,
    "attention": 1e-4,
}
# Rounding flips a few expert choices, which moves single router and expert gradients visibly but
# loss and norm hardly.
BF16_TOLERANCE = {
    "loss": 1e-3,
    "gradient": 0.4,
    "norm": 2e-2,
    "moment": 0.3,
    "parameter": 1e-2,
    "controller": 0.1,
    "attention": 0.1,
}


def matrix(expert_sizes: tuple[int, ...], whole: bool = False) -> list[dict]:
    """Settings in which every two values of two columns meet; whole: every combination, as nightly
    runs have it. The scopes take turns: the loss has one, of which a stage of ZeRO knows nothing,
    and each meets every other value.
    """
    columns = (expert_sizes, (0, 1, 2, 3), (1, 2), (0.0, 0.5))
    cases = list(itertools.product(*columns))
    if not whole:
        cases = sorted(cover(cases), key=lambda case: (case[2], case[3], case[0]))
    return [
        {"ep": ep, "zero": zero, "accumulation": accumulation, "clip": clip, "scope": scope}
        for (ep, zero, accumulation, clip), scope in zip(cases, itertools.cycle(SCOPES))
    ]


@pytest.mark.parametrize("sizes", [(1, 2), (2, 4)])
def test_a_day_meets_every_two_values(sizes):
    def pairs(cases: list[dict]) -> set:
        return {
            pair
            for case in cases
            for pair in itertools.combinations(sorted(case.items()), 2)
            if {name for name, _ in pair} != {"scope", "zero"}
        }

    every = [case | {"scope": scope} for case in matrix(sizes, whole=True) for scope in SCOPES]
    assert pairs(matrix(sizes)) == pairs(every)


FEATURES = {
    "attention_bias": "qkvo",
    "attention_multiplier": 0.3,
    "rotary_dim": 2,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 8},
    "shared_expert_gate": True,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_divisor": 1.5,
}
"""What some published families have and most do without."""
GPT_OSS = {
    "router": "biased",
    "attention": {"window": 5, "sinks": True},
    "model": {
        "attention_bias": "qkvo",
        "activation": "clamped_swiglu",
        "expert_bias": True,
        "num_shared_experts": 0,
        "num_dense_layers": 0,
    },
}
VARIANTS = [
    {"ep": 2, "zero": 3, "accumulation": 2, "clip": 0.5, "scope": "batch", **GPT_OSS},
    {"ep": 2, "zero": 1, "accumulation": 1, "clip": 0.5, "scope": "batch", **GPT_OSS, "lent": 1},
    {
        "ep": 2,
        "zero": 3,
        "accumulation": 2,
        "clip": 0.5,
        "scope": "batch",
        "model": {**FEATURES, "recompute": "block", "loss_chunk_size": 24},
    },
    {
        "ep": 2,
        "zero": 1,
        "accumulation": 1,
        "clip": 0.5,
        "scope": "batch",
        "model": {**FEATURES, "tie_embeddings": True},
    },
    {
        "ep": 2,
        "zero": 3,
        "accumulation": 2,
        "clip": 0.5,
        "scope": "batch",
        "model": {"tie_embeddings": True, "loss_chunk_size": 24},
        "z_loss": 0.02,
        "largest": True,
    },
    {
        "ep": 2,
        "zero": 3,
        "accumulation": 1,
        "clip": 0.5,
        "scope": "global_batch",
        "model": {"recompute": "block", "loss_chunk_size": 7},
    },
    {
        "ep": 2,
        "zero": 1,
        "accumulation": 2,
        "clip": 0.5,
        "scope": "global_batch",
        "model": {"recompute": "block"},
    },
    {
        "ep": 2,
        "zero": 2,
        "accumulation": 1,
        "clip": 0.5,
        "scope": "batch",
        "model": {"tie_embeddings": True},
    },
    {
        "ep": 1,
        "zero": 1,
        "accumulation": 2,
        "clip": 0.5,
        "scope": "batch",
        "model": {"num_experts": 0},
    },
    {
        "ep": 2,
        "zero": 2,
        "accumulation": 1,
        "clip": 0.5,
        "scope": "batch",
        "zero_options": {"offload_optimizer": {"device": "cpu"}},
    },
    {
        "ep": 2,
        "zero": 3,
        "accumulation": 1,
        "clip": 0.5,
        "scope": "batch",
        "zero_options": {"stage3_param_persistence_threshold": 0},
    },
    {
        "ep": 2,
        "zero": 1,
        "accumulation": 2,
        "clip": 0.5,
        "scope": "batch",
        "experts": {"precision": "fp8"},
    },
    {"ep": 2, "zero": 1, "accumulation": 1, "clip": 0.5, "scope": "batch", "precision": "bf16"},
    {"ep": 2, "zero": 2, "accumulation": 2, "clip": 0.5, "scope": "batch", "precision": "bf16"},
    {"ep": 2, "zero": 3, "accumulation": 1, "clip": 0.5, "scope": "batch", "precision": "bf16"},
    {
        "ep": 2,
        "zero": 3,
        "accumulation": 1,
        "clip": 0.5,
        "scope": "batch",
        "precision": "bf16",
        "model": {"loss_chunk_size": 24},
    },
    {
        "ep": 2,
        "zero": 3,
        "accumulation": 2,
        "clip": 0.5,
        "scope": "batch",
        "precision": "bf16",
        "model": {"tie_embeddings": True, "loss_chunk_size": 24},
        "zero_options": {"stage3_param_persistence_threshold": 0},
    },
]


# Routers with controllers, whose state must be the same as in one process, step by step: the
# fourth is the first after warm start and blending.
ROUTERS = [
    {
        "ep": 2,
        "zero": zero,
        "accumulation": accumulation,
        "clip": 0.5,
        "scope": scope,
        "steps": 4,
        "router": router,
        "balance": balance,
    }
    for router, balance in (
        ("top_p", {"bias_update": "quantile"}),
        ("threshold", {}),
        ("relu", {"aux_loss_coeff": 0.0}),
        ("null_experts", {"bias_update": "quantile"}),
        ("group_limited", {}),
        ("capacity", {}),
        ("top_k", {"bias_update": "sign", "bias_update_rate": 0.01}),
        ("top_p", {"entropy_coeff": 0.02, "orthogonality_coeff": 0.02}),
    )
    for zero, accumulation, scope in ((1, 2, "global_batch"), (3, 1, "batch"))
]


# Sparse layers with noise in the selection, regularisers on audited rows and every learned
# correction; then the gated form after a dense step.
SPARSE = {"block_size": 2, "coarse_block_size": 2, "top_k": 2, "window_size": 1, "audit_rows": 0.5}
LEARNED = {
    **SPARSE,
    "noise_steps": 3,
    "min_top_k": 1,
    "offset": True,
    "trust": True,
    "sink": True,
    "entries": "gated",
    "mass_kl_coeff": 0.1,
    "coherence_coeff": 0.1,
    "alignment_coeff": 0.1,
}
GATED = {**SPARSE, "merge": "gated", "dense_steps": 1, "dense_layers": [0]}
ATTENTIONS = [
    {
        "ep": 2,
        "zero": zero,
        "accumulation": accumulation,
        "clip": 0.5,
        "scope": "batch",
        "steps": 4,
        "attention": attention,
    }
    for attention in (LEARNED, GATED)
    for zero, accumulation in ((1, 2), (3, 1))
]
ATTENTIONS.append({**ATTENTIONS[0], "ep": 1, "zero": 2, "model": {"recompute": "block"}})

# Attention by an index, which learns in a dense step and then chooses.
INDEX = {"top_k": 2, "index_heads": 2, "dense_steps": 1, "audit_rows": 0.5}
BY_BLOCK = {**INDEX, "rule": "msa", "block_size": 2, "dense_layers": [0]}
FOLLOWED = {**SPARSE, "select": "index", "index_layers": 2, "entries": "gated"}
INDEXES = [
    {**ATTENTIONS[0], "zero": 3, "attention": {**INDEX, "rule": "dsa"}},
    {
        **ATTENTIONS[0],
        "ep": 1,
        "zero": 2,
        "attention": BY_BLOCK,
        "model": {"recompute": "block"},
    },
    {**ATTENTIONS[0], "attention": {**INDEX, "rule": "qsa", "block_size": 2}},
    {
        **ATTENTIONS[0],
        "zero": 3,
        "attention": FOLLOWED,
        "model": {"recompute": "block"},
    },
]


# Window, entries of both kinds and their index, which learns in a dense step and then chooses;
# every parameter is gathered as it is used.
ENTRIES = {
    **dict(sliding_window=3, csa_ratio=2, hca_ratio=3, top_k=2, q_lora_rank=12, output_groups=2),
    **dict(o_lora_rank=8, rope_head_dim=4, index_heads=3, index_head_dim=6, dense_steps=1),
    "audit_rows": 0.5,
    "layer_kinds": ["csa", "window", "hca"],
}
SHARED = {
    **{**ENTRIES, "layer_kinds": "csa"},
    **dict(late_csa_ratio=1, csa_overlap=False, slot_bias=False, entry_layers=2, index_layers=2),
    **dict(index_keys="projected", top_k_blocks=2, index_block_size=2),
}
ENTRIES_SHAPE = {"num_kv_heads": 1, "qk_norm": "none"}
COMPRESSED = [
    {
        **ATTENTIONS[0],
        "zero": 3,
        "attention": ENTRIES,
        "model": ENTRIES_SHAPE,
        "zero_options": {"stage3_param_persistence_threshold": 0},
    },
    {
        **ATTENTIONS[0],
        "ep": 1,
        "zero": 2,
        "attention": {**ENTRIES, "layer_kinds": "csa"},
        "model": {**ENTRIES_SHAPE, "recompute": "block"},
    },
    # The second layer reads the entries and the choice of the first.
    {
        **ATTENTIONS[0],
        "zero": 3,
        "attention": SHARED,
        "model": {**ENTRIES_SHAPE, "recompute": "block"},
        "zero_options": {"stage3_param_persistence_threshold": 0},
    },
    {
        **ATTENTIONS[0],
        "zero": 1,
        "attention": SHARED,
        "model": ENTRIES_SHAPE,
        "tolerance": {"parameter": 5e-6},  # sinks are learnt from zero
    },
    {
        **ATTENTIONS[0],
        **{"ep": 1, "zero": 1, "pp": 2, "split": [2, 1]},
        "attention": SHARED,
        "model": {**ENTRIES_SHAPE, "recompute": "block"},
        "tolerance": {"parameter": 5e-6},
    },
]


# Latent attention under every stage, with and without a latent for queries, and recomputed.
LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
LATENTS = [
    {
        "ep": ep,
        "zero": zero,
        "accumulation": accumulation,
        "clip": 0.5,
        "scope": "batch",
        "attention": {**LATENT, "q_lora_rank": rank},
        "model": {"num_kv_heads": 4, "qk_norm": "none", "recompute": recompute},
        **more,
    }
    for ep, zero, accumulation, rank, recompute, more in (
        (2, 0, 1, 12, "none", {}),
        (1, 1, 2, None, "none", {}),
        (2, 2, 2, 12, "block", {}),
        (2, 3, 1, 12, "block", {"zero_options": {"stage3_param_persistence_threshold": 0}}),
        (2, 3, 2, None, "none", {"precision": "bf16"}),
    )
]


# Modules of multi-token prediction, whose routers have controllers as all others have.
PREDICTIONS = [
    {
        "ep": ep,
        "zero": zero,
        "accumulation": accumulation,
        "clip": 0.5,
        "scope": scope,
        "model": {"num_mtp_layers": modules, **model},
        **more,
    }
    for ep, zero, accumulation, scope, modules, model, more in (
        (2, 0, 1, "batch", 1, {}, {}),
        (2, 1, 2, "global_batch", 2, {"loss_chunk_size": 24}, {}),
        (1, 2, 2, "sequence", 1, {"tie_embeddings": True, "recompute": "block"}, {}),
        (
            *(2, 3, 1, "global_batch", 2),
            {"recompute": "block", "loss_chunk_size": 24, "tie_embeddings": True},
            {
                "router": "top_k",
                "balance": {"bias_update": "sign", "bias_update_rate": 0.01},
                "zero_options": {"stage3_param_persistence_threshold": 0},
            },
        ),
        (
            *(2, 3, 2, "batch", 1, {"tie_embeddings": True, "loss_chunk_size": 24}),
            {"precision": "bf16"},
        ),
        (
            *(2, 2, 1, "batch", 1, {"num_kv_heads": 4, "qk_norm": "none"}),
            {"attention": LATENT, "router": "top_p", "balance": {"bias_update": "quantile"}},
        ),
    )
]


# Muon under every stage, of whole and of cut matrices, beside AdamW for the rest. In fp32, since
# Newton-Schulz raises the rounding of the gradient's smallest singular values to size.
def muon(ep: int, zero: int, accumulation: int = 1, **more) -> dict:
    optim = {"optimizer": "muon", "orthogonalize_dtype": "fp32", **more.pop("optim", {})}
    return {
        "ep": ep,
        "zero": zero,
        "accumulation": accumulation,
        "clip": 0.5,
        "scope": "batch",
        "optim": optim,
        **more,
    }


# Groups of parameters by their role, each with its learning rate, decay and epsilon.
MUP = {"init": "mup", "mup_base_hidden_size": 4, "mup_base_num_layers": 1, "tie_embeddings": True}
MUON = [muon(2, 0), muon(2, 1, 2), muon(1, 2, model=MUP), muon(2, 3)]
MUON_NIGHTLY = [
    *(muon(1, 0), muon(1, 1, 2), muon(2, 2, 2), muon(1, 3, 2)),
    muon(2, 2, zero_options={"offload_optimizer": {"device": "cpu"}}),
    muon(2, 3, zero_options={"offload_optimizer": {"device": "cpu"}}),
    muon(2, 3, zero_options={"stage3_param_persistence_threshold": 0, "sub_group_size": 700}),
    muon(2, 3, lent=1, router="top_p", dispatcher={"num_chunks": 2}),
    muon(2, 2, optim={"nesterov": False, "momentum": 0.8}, model={"num_mtp_layers": 1}),
    *(muon(2, zero, model=MUP, optim={"optimizer": "adamw"}) for zero in (0, 1, 3)),
    muon(2, 3, 2, model={**MUP, "tie_embeddings": False}),
    muon(2, 1, precision="bf16", optim={"orthogonalize_dtype": "bf16"}),
    muon(2, 3, precision="bf16", optim={"orthogonalize_dtype": "bf16"}),
]


# muP's first weights and the random logits of routers' first steps, however the work is shared out.
MUP, RANDOM = {"init": "mup", "mup_base_hidden_size": 8}, {"random_routing_steps": 4}
FIRST_STEPS = [
    {"ep": 1, "zero": 1, "accumulation": 1, "clip": 0.5, "scope": "batch", "steps": 3, **case}
    for case in (
        {"tp": 2, "model": MUP},
        {"tp": 2, "ep": 2, "zero": 3, "balance": RANDOM},
        {"cp": 2, "balance": RANDOM},
        {"pp": 2, "balance": RANDOM, "model": MUP},
        {"ep": 2, "zero": 3, "balance": RANDOM, "model": MUP, "accumulation": 2},
    )
]


# How rows travel, who serves which expert, and what is kept for backward.
DISPATCHES = [
    {
        "ep": ep,
        "zero": zero,
        "accumulation": accumulation,
        "clip": 0.5,
        "scope": "batch",
        "router": router,
        "dispatcher": dispatcher,
        **more,
    }
    for ep, router, dispatcher, more in (
        (2, "top_p", {"num_chunks": 2}, {"lent": 1}),
        (2, "capacity", {"num_chunks": 3, "buffer_factor": 8.0}, {"experts": {"recompute": True}}),
        (2, "threshold", {"buffer_factor": 2.0}, {"lent": 0, "model": {"recompute": "block"}}),
        (2, "top_k", {}, {"lent": 2, "experts": {"backend": "grouped_mm"}}),
    )
    for zero, accumulation in ((1, 2), (3, 1))
]
NODES = [
    {
        "ep": 4,
        "zero": 2,
        "accumulation": 1,
        "clip": 0.5,
        "scope": "batch",
        "router": "top_p",
        "ranks_per_node": 2,
        "dispatcher": dispatcher,
        "lent": 1,
    }
    for dispatcher in ({"num_chunks": 2}, {"buffer_factor": 4.0})
]


# With 32 experts and 64 assignments a rank, some experts get no token on one of their two replicas:
# their gradient must still exist there, or the reduction over the replicas waits for ever.
STARVED = [
    {
        "ep": 2,
        "zero": zero,
        "accumulation": 1,
        "clip": 0.5,
        "scope": "batch",
        "model": {"num_experts": 32},
    }
    for zero in (0, 1, 2, 3)
]


def in_turn(cases: list[dict]) -> list[dict]:
    """Half of cases that come in pairs of one thing under two layouts: of the first the first
    layout, of the second the second, and so on. Nightly all run.
    """
    return [case for i, case in enumerate(cases) if (i // 2 + i) % 2 == 0]


def every(*lists: list[dict]) -> list[dict]:
    return [case for cases in lists for case in cases]


def check(rows: list[dict], cases: list[dict]) -> None:
    assert [r["case"] for r in rows] == cases
    wrong = []
    for row in rows:
        tolerance = BF16_TOLERANCE if row["case"].get("precision") == "bf16" else FP32_TOLERANCE
        if tolerance is BF16_TOLERANCE and row["case"].get("optim"):
            # what bf16 rounds in a gradient is a part of its small singular values, made large
            tolerance = {**tolerance, "parameter": 3e-2}
        tolerance = {**tolerance, **row["case"].get("tolerance", {})}
        wrong += [
            (row["case"], name, error)
            for name, error in row["errors"].items()
            if not error <= tolerance[name]
        ]
    assert not wrong, "\n".join(map(str, wrong))


def compared(run_ranks, world_size: int, cases: list[dict]) -> None:
    check(run_ranks("distributed/parity_worker.py", world_size, json.dumps(cases)), cases)


@pytest.mark.slow
def test_two_ranks_train_as_one_process(run_ranks):
    compared(run_ranks, 2, matrix((1, 2)))


@pytest.mark.slow
def test_four_ranks_train_as_one_process(run_ranks):
    controllers = [{**case, "ep": 4, "zero": 2} for case in ROUTERS[::8]]
    cases = [case for case in matrix((2, 4)) if (case["ep"] == 4) == (case["zero"] in (1, 3))]
    compared(run_ranks, 4, [*cases, *STARVED[1::2], *NODES[:1], *controllers])


@pytest.mark.slow
def test_variants_train_as_one_process(run_ranks):
    compared(run_ranks, 2, [VARIANTS[i] for i in (0, 3, 4, 6, 8, 9, 11, 13, 16)])


@pytest.mark.slow
def test_every_dispatch_trains_as_one_process(run_ranks):
    compared(run_ranks, 2, in_turn(DISPATCHES))


@pytest.mark.slow
def test_sparse_attention_trains_as_one_process(run_ranks):
    compared(run_ranks, 2, in_turn(ATTENTIONS))


@pytest.mark.nightly
def test_attention_by_an_index_trains_as_one_process(run_ranks):
    check(run_ranks("distributed/parity_worker.py", 2, json.dumps(INDEXES)), INDEXES)


@pytest.mark.nightly
def test_compressed_attention_trains_as_one_process(run_ranks):
    check(run_ranks("distributed/parity_worker.py", 2, json.dumps(COMPRESSED)), COMPRESSED)


@pytest.mark.slow
def test_latent_attention_trains_as_one_process(run_ranks):
    compared(run_ranks, 2, LATENTS[1:4])


@pytest.mark.slow
def test_multi_token_prediction_trains_as_one_process(run_ranks):
    compared(run_ranks, 2, PREDICTIONS[1::2])


@pytest.mark.slow
def test_muon_trains_as_one_process(run_ranks):
    compared(run_ranks, 2, MUON[1::2])


@pytest.mark.nightly
def test_muon_under_every_layout_trains_as_one_process(run_ranks):
    compared(run_ranks, 2, MUON + MUON_NIGHTLY)


@pytest.mark.nightly
def test_muon_on_four_ranks_trains_as_one_process(run_ranks):
    compared(run_ranks, 4, [muon(ep, zero) for ep in (2, 4) for zero in (0, 1, 2, 3)])


@pytest.mark.nightly
def test_eight_ranks_route_and_train_as_one_process(run_ranks):
    compared(run_ranks, 8, [{**ROUTERS[2], "ep": 8}])


@pytest.mark.slow
def test_routers_with_controllers_train_as_one_process(run_ranks):
    compared(run_ranks, 2, in_turn(ROUTERS))


@pytest.mark.nightly
def test_first_weights_and_first_steps_are_those_of_one_process_under_every_layout(run_ranks):
    compared(run_ranks, 2, FIRST_STEPS)


@pytest.mark.nightly
def test_every_variant_trains_as_one_process(run_ranks):
    compared(run_ranks, 2, every(VARIANTS, DISPATCHES, ATTENTIONS, LATENTS, PREDICTIONS, ROUTERS))


@pytest.mark.nightly
def test_every_case_of_four_ranks_trains_as_one_process(run_ranks):
    controllers = [{**case, "ep": 4, "zero": 2} for case in ROUTERS[::2]]
    compared(run_ranks, 4, every(STARVED, NODES, controllers))


@pytest.mark.nightly
@pytest.mark.parametrize(("world_size", "expert_sizes"), [(2, (1, 2)), (4, (2, 4))])
def test_every_combination_trains_as_one_process(run_ranks, world_size, expert_sizes):
    compared(run_ranks, world_size, matrix(expert_sizes, whole=True))
