"""The largest attention logit of every head, against all pairs; and clipping, which brings a head
to the threshold and leaves the others where they were.
"""

from __future__ import annotations

import pytest
import torch
from common import LATENT, LATENT_SHAPE, batch, build, take, tiny_config

from model.attention import largest as module
from model.attention.largest import largest_logits
from model.config import BalanceConfig
from model.request import ForwardRequest
from train.config.training import OptimConfig
from train.engine.qk_clip import clipped_rows

MEASURED = ForwardRequest(measure_logits=True)
ATTENTIONS = {
    "own keys": (dict(num_kv_heads=4), None),
    "shared keys and biases": (dict(num_kv_heads=2, attention_bias="qkv", rotary_dim=2), None),
    "another scale": (dict(attention_multiplier=0.9), None),
    "latent": (LATENT_SHAPE, LATENT),
    "latent, plain queries": (LATENT_SHAPE, {**LATENT, "q_lora_rank": None}),
}


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_largest_logit_is_that_of_all_pairs(monkeypatch, block, kv_heads):
    monkeypatch.setattr(module, "QUERY_BLOCK", block)
    gen = torch.Generator().manual_seed(block)
    q = torch.randn(2, 9, 4, 5, generator=gen)
    k = torch.randn(2, 9, kv_heads, 5, generator=gen)
    documents = torch.tensor([0] * 4 + [1] * 5 + [2] * 8 + [3])
    mask = torch.ones(18, dtype=torch.bool)
    mask[7:9] = False
    found = largest_logits(q, k, documents, mask, 0.5)
    expected = torch.full((4,), -torch.inf)
    for row in range(2):
        for i in range(9):
            for j in range(i + 1):
                one, other = 9 * row + i, 9 * row + j
                if documents[one] == documents[other] and mask[one] and mask[other]:
                    for h in range(4):
                        logit = 0.5 * q[row, i, h] @ k[row, j, h // (4 // kv_heads)]
                        expected[h] = torch.maximum(expected[h], logit)
    torch.testing.assert_close(found, expected)


def made(attention: str, **shape):
    changes, settings = ATTENTIONS[attention]
    config = tiny_config(**{"qk_norm": "none", "init_std": 0.5, **changes, **shape})
    return build(config, BalanceConfig(), attention=settings)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_clipped_head_comes_down_to_the_threshold_and_others_stay(attention):
    """On the very tokens that were measured, of a layer whose input is not another one's output."""
    model = made(attention, num_layers=1, num_dense_layers=0)
    rows = take(batch(0, 0, 4), 0, 4)
    before = model(rows, MEASURED).largest_logits.detach()
    assert before.shape == (1, 4) and float(before.min()) > 0
    threshold = float(before.median())
    factors = (threshold / before).where(before > threshold, 1.0)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, by_row in clipped_rows(model, factors).items():
            parameter = parameters[name]
            parameter *= by_row.view(-1, *[1] * (parameter.dim() - 1))
    after = model(rows, MEASURED).largest_logits
    assert 0 < int((factors < 1).sum()) < 4
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-5, atol=1e-5)


def test_layers_come_in_their_order_and_those_of_prediction_last():
    """Also with recomputation; and nothing is measured unasked."""
    rows = take(batch(0, 0, 3), 0, 3)
    found = []
    for recompute in ("none", "block"):
        model = made("own keys", num_mtp_layers=1, recompute=recompute)
        output = model(rows, MEASURED)
        output.loss_sum.backward()
        found.append(output.largest_logits)
        assert [name for name, _ in model.attentions()] == [
            *(f"blocks.{i}.attention" for i in range(3)),
            "mtp.0.block.attention",
        ]
        assert model(rows).largest_logits.numel() == 0
    assert found[0].shape == (4, 4)
    torch.testing.assert_close(*found)
    factors = torch.ones(4, 4)
    factors[3, 2] = 0.25
    (rows_of,) = {tuple(rows.tolist()) for rows in clipped_rows(model, factors).values()}
    assert rows_of == (1.0,) * 8 + (0.5,) * 4 + (1.0,) * 4
    assert set(clipped_rows(model, factors)) == {
        f"mtp.0.block.attention.{name}.weight" for name in ("q_proj", "k_proj")
    }


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        (dict(qk_clip=0.0), "optim.qk_clip is 0.0; it must be positive"),
        (dict(qk_clip_interval=3), "optim.qk_clip_interval is 3"),
        (dict(qk_clip=1.0, qk_clip_interval=0), "it must be at least 1"),
    ],
)
def test_a_clip_that_cannot_be_is_refused(optim, words):
    assert any(words in problem for problem in OptimConfig(lr=1.0, **optim).problems())
