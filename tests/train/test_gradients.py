"""Gradients of routers and experts by hooks, against the gradients that autograd leaves in the
parameters.
"""

from __future__ import annotations

import pytest
import torch

from bench.train_step import BALANCE, random_batch
from model.attention.config.dense import DenseAttentionConfig
from model.config import ModelConfig
from model.dispatch.config import LocalDispatcherConfig
from model.loss import IGNORE_INDEX, training_loss
from model.moe.layer import ModelParts
from model.routers.config import TopKConfig
from model.transformer import Transformer
from train.observe.gradients import GradientWatch

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    num_layers=3,
    num_heads=2,
    num_kv_heads=2,
    intermediate_size=32,
    num_experts=4,
    expert_intermediate_size=8,
    max_seq_len=16,
    num_dense_layers=1,
)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_squares_of_two_micro_batches_add_up(recompute):
    torch.manual_seed(0)
    config = ModelConfig(**{**CONFIG.__dict__, "recompute": recompute})
    model = Transformer(
        config,
        ModelParts(TopKConfig(top_k=2), DenseAttentionConfig(), LocalDispatcherConfig(), BALANCE),
    )
    watch = GradientWatch(model, torch.device("cpu"))
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for i, rows in enumerate((1, 2, 3)):
        watch.measuring = i > 0
        model.zero_grad()
        batch = random_batch(rows, 16, 64, torch.device("cpu"))
        training_loss(model(batch), 16 * rows, 16 * rows, BALANCE).backward()
        for row, block in enumerate(
            b for j, b in enumerate(model.blocks) if j in config.moe_layers
        ):
            if watch.measuring:
                expected[row, 0] += block.mlp.router.weight.grad.double().square().sum()
                for weight in (block.mlp.experts.gate_up, block.mlp.experts.down):
                    expected[row, 1:] += weight.grad.double().square().sum((1, 2))
    assert torch.allclose(watch.sums[:, :5], expected, rtol=1e-5)
    found, roots = watch.reduce(), expected[:, 1:].sqrt()
    spread = float(roots[0].std(unbiased=False) / roots[0].mean())
    assert found["moe/expert_grad_cv/layer_1"] == pytest.approx(spread, rel=1e-4)
    assert found["moe/router_grad_ratio/max"] == pytest.approx(
        float((expected[:, 0] / expected[:, 1:].sum(1)).sqrt().max()), rel=1e-4
    )
    assert watch.reduce() == {} and not watch.measuring


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_tokens_gradient_is_split_between_router_and_rest(recompute):
    """Of the last layer, against backward passes in which the router sees a detached copy."""
    config = ModelConfig(**{**CONFIG.__dict__, "recompute": recompute})
    batch, kept = random_batch(2, 16, 64, torch.device("cpu")), {}
    batch.targets[0, :5] = IGNORE_INDEX
    for detached in (False, True):
        torch.manual_seed(0)
        parts = ModelParts(
            TopKConfig(top_k=2), DenseAttentionConfig(), LocalDispatcherConfig(), BALANCE
        )
        model = Transformer(config, parts)
        layer = model.blocks[-1].mlp
        if detached:
            layer.router.register_forward_pre_hook(
                lambda _, inputs: (inputs[0].detach(), *inputs[1:])
            )
        else:
            watch = GradientWatch(model, torch.device("cpu"))
            watch.measuring = True
        layer.register_full_backward_hook(
            lambda _, grads, __, key=detached: kept.update({key: grads[0].clone()})
        )
        training_loss(model(batch), 32, 32, BALANCE).backward()
    whole, rest = (kept[key].reshape(-1, 16).double() for key in (False, True))
    routed, rest = (whole - rest).norm(dim=1), rest.norm(dim=1)
    assert float(routed.min()) > 0
    share = float((routed / (routed + rest)).mean())
    assert 0.001 < share < 0.999
    assert watch.reduce()["moe/gate_grad_share/layer_2"] == pytest.approx(share, rel=1e-3)
