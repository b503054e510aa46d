"""model.init=mup: how much every layer's output, the routers' logits and the head's logits change
in a few steps depends on no width and no depth (the coordinate check of Tensor Programs V, arXiv
2203.03466, appendix D.1), and each of its rules is needed for that.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from model.attention.config.dense import DenseAttentionConfig
from model.config import BalanceConfig, ModelConfig
from model.dispatch.config import LocalDispatcherConfig
from model.moe.layer import MoELayer
from model.parallel.groups import ParallelGroups
from model.request import TokenBatch
from model.routers.config import TopKConfig
from model.scaling import PLAIN, Factors, factors_of, first_std
from model.transformer import ModelParts, Transformer
from train.config.training import GroupConfig, OptimConfig, TrainConfig
from train.engine import optimizer as optimizer_module
from train.engine.muon.masters import place_matrices
from train.engine.muon.optimizer import Muon
from train.engine.optimizer import build_optimizer, parameter_groups
from train.engine.schedule import Schedule

BASE = 64
WIDTHS = (64, 128, 256)
LEARNING_RATE = 2**-8
NUM_STEPS = 4
NUM_TOKENS = 8
"""Fewer than the smallest width: what the updates for other tokens say to a token by chance is
sqrt(tokens / width) of what its own says, and falls off with the width where all is well.
"""
PARTS = ModelParts(
    TopKConfig(top_k=2), DenseAttentionConfig(), LocalDispatcherConfig(), BalanceConfig()
)


def shape(width: int, **changes) -> ModelConfig:
    """One dense layer and one of experts, behind a head of its own; heads grow in number."""
    settings = dict(
        vocab_size=64,
        hidden_size=width,
        num_layers=2,
        num_heads=width // 16,
        num_kv_heads=width // 32,
        intermediate_size=2 * width,
        num_experts=4,
        expert_intermediate_size=width,
        max_seq_len=NUM_TOKENS,
        num_dense_layers=1,
        num_shared_experts=1,
        init="mup",
        mup_base_hidden_size=BASE,
    )
    if changes.get("init", "mup") != "mup":
        del settings["mup_base_hidden_size"]
    return ModelConfig(**(settings | changes))


def optim_of(optimizer: str) -> OptimConfig:
    dtype = {"orthogonalize_dtype": "fp32"} if optimizer == "muon" else {}
    return OptimConfig(lr=LEARNING_RATE, optimizer=optimizer, decay_style="constant", **dtype)


def changes_of(config: ModelConfig, optimizer: str, seed: int) -> dict[str, float]:
    """Root mean square of the change in NUM_STEPS steps: of what each attention, MLP and block
    gives, of the routers' logits, and of the head's.
    """
    torch.manual_seed(seed)
    model = Transformer(config, PARTS, ParallelGroups.single(), seed)
    optim = optim_of(optimizer)
    optimiser = build_optimizer(model, optim, "experts")
    if isinstance(optimiser, Muon):
        place_matrices(optimiser, model, None, 0, torch.device("cpu"))
    train = TrainConfig(NUM_STEPS, NUM_TOKENS, 1, 1)
    Schedule(optimiser.param_groups, optim, train, 1).set_step(0)

    ids = torch.randint(config.vocab_size, (1, NUM_TOKENS + 1))
    batch = TokenBatch(
        input_ids=ids[:, :-1],
        targets=ids[:, 1:],
        positions=torch.arange(NUM_TOKENS).unsqueeze(0),
        cu_seqlens=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
        max_seqlen=NUM_TOKENS,
    )
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(_, __, out):
            seen[name] = (out[0] if isinstance(out, tuple) else out).detach()

        return hook

    def keep_router(router: torch.nn.Module, given: tuple) -> None:
        seen["router"] = (given[0] @ router.weight.T).detach()

    for i, block in enumerate(model.blocks):
        block.register_forward_hook(keep(f"block.{i}"))
        block.attention.register_forward_hook(keep(f"attention.{i}"))
        block.mlp.register_forward_hook(keep(f"mlp.{i}"))
        if isinstance(block.mlp, MoELayer):
            block.mlp.router.register_forward_pre_hook(keep_router)
    model.norm.register_forward_hook(
        lambda _, __, out: seen.update(logits=model.project(out).detach())
    )

    for step in range(NUM_STEPS + 1):
        loss = model(batch).loss_sum / NUM_TOKENS
        if step == 0:
            first = dict(seen)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {name: float((seen[name] - first[name]).square().mean().sqrt()) for name in first}


def slopes(measured: dict[int, list[dict[str, float]]]) -> dict[str, float]:
    """The power of the width (or depth) that fits each change best, of geometric means over
    seeds.
    """
    x = torch.tensor([math.log(size) for size in measured])
    x = x - x.mean()
    found = {}
    for name in next(iter(measured.values()))[0]:
        y = torch.tensor(
            [sum(math.log(run[name]) for run in runs) / len(runs) for runs in measured.values()]
        )
        found[name] = float((x * y).sum() / (x * x).sum())
    return found


def over_widths(optimizer: str, widths=WIDTHS, seeds: int = 2, **changes) -> dict[str, float]:
    found = {
        width: [changes_of(shape(width, **changes), optimizer, seed) for seed in range(seeds)]
        for width in widths
    }
    powers = slopes(found)
    print(optimizer, changes, {name: round(power, 2) for name, power in powers.items()})
    return powers


def require_flat(powers: dict[str, float], bound: float) -> None:
    """The routers' logits are given more: they are 4 numbers a token, of few tokens."""
    off = {name: p for name, p in powers.items() if abs(p) > bound * (1 + (name == "router"))}
    assert not off, powers


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_under_mup_changes_depend_on_no_width(optimizer):
    require_flat(over_widths(optimizer), 0.2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_without_it_they_grow(optimizer):
    powers = over_widths(optimizer, init="depth_scaled", seeds=1)
    assert min(powers["block.1"], powers["attention.1"], powers["mlp.1"]) > 0.5, powers
    assert powers["logits"] > 0.3, powers


WRONG = {
    "the rate of hidden matrices": ("hidden", "block.1", 0.5),
    "the rate of the router": ("router", "router", 0.5),
    "the rate of the head": ("head", "logits", 0.4),
}


@pytest.mark.parametrize("rule", WRONG)
def test_every_rule_on_learning_rates_is_needed(rule, monkeypatch):
    what, where, at_least = WRONG[rule]

    def broken(model: ModelConfig, name: str, is_matrix: bool) -> Factors:
        of_head = name == "head.weight"
        of_router = name.endswith(".router.weight")
        kind = "head" if of_head else "router" if of_router else "hidden" if is_matrix else ""
        return PLAIN if kind == what else factors_of(model, name, is_matrix)

    monkeypatch.setattr(optimizer_module, "factors_of", broken)
    powers = over_widths("adamw", seeds=2)
    assert powers[where] > at_least, powers


def test_tied_heads_that_grow_are_flat_as_well():
    """Four heads at any width, with QK-norm, the embedding as the head."""
    powers = over_widths(
        "adamw",
        seeds=4,
        **dict(num_heads=4, num_kv_heads=2, mup_base_head_dim=16),
        **dict(qk_norm="head", tie_embeddings=True),
    )
    require_flat(powers, 0.3)


@pytest.mark.nightly
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_wider_models_are_flatter(optimizer):
    require_flat(over_widths(optimizer, (*WIDTHS, 512), seeds=3), 0.12)


def test_under_a_base_depth_changes_depend_on_no_depth():
    """CompleteP, exponent 1. Without a base, what the last block gives grows with the depth."""
    depths = (2, 4, 8)

    def powers(**changes) -> dict[str, float]:
        found: dict[int, list[dict[str, float]]] = {}
        for depth in depths:
            for seed in range(2):
                run = changes_of(shape(64, num_layers=depth, **changes), "adamw", seed)
                last = {"last": run[f"block.{depth - 1}"], "logits": run["logits"]}
                found.setdefault(depth, []).append(last)
        return slopes(found)

    scaled, plain = powers(mup_base_num_layers=2), powers()
    print(scaled, plain)
    assert max(abs(p) for p in scaled.values()) < 0.3, scaled
    assert plain["last"] > 0.4, plain


NAMES = {
    "embedding.weight": (1, 1e-8 / 4, 0.1),
    "head.weight": (1 / 4, 1e-8, 0.4),
    "norm.weight": (1, 1e-8 / 4, 0.0),
    "blocks.0.attention_norm.weight": (1, 1e-8 / 8, 0.0),
    "blocks.0.attention.q_proj.weight": (1 / 4, 1e-8 / 8, 0.4),
    "blocks.0.mlp.gate_up.weight": (1 / 4, 1e-8 / 8, 0.4),
    "blocks.1.mlp.router.weight": (1 / 4, 1e-8, 0.4),
    "blocks.1.mlp.experts.down": (1 / 4, 1e-8 / 8, 0.4),
    "blocks.1.mlp.shared.down.weight": (1 / 4, 1e-8 / 8, 0.4),
}


def test_groups_have_the_table_of_the_page_through_the_schedule():
    """Four times wider and twice as deep than the base: learning rate, epsilon, weight decay."""
    config = shape(256, mup_base_num_layers=1)
    model = Transformer(config, PARTS, seed=None)
    optim = dataclasses.replace(optim_of("adamw"), groups=(GroupConfig("head", 2.0, 0.3),))
    groups = parameter_groups(model, optim, "experts")
    schedule = Schedule(groups, optim, TrainConfig(9, 8, 1, 1), 1)
    schedule.set_step(3)
    assert schedule.learning_rate == pytest.approx(LEARNING_RATE)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    for name, (rate, eps, decay) in NAMES.items():
        factor, decay = (2.0, 4 * 0.3) if name == "head.weight" else (1.0, decay)
        assert found[name]["lr"] == pytest.approx(LEARNING_RATE * rate * factor), name
        assert found[name].get("eps", optim.eps) == pytest.approx(eps), name
        assert found[name]["weight_decay"] == pytest.approx(decay), name
    muon = parameter_groups(model, optim_of("muon"), "experts")
    assert {g["lr_factor"] for g in muon if g["muon"]} == {1 / 2}


def test_at_the_base_nothing_is_scaled():
    config = shape(64, mup_base_num_layers=2)
    assert factors_of(config, "blocks.1.mlp.experts.down", True) == PLAIN
    assert (config.residual_scale, config.whole_logits_divisor) == (1, 1)
    assert config.attention_scale is None
    assert first_std(config, "head.weight") == first_std(config, "embedding.weight") == 0.02
