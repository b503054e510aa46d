"""Upcycling: a mixture of experts that is made of a dense model computes the same before its first
step, whatever the router, the shards, and the ranks.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from model.attention.config.dense import DenseAttentionConfig
from model.attention.config.indexed import IndexedAttentionConfig
from model.config import BalanceConfig, BudgetConfig, FailSafeConfig, ModelConfig, RopeScaling
from model.dispatch.config import AllToAllConfig, LocalDispatcherConfig
from model.moe.budget import start_routers
from model.moe.layer import ModelParts
from model.parallel.groups import ParallelGroups
from model.routers.config import ROUTERS, TopKConfig
from model.transformer import Transformer
from tests.published import ours, published
from train.config.upcycling import UpcycleConfig, upcycling_problems
from train.pretrained.folder import PretrainedFolder
from train.pretrained.shards import PretrainedError
from train.pretrained.upcycle import UpcycledWeights

IDS = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published("llama", tmp_path_factory.mktemp("dense") / "llama", torch.float32)


def config_of(dense: PretrainedFolder, upcycle: UpcycleConfig, router, seed: int = 7, **shape):
    model = ModelConfig(**(upcycle.shape(dense.reading.model) | shape))
    return SimpleNamespace(
        model=model, router=router, seed=seed, init=SimpleNamespace(upcycle=upcycle)
    )


def made(folder, upcycle: UpcycleConfig, router=None, groups=None, **shape) -> Transformer:
    """The mixture of a folder's dense model, of which no number was left over."""
    dense = PretrainedFolder(folder)
    config = config_of(dense, upcycle, router or TopKConfig(top_k=upcycle.top_k), **shape)
    dispatcher = LocalDispatcherConfig() if groups is None else AllToAllConfig()
    parts = ModelParts(config.router, DenseAttentionConfig(), dispatcher, BalanceConfig())
    model = Transformer(config.model, parts, groups)
    start_routers(model.routers(), BudgetConfig(), FailSafeConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    UpcycledWeights(dense, config).fill_model(model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return model.eval()


def logits_of_dense(folder) -> torch.Tensor:
    with torch.no_grad():
        return ours(PretrainedFolder(folder)).logits(IDS)


ROUTER_CASES = {
    "softmax": TopKConfig(top_k=4),
    "sigmoid, scaled": TopKConfig(top_k=4, score_function="sigmoid", scaling_factor=2.5),
    "top_p": ROUTERS["top_p"](budget=4.0),
    "threshold": ROUTERS["threshold"](budget=4.0, normalize_weights=True),
}


@pytest.mark.parametrize("router", ROUTER_CASES)
@pytest.mark.parametrize(
    "shards",
    [
        dict(granularity=1),
        dict(granularity=2),
        dict(granularity=4),
        dict(granularity=3, num_shared_experts=1),
        dict(granularity=6, num_shared_experts=2),
    ],
    ids=str,
)
def test_logits_are_those_of_the_dense_model(folder, shards, router):
    upcycle = UpcycleConfig(num_experts=8, top_k=4, **shards)
    model = made(folder, upcycle, ROUTER_CASES[router])
    with torch.no_grad():
        torch.testing.assert_close(model.logits(IDS), logits_of_dense(folder), rtol=2e-5, atol=2e-5)
    # Tokens visit different experts, or nothing could part.
    chosen = model.blocks[0].mlp.router.weight
    assert len(chosen.unique(dim=0)) == 8 // upcycle.num_routed_shards


def test_layers_that_stay_dense_and_every_dense_family(tmp_path):
    for case in ("llama tied, biased, wide heads", "qwen2", "qwen3 with yarn"):
        folder = published(case, tmp_path / case.split()[0], torch.float32, num_hidden_layers=3)
        upcycle = UpcycleConfig(num_experts=4, top_k=2, granularity=2)
        reading = PretrainedFolder(folder).reading
        rope = reading.model["rope_scaling"]
        scaling = None if rope is None else RopeScaling(**rope)
        model = made(folder, upcycle, num_dense_layers=1, rope_scaling=scaling)
        assert len(model.moe_layers()) == 2
        with torch.no_grad():
            torch.testing.assert_close(
                model.logits(IDS), logits_of_dense(folder), rtol=2e-5, atol=2e-5
            )


def test_router_rows_that_a_group_does_not_share_change_the_function(folder):
    """The rule that the rows of a virtual group are equal is needed."""
    model = made(folder, UpcycleConfig(num_experts=8, top_k=2, granularity=2))
    expected = logits_of_dense(folder)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(IDS), expected, rtol=2e-5, atol=2e-5)
        for router in model.routers():
            router.weight.copy_(0.1 * torch.randn_like(router.weight))
        assert float((model.logits(IDS) - expected).abs().max()) > 0.05


def test_masters_of_what_the_dense_model_does_not_have_stay_as_they_are_drawn(folder):
    """An index of attention is new, and its master weights are no leftovers of memory."""
    upcycle = UpcycleConfig(num_experts=4, top_k=2)
    dense = PretrainedFolder(folder)
    config = config_of(dense, upcycle, TopKConfig(top_k=2))
    attention = IndexedAttentionConfig(rule="msa", block_size=4)
    parts = ModelParts(config.router, attention, LocalDispatcherConfig(), BalanceConfig())
    model = Transformer(config.model, parts)
    masters: dict[str, torch.Tensor] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    UpcycledWeights(dense, config).fill_masters(
        SimpleNamespace(
            module=model,
            named_parameters=model.named_parameters,
            parameter_shape=lambda parameter: parameter.shape,
            prepare_scatter=lambda step: None,
            scatter_state=lambda parameter, _, value: masters.update({names[parameter]: value}),
            finish_scatter=lambda: None,
        )
    )
    drawn = {name for name in names.values() if ".attention.indexer." in name}
    assert drawn and set(masters) == set(names.values()) - drawn


def test_every_rank_makes_its_own_experts(folder):
    """Of the same numbers as one process, drawn anew or not, and by global expert."""
    upcycle = UpcycleConfig(num_experts=8, top_k=2, granularity=2, reinit_ratio=0.5)
    whole = made(folder, upcycle)

    for rank in range(2):
        groups = dataclasses.replace(ParallelGroups.single(), expert_size=2, expert_rank=rank)
        model = made(folder, upcycle, groups=groups)
        for (name, mine), (_, all_of) in zip(
            model.named_parameters(), whole.named_parameters(), strict=True
        ):
            expected = all_of[4 * rank : 4 * rank + 4] if ".experts." in name else all_of
            assert torch.equal(mine, expected), name


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_a_share_of_each_expert_is_drawn_anew_in_gate_up_and_down_together(folder, ratio):
    plain = UpcycleConfig(num_experts=4, top_k=2, granularity=2)
    before = dict(made(folder, plain).named_parameters())
    after = dict(made(folder, dataclasses.replace(plain, reinit_ratio=ratio)).named_parameters())
    width, name = 24, "blocks.0.mlp.experts"
    columns = []
    for expert in range(4):
        moved = before[f"{name}.down"][expert] != after[f"{name}.down"][expert]
        columns.append(moved.all(0))
        rows = (before[f"{name}.gate_up"][expert] != after[f"{name}.gate_up"][expert]).all(1)
        assert torch.equal(moved.any(0), moved.all(0))
        assert torch.equal(rows, torch.cat((moved.all(0), moved.all(0))))
        assert int(moved.all(0).sum()) == round(ratio * width)
        # From the distribution of what stood there.
        for part in ("gate_up", "down"):
            old, new = before[f"{name}.{part}"][expert], after[f"{name}.{part}"][expert]
            assert float(new.std()) == pytest.approx(float(old.std()), rel=0.2)
    assert ratio == 1 or not torch.equal(columns[0], columns[2])
    for key in ("blocks.0.mlp.router.weight", "embedding.weight"):
        assert torch.equal(before[key], after[key])


@pytest.mark.parametrize(
    ("upcycle", "router", "said"),
    [
        (dict(granularity=3), TopKConfig(top_k=2), "is no multiple of the 3 shards"),
        (dict(granularity=2, num_shared_experts=2), TopKConfig(top_k=2), "between 0 and"),
        (dict(), TopKConfig(top_k=2, normalize_weights=False), "add router.normalize_weights"),
        (dict(), ROUTERS["relu"](budget=2.0), "gates have no fixed sum"),
        (dict(granularity=2), ROUTERS["top_p"](budget=1.4), "whole virtual groups of 2"),
        (dict(granularity=2), TopKConfig(top_k=3), "set init.upcycle.top_k instead"),
        (
            dict(granularity=2),
            TopKConfig(top_k=2, num_groups=4, top_groups=2),
            "router.num_groups 4",
        ),
        (dict(reinit_ratio=1.5), TopKConfig(top_k=2), "must be from 0 to 1"),
        (dict(top_k=9), TopKConfig(top_k=2), "is above init.upcycle.num_experts"),
    ],
)
def test_what_would_not_keep_the_function_is_refused(folder, upcycle, router, said):
    settings = UpcycleConfig(num_experts=8, **upcycle)
    shape = dataclasses.asdict(
        ModelConfig(
            **PretrainedFolder(folder).reading.model
            | {"num_experts": 8, "top_k": 2, "expert_intermediate_size": 24}
        )
    )
    model = ModelConfig(**shape)
    found = settings.problems() + upcycling_problems(settings, model, router, 50)
    assert any(said in problem for problem in found), found


def test_weights_that_are_not_those_of_the_shape_are_refused(folder, tmp_path):
    upcycle = UpcycleConfig(num_experts=4, top_k=2)
    with pytest.raises(ValueError, match="does not divide the width 48"):
        dataclasses.replace(upcycle, granularity=5).shape(PretrainedFolder(folder).reading.model)
    mixture = PretrainedFolder(published("mixtral", tmp_path / "mixtral"))
    with pytest.raises(ValueError, match="have 8 experts"):
        upcycle.shape(mixture.reading.model)
    with pytest.raises(PretrainedError, match="is another model"):
        made(folder, upcycle, num_kv_heads=4)
