"""A micro-batch of many equal rows has, in bf16, the gradient of one of them: nothing in a backward
pass adds up in bf16.
"""

from __future__ import annotations

import pytest
import torch
from common import batch, build, take, tiny_config

from model.config import BalanceConfig
from model.loss import training_loss
from model.weight_sums import Embedding, uses_of

SPARSE = {
    "block_size": 2,
    "coarse_block_size": 2,
    "top_k": 2,
    "window_size": 1,
    "offset": True,
    "trust": True,
    "sink": True,
    "entries": "gated",
}
LENGTH = 32


def gradients(rows: int, attention: dict | None, **changes) -> dict[str, torch.Tensor]:
    """Of the mean loss over so many equal rows, by parameter."""
    full = {name: tensor.repeat(rows, 1) for name, tensor in batch(0, 0, 1, LENGTH).items()}
    model = build(tiny_config(**changes), BalanceConfig(), attention=attention).to(torch.bfloat16)
    training_loss(
        model(take(full, 0, rows)), LENGTH * rows, LENGTH * rows, BalanceConfig()
    ).backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("attention", "changes"),
    [
        (None, {}),
        (None, {"loss_chunk_size": LENGTH}),
        (None, {"loss_chunk_size": LENGTH, "tie_embeddings": True}),
        (None, {"recompute": "block", "loss_chunk_size": 24}),
        (SPARSE, {}),
    ],
)
def test_equal_rows_add_up_exactly(attention, changes):
    one, many = gradients(1, attention, **changes), gradients(128, attention, **changes)
    errors = {
        name: float((many[name] - one[name]).norm() / one[name].norm())
        for name in one
        if one[name].any()
    }
    # One rounding to bf16 is up to 0.4%; a bf16 sum of 128 equal terms is 6% off.
    assert max(errors.values()) < 4e-3, sorted(errors.items(), key=lambda item: -item[1])[:3]


def test_looking_up_a_token_often_loses_nothing():
    ids, value = torch.zeros(2000, dtype=torch.int64), torch.tensor(0.7, dtype=torch.bfloat16)
    embedding = Embedding(4, 8).to(torch.bfloat16)
    embedding(ids).backward(value.expand(2000, 8))
    assert embedding.weight.grad[0].tolist() == [float((value.float() * 2000).bfloat16())] * 8
    assert not embedding.weight.grad[1:].any()


def test_in_fp32_the_embedding_is_torchs():
    ids, found = torch.randint(0, 9, (3, 50)), {}
    for kind in (Embedding, torch.nn.Embedding):
        torch.manual_seed(0)
        module = kind(9, 4)
        module(ids).square().sum().backward()
        found[kind] = module.weight.grad
    assert torch.equal(*found.values())


def test_the_gradients_of_all_uses_of_a_weight_reach_it_as_one_sum():
    weight = torch.zeros(5, 3, dtype=torch.bfloat16, requires_grad=True)
    # whole numbers: their fp32 sum is exact
    rows = torch.randint(-9, 10, (300, 7, 3)).bfloat16()
    sum(
        (x @ use.t()).float().sum() for x, use in zip(rows, uses_of(weight, 300), strict=True)
    ).backward()
    assert torch.equal(weight.grad, rows.float().sum((0, 1)).expand(5, 3).bfloat16())
