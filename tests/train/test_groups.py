"""optim.groups and optim.freeze: which parameters get which learning rate and weight decay."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.attention.config.dense import DenseAttentionConfig
from model.config import BalanceConfig, ModelConfig
from model.dispatch.config import LocalDispatcherConfig
from model.routers.config import TopKConfig
from model.transformer import ModelParts, Transformer
from train.config.kinds import KINDS, kind_of
from train.config.training import GroupConfig, OptimConfig, TrainConfig
from train.engine.optimizer import freeze, parameter_groups, trained_by_kind
from train.engine.schedule import Schedule

SHAPE = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=32,
    num_experts=4,
    expert_intermediate_size=8,
    max_seq_len=16,
    num_dense_layers=1,
    num_shared_experts=1,
    qk_norm="head",
)
PARTS = ModelParts(
    TopKConfig(top_k=2), DenseAttentionConfig(), LocalDispatcherConfig(), BalanceConfig()
)
OPTIM = OptimConfig(lr=0.1, min_lr=0.01, warmup_steps=4, weight_decay=0.2)


def model() -> Transformer:
    return Transformer(SHAPE, PARTS)


def by_name(ours: Transformer, groups: list[dict]) -> dict[str, dict]:
    names = {id(p): name for name, p in ours.named_parameters()}
    found = [(names[id(p)], group) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def test_every_parameter_of_a_model_has_a_kind():
    found = {name: kind_of(name) for name, _ in model().named_parameters()}
    assert set(found.values()) == set(KINDS) - {"lora", "indexer"}
    assert found["blocks.1.attention.q_norm.weight"] == found["norm.weight"] == "norms"
    assert found["blocks.0.mlp.gate_up.weight"] == "mlp"
    assert found["blocks.2.mlp.shared.down.weight"] == "shared_experts"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learning_rates_fall_from_layer_to_layer(optimizer):
    """0.5 per layer below the head, times the factor of a rule, at every step of the schedule."""
    ours = model()
    optim = dataclasses.replace(
        OPTIM,
        optimizer=optimizer,
        layer_lr_decay=0.5,
        groups=(GroupConfig("norms", lr_factor=3.0),),
    )
    groups = parameter_groups(ours, optim, "ep")
    train = TrainConfig(num_steps=9, seq_len=8, micro_batch_size=1, global_batch_size=1)
    found = by_name(ours, groups)
    assert len(found) == len(dict(ours.named_parameters()))
    usual = Schedule([{"lr": 0.0, "weight_decay": 0.0}], OPTIM, train, 1)
    schedule = Schedule(groups, optim, train, 1)
    for step in (0, 3, 7):
        schedule.set_step(step)
        usual.set_step(step)
        assert schedule.learning_rate == pytest.approx(usual.learning_rate)
        for name, group in found.items():
            layer = int(name.split(".")[1]) if name.startswith("blocks.") else -1
            below = {"embedding.weight": 4, "norm.weight": 0, "head.weight": 0}.get(name, 3 - layer)
            factor = 0.5**below * (3.0 if kind_of(name) == "norms" else 1.0)
            assert group["lr"] == pytest.approx(usual.learning_rate * factor), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_routers_rate_rises_by_itself_on_top_of_everybodys(optimizer):
    ours = model()
    optim = dataclasses.replace(
        OPTIM,
        optimizer=optimizer,
        router_warmup_steps=6,
        groups=(GroupConfig("router", lr_factor=2.0), GroupConfig("norms", lr_factor=3.0)),
    )
    groups = parameter_groups(ours, optim, "ep")
    train = TrainConfig(num_steps=20, seq_len=8, micro_batch_size=1, global_batch_size=1)
    found = by_name(ours, groups)
    usual = Schedule([{"lr": 0.0, "weight_decay": 0.0}], OPTIM, train, 1)
    schedule = Schedule(groups, optim, train, 1)
    for step in (0, 3, 5, 6, 12, 2):  # also back, as a resumed run may
        schedule.set_step(step)
        usual.set_step(step)
        assert schedule.learning_rate == pytest.approx(usual.learning_rate)
        for name, group in found.items():
            rule = {"router": 2.0, "norms": 3.0}.get(kind_of(name), 1.0)
            rise = min(1.0, (step + 1) / 6) if kind_of(name) == "router" else 1.0
            assert group["lr"] == pytest.approx(usual.learning_rate * rule * rise), name


def test_routers_alone_do_not_hide_the_learning_rate():
    """The first group says it, whichever that is."""
    ours = model()
    kinds = set(map(kind_of, dict(ours.named_parameters()))) - {"router"}
    freeze(ours, tuple(kinds))
    optim = dataclasses.replace(OPTIM, router_warmup_steps=50, warmup_steps=0)
    groups = parameter_groups(ours, optim, "ep")
    schedule = Schedule(groups, optim, TrainConfig(100, 8, 1, 1), 1)
    schedule.set_step(4)
    assert groups[0]["lr"] == pytest.approx(schedule.learning_rate / 10)


def test_without_rules_the_groups_are_matrices_vectors_and_experts():
    ours = model()
    groups = parameter_groups(ours, OPTIM, "ep_size_1")
    assert [(g["name"], g["weight_decay"], g["wd_mult"]) for g in groups] == [
        ("dense", 0.2, 1.0),
        ("dense_no_decay", 0.0, 0.0),
        ("ep_size_1", 0.2, 1.0),
    ]
    assert len(by_name(ours, groups)) == len(list(ours.parameters()))


def test_the_first_rule_that_matches_holds_and_the_rest_keep_the_usual_settings():
    ours = model()
    rules = (GroupConfig("blocks.0.*", 0.5), GroupConfig("norms", 2.0, 0.3), GroupConfig("experts"))
    optim = dataclasses.replace(OPTIM, groups=rules)
    groups = parameter_groups(ours, optim, "ep_size_1")
    found = by_name(ours, groups)
    schedule = Schedule(groups, optim, TrainConfig(100, 16, 1, 4), 1)
    for step in (0, 3, 50, 99):
        schedule.set_step(step)
        base = found["embedding.weight"]["lr"]
        assert schedule.learning_rate == pytest.approx(base)
        for name, factor, decay in (
            ("blocks.0.attention.q_proj.weight", 0.5, 0.2),
            ("blocks.0.attention_norm.weight", 0.5, 0.0),
            ("blocks.1.attention_norm.weight", 2.0, 0.3),
            ("blocks.1.mlp.experts.down", 1.0, 0.2),
            ("blocks.1.mlp.router.weight", 1.0, 0.2),
            ("norm.weight", 2.0, 0.3),
        ):
            assert found[name]["lr"] == pytest.approx(base * factor)
            assert found[name]["weight_decay"] == pytest.approx(decay)
    assert found["blocks.2.mlp.experts.down"]["moe"] and base == pytest.approx(0.01)


def test_a_rule_may_be_about_a_kind_in_some_layers():
    ours = model()
    rules = (GroupConfig("experts", 0.5, layers=(2, 2)), GroupConfig("*", 0.25, layers=(0, 1)))
    optim = dataclasses.replace(OPTIM, groups=rules)
    groups = parameter_groups(ours, optim, "ep_size_1")
    Schedule(groups, optim, TrainConfig(100, 16, 1, 4), 1).set_step(50)
    found = by_name(ours, groups)
    base = found["embedding.weight"]["lr"]
    for name, group in found.items():
        in_low = name.startswith(("blocks.0.", "blocks.1."))
        experts = name.startswith("blocks.2.mlp.experts.")
        factor = 0.5 if experts else 0.25 if in_low else 1.0
        assert group["lr"] == pytest.approx(base * factor), name
    assert any(name.startswith("blocks.2.mlp.experts.") for name in found)

    # The first layer is dense: there are no experts whose rate it could be.
    lost = dataclasses.replace(OPTIM, groups=(GroupConfig("experts", layers=(0, 0)),))
    with pytest.raises(
        ValueError, match=r"no parameter that 'experts' means is in layers \[0, 0\]"
    ):
        parameter_groups(ours, lost, "ep_size_1")
    for layers in ((1,), (2, 1), (-1, 0)):
        (problem,) = GroupConfig("experts", layers=layers).problems("optim.groups[0]")
        assert "give [first, last]" in problem


def test_a_decay_of_its_own_holds_where_nothing_else_decays():
    ours = model()
    optim = dataclasses.replace(OPTIM, weight_decay=0.0, groups=(GroupConfig("head", 1.0, 0.4),))
    groups = parameter_groups(ours, optim, "ep_size_1")
    Schedule(groups, optim, TrainConfig(100, 16, 1, 4), 1).set_step(7)
    found = by_name(ours, groups)
    assert found["head.weight"]["weight_decay"] == 0.4
    assert found["embedding.weight"]["weight_decay"] == 0.0


def test_what_is_frozen_is_in_no_group_and_is_counted():
    ours = model()
    freeze(ours, ("experts", "norms", "blocks.0.*"))
    found = by_name(ours, parameter_groups(ours, OPTIM, "ep_size_1"))
    assert not any("norm" in n or ".experts." in n or n.startswith("blocks.0.") for n in found)
    counts = trained_by_kind((n, p, p.numel()) for n, p in ours.named_parameters())
    experts = sum(p.numel() for n, p in ours.named_parameters() if ".experts." in n)
    assert counts["experts"] == (0, experts) and counts["mlp"][0] == 0
    attention = [p.numel() for n, p in ours.named_parameters() if kind_of(n) == "attention"]
    assert counts["attention"] == (sum(attention) * 2 // 3, sum(attention))


def test_a_rule_for_what_is_frozen_or_for_nothing_is_refused():
    ours = model()
    freeze(ours, ("norms",))
    for part in ("norms", "blocks.9.*"):
        optim = dataclasses.replace(OPTIM, groups=(GroupConfig(part),))
        with pytest.raises(ValueError, match=r"^optim.groups: .* means no parameter"):
            parameter_groups(ours, optim, "ep_size_1")
    with pytest.raises(ValueError, match=r"did you mean experts\?"):
        freeze(ours, ("expert",))
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(ours, ("*",))
    assert torch.is_grad_enabled()
