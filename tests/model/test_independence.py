"""Outside of training nothing depends on the batch: a token's loss is its own text's, and later
tokens never change it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from common import (
    COMPRESSED,
    COMPRESSED_SHAPE,
    LATENT,
    LATENT_SHAPE,
    SHARED,
    VOCAB_SIZE,
    batch,
    tiny_config,
)

from model.attention.config.base import AttentionConfig
from model.attention.config.compressed import CompressedAttentionConfig
from model.attention.config.dense import DenseAttentionConfig
from model.attention.config.indexed import IndexedAttentionConfig
from model.attention.config.latent import MlaConfig
from model.attention.config.sparse import SparseAttentionConfig
from model.attention.config.windowed import WindowedAttentionConfig
from model.config import BalanceConfig, BudgetConfig, ExpertsConfig, FailSafeConfig
from model.dispatch.config import AllToAllConfig, DispatcherConfig, LocalDispatcherConfig
from model.generate import generate
from model.moe.balance import pack_stats, unpack_stats
from model.moe.budget import start_routers, update_routers
from model.moe.layer import ModelParts
from model.request import ForwardRequest, TokenBatch
from model.routers.base import Router, RoutingRequest
from model.routers.config import (
    ExpertChoiceConfig,
    NullExpertsConfig,
    ReLUConfig,
    RouterConfig,
    ThresholdConfig,
    TopKConfig,
    TopPConfig,
)
from model.transformer import Transformer
from ops.router import Reason, RouterOutput
from train.config.component import KINDS as RECORDS
from train.data.loader import Batch, pack
from train.trained.evaluate import evaluate, one_by_one

pytestmark = [pytest.mark.slow]  # seconds of a core

LENGTH, ROWS = 32, 13
# Every router with all that bounds an expert's load; each name is a test.
ROUTERS: dict[str, tuple[type[RouterConfig], dict]] = {
    "top_k": (TopKConfig, dict(top_k=2, capacity_factor=1.0)),
    "top_k, little capacity": (TopKConfig, dict(top_k=2, capacity_factor=0.1)),
    "top_k raw": (TopKConfig, dict(top_k=3, normalize_weights=False, capacity_factor=0.5)),
    "sigmoid": (
        TopKConfig,
        dict(top_k=2, score_function="sigmoid", scaling_factor=2.5, capacity_factor=1.0),
    ),
    "sqrt_softplus": (
        TopKConfig,
        dict(top_k=2, score_function="sqrt_softplus", capacity_factor=1.0),
    ),
    "group_limited": (TopKConfig, dict(top_k=2, num_groups=4, top_groups=2, capacity_factor=1.0)),
    "top_p": (TopPConfig, dict(budget=2.0, capacity_factor=1.0)),
    "threshold": (ThresholdConfig, dict(budget=2.0, capacity_factor=1.0)),
    "relu": (ReLUConfig, dict(budget=2.0, capacity_factor=1.0)),
    "null_experts": (NullExpertsConfig, dict(num_null_experts=8, budget=2.0, capacity_factor=1.0)),
    "expert_choice": (ExpertChoiceConfig, dict(top_k=2)),
    "expert_choice, capped": (
        ExpertChoiceConfig,
        dict(top_k=2, max_experts=3, min_experts=1, normalize_weights=True),
    ),
}
DISPATCHERS = {"local": LocalDispatcherConfig(), "all_to_all": AllToAllConfig()}
SMALL = {"block_size": 4, "coarse_block_size": 2, "top_k": 2, "window_size": 4, "audit_rows": 0.5}
SPARSE: dict[str, dict] = {
    "scc": SMALL,
    "drop": {**SMALL, "tail": "drop", "order": 0},
    "nsa": {**SMALL, "merge": "gated"},
    "sliding_window": {**SMALL, "tail": "drop", "top_k": 0, "num_sink_blocks": 0},
    "learned": {**SMALL, "offset": True, "trust": True, "sink": True, "entries": "gated"},
    "noisy": {**SMALL, "noise_steps": 100, "temperature": 4.0, "min_top_k": 0},
    "covering": {**SMALL, "top_p": 0.7},
    "dense so far": {**SMALL, "dense_steps": 100},
    "regularised": {**SMALL, "mass_kl_coeff": 0.1},
    "one pass": {**SMALL, "rank_lse": "super", "fanout": 2},
    "two levels": {**SMALL, "num_levels": 2, "fanout": 2, "num_expanded": 1},
    "mixed": {**SMALL, "dense_layers": (0,), "min_sparse_length": 12},
    "max": {**SMALL, "score": "max"},
    "error_gain": {**SMALL, "score": "error_gain"},
    "index": {**SMALL, "select": "index", "index_head_dim": 4},
    "followed index": {**SMALL, "select": "index", "index_layers": 2, "entries": "gated"},
    "index so far": {**SMALL, "select": "index", "index_steps": 100},
}
ATTENTIONS: dict[str, AttentionConfig] = {
    "dense": DenseAttentionConfig(),
    "windowed": WindowedAttentionConfig(window=4, sinks=True),
    "mla": MlaConfig(**LATENT),
    "dsa": IndexedAttentionConfig(top_k=6, index_heads=2, index_head_dim=8, dense_steps=0),
    "msa": IndexedAttentionConfig(rule="msa", block_size=4, top_k=2, dense_steps=0),
    "qsa": IndexedAttentionConfig(rule="qsa", block_size=2, top_k=3, dense_steps=0),
    "compressed": CompressedAttentionConfig(
        **COMPRESSED, dense_steps=0, layer_kinds=("window", "hca", "csa")
    ),
    "csa2": CompressedAttentionConfig(**SHARED, dense_steps=0),
    **{name: SparseAttentionConfig(**arguments) for name, arguments in SPARSE.items()},
}
SHAPES: dict[str, dict] = {
    "mla": LATENT_SHAPE,
    "compressed": COMPRESSED_SHAPE,
    "csa2": COMPRESSED_SHAPE,
}
"""Of the model, where an attention asks for another."""


def trained(
    router: str = "top_k", attention: str = "dense", dispatcher: str = "all_to_all"
) -> Transformer:
    """A tiny model after two steps of its controllers, in evaluation; its experts are rounded to
    tiles in training.
    """
    kind, options = ROUTERS[router]
    balance = BalanceConfig()
    parts = ModelParts(
        kind(**options),
        ATTENTIONS[attention],
        DISPATCHERS[dispatcher],
        balance,
        ExpertsConfig(token_rounding=4),
    )
    model = Transformer(tiny_config(init_std=0.3, **SHAPES.get(attention, {})), parts, None, 7)
    routers = model.routers()
    start_routers(routers, BudgetConfig(warm_start_steps=0), FailSafeConfig())
    model.set_step(1)
    for step in range(2):
        full = batch(step, 0, 8, LENGTH)
        starts = (full["positions"].flatten() == 0).nonzero().flatten()
        ends = torch.cat((starts, torch.tensor([full["positions"].numel()]))).int()
        output = model.train()(
            TokenBatch(**full, cu_seqlens=ends, max_seqlen=int(ends.diff().max()))
        )
        stats = unpack_stats(output.stats, routers[0].spec.num_experts, routers[0].max_top_k)
        update_routers(routers, stats, balance, BudgetConfig(), FailSafeConfig())
    for one in routers:  # as after steps in which a rank had too much to do
        one.router_inputs.limit.fill_(1.0)
    return model.eval()


def texts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, VOCAB_SIZE, LENGTH + 1) for _ in range(ROWS)]


def batches(size: int) -> list[Batch]:
    return [pack(texts()[at : at + size], LENGTH, 0) for at in range(0, ROWS, size)]


@torch.no_grad()
def losses(model: Transformer, size: int) -> torch.Tensor:
    """[ROWS, LENGTH] nats of every token when so many rows are evaluated at a time."""
    found = [
        model(b.inputs(torch.device("cpu")), ForwardRequest(keep_routing=True))
        for b in batches(size)
    ]
    return torch.cat([output.token_losses for output in found])


def held_out_loss(model: Transformer, size: int) -> float:
    found = evaluate(one_by_one(model), batches(size), torch.device("cpu"), model.routers())
    return found["val_loss"]


def check(model: Transformer) -> None:
    alone = losses(model, 1)
    for size in (4, ROWS):
        torch.testing.assert_close(losses(model, size), alone, rtol=1e-4, atol=1e-5)
    means = [held_out_loss(model, size) for size in (1, 4, ROWS)]
    assert max(means) - min(means) < 1e-5

    ids = torch.from_numpy(np.stack(texts()[:3]))[:, :LENGTH]
    other = ids.clone()
    other[:, -1] = ids[:, -1] % (VOCAB_SIZE - 2) + 1
    with torch.no_grad():
        before, after = model.logits(ids), model.logits(other)
        assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(
            before[:, -1], after[:, -1]
        )
        cut = model.logits(ids[:, :11])  # without the tokens to come at all
        torch.testing.assert_close(cut, before[:, :11], rtol=1e-4, atol=1e-5)

    prompt = ids[0, :9].tolist()
    text, expected = list(generate(model, prompt, 8, temperature=0)), list(prompt)
    with torch.no_grad():
        for _ in range(8):
            expected.append(int(model.logits(torch.tensor([expected]))[0, -1].argmax()))
    assert text == expected[9:]


def test_every_component_that_a_config_can_name_is_tried():
    kinds = {kind for kind, _ in ROUTERS.values()}
    assert kinds == set(RECORDS[RouterConfig].values())
    assert {type(record) for record in DISPATCHERS.values()} == set(
        RECORDS[DispatcherConfig].values()
    )
    assert {type(record) for record in ATTENTIONS.values()} == set(
        RECORDS[AttentionConfig].values()
    )


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_evaluation_and_generation_are_causal_and_know_no_batch(router, dispatcher):
    check(trained(router, dispatcher=dispatcher))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_so_are_they_with_every_attention(attention):
    check(trained(attention=attention))


def test_a_capacity_acts_in_training_alone():
    model = trained("top_k, little capacity")
    hidden = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    router = model.routers()[0]
    router.router_inputs.limit.fill_(2.0)
    assert int(router(hidden).counts.sum()) == 128 and not router(hidden).overflow.any()
    router.train()
    assert int(router(hidden).counts.max()) <= math.ceil(0.1 * 2 * 64 / 8)


def test_a_limit_for_overloaded_ranks_acts_in_training_alone():
    model = trained("top_p")
    hidden = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    router = model.routers()[0]
    assert int((router(hidden).expert_ids >= 0).sum(1).max()) > 1
    assert int((router.train()(hidden).expert_ids >= 0).sum(1).max()) == 1
    reasons = unpack_stats(
        model.eval()(pack(texts(), LENGTH, 0).inputs(torch.device("cpu"))).stats,
        8,
        router.max_top_k,
    ).reasons
    assert int(reasons[:, Reason.OVERLOADED.bit].sum()) == 0


def test_expert_choice_keeps_its_budget_by_the_cuts_it_has_learnt():
    """In training each expert takes its share of a micro-batch; outside, what scores above the
    running mean of its cuts.
    """
    config = tiny_config()
    router = ExpertChoiceConfig(top_k=2, max_experts=8).build(config)
    torch.nn.init.normal_(router.weight, 0.0, 0.5, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    router.prepare_histogram(256)
    for _ in range(20):
        output = router(torch.randn(512, 16, generator=generator), RoutingRequest(num_bins=256))
        assert output.counts.sum(0).tolist() == [128] * 8
        learn(router, output)
    counts = router.eval()(torch.randn(8192, 16, generator=generator)).counts.sum(0)
    assert float(counts.sum()) / 8192 == pytest.approx(2.0, rel=0.03)
    assert float((counts / counts.float().mean() - 1).abs().max()) < 0.1


def learn(router: Router, output: RouterOutput) -> None:
    stats = pack_stats(output, torch.tensor(False)).unsqueeze(0)
    update_routers(
        [router],
        unpack_stats(stats, router.spec.num_experts, router.max_top_k),
        BalanceConfig(),
        BudgetConfig(),
        FailSafeConfig(),
    )


@pytest.mark.parametrize("min_experts", [0, 1])
def test_without_a_learnt_cut_expert_choice_is_plain_top_k_and_says_so(min_experts):
    """Before the first step, and from a checkpoint of a router that has no cuts: not the whole set
    of experts.
    """
    router = ExpertChoiceConfig(top_k=2, min_experts=min_experts).build(tiny_config()).eval()
    plain = TopKConfig(top_k=2).build(tiny_config()).eval()
    torch.nn.init.normal_(router.weight, 0.0, 0.5, generator=torch.Generator().manual_seed(0))
    plain.load_state_dict({"weight": router.weight}, strict=False)
    hidden = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    found = router(hidden)
    assert (
        torch.equal(found.expert_ids[:, :2], plain(hidden).expert_ids)
        and (found.expert_ids[:, 2:] == -1).all()
    )
    assert int(found.reason_counts[Reason.OVERRIDDEN.bit]) == 50
    router.balance_bias.fill_(-0.3)
    assert int(router(hidden).reason_counts[Reason.OVERRIDDEN.bit]) == 0


def test_a_learnt_cut_is_saved_with_the_model():
    router = ExpertChoiceConfig(top_k=2).build(tiny_config())
    router.balance_bias.fill_(-0.25)
    other = ExpertChoiceConfig(top_k=2).build(tiny_config())
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.balance_bias, router.balance_bias)


def test_a_model_that_is_in_training_is_not_evaluated():
    model = trained().train()
    with pytest.raises(ValueError, match=r"in training mode.*call eval\(\) first"):
        held_out_loss(model, ROWS)
