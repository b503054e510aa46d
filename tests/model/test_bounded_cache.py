"""A bounded cache in the model: what it holds, what training and the audit make of eviction, and
what it is refused with.
"""

from __future__ import annotations

import pytest
import torch
from common import batch, build, take, tiny_config

from model.attention.config.sparse import SparseAttentionConfig
from model.config import BalanceConfig
from model.cost.memory import cache_bytes, cache_bytes_per_token, cache_growth
from model.generate import generate
from model.request import ForwardRequest
from train.observe.attention import attention_metrics

SMALL = {
    **{"block_size": 4, "coarse_block_size": 2, "top_k": 2, "window_size": 4, "audit_rows": 1.0},
    **{"resident_blocks": 1, "resident_interval": 8},
}


def model_of(**changes):
    return build(
        tiny_config(init_std=0.3, max_seq_len=64),
        BalanceConfig(),
        seed=7,
        attention={**SMALL, **changes},
    )


def test_a_cache_of_many_tokens_holds_few_and_generates_what_it_would_without_one():
    model = model_of().eval()
    config, length = model.config, 64
    caches = model.new_caches(1, length)
    held = sum(t.numel() * t.element_size() for c in caches for t in c.held.tensors())
    arguments = SparseAttentionConfig(**SMALL).arguments
    assert held == cache_bytes(config, 4, length, arguments)
    unbounded = SparseAttentionConfig(**SMALL | {"resident_blocks": None}).arguments
    whole = cache_bytes(config, 4, length, unbounded)
    assert whole > length * cache_bytes_per_token(config, 4) and whole > 1.5 * held

    text, expected = list(generate(model, [5, 9, 2], 45, temperature=0)), [5, 9, 2]
    with torch.no_grad():
        for _ in range(45):
            expected.append(int(model.logits(torch.tensor([expected]))[0, -1].argmax()))
    assert text == expected[3:]


def test_what_eviction_costs_is_measured_and_training_sees_it():
    given = take(batch(0, 0, 3, 48), 0, 3)
    layers, found = [0, 1, 2], {}
    for blocks in (1, 1000):
        model = model_of(resident_blocks=blocks)
        output = model(given, ForwardRequest(measure_attention=True))
        found[blocks] = attention_metrics(output.attention_stats.detach().double(), layers)
        found[blocks]["loss"] = float(output.loss_sum.detach())
        assert found[blocks]["attention/bound_violations"] == 0
    assert found[1000]["attention/resident_recall"] == pytest.approx(1)
    assert 0 < found[1]["attention/resident_recall"] < 0.95
    assert found[1]["attention/error"] > found[1000]["attention/error"]
    plain = build(
        tiny_config(init_std=0.3, max_seq_len=64),
        BalanceConfig(),
        seed=7,
        attention={**SMALL, "resident_blocks": None},
    )(given)
    assert found[1000]["loss"] == pytest.approx(float(plain.loss_sum.detach()), rel=1e-6)
    assert found[1]["loss"] != found[1000]["loss"]


@pytest.mark.parametrize(
    ("coarse", "shares"),
    [(16, (0.0996, 0.0531)), (32, (0.0527, 0.0295)), (64, (0.0293, 0.0176))],
    ids=["16", "32", "64"],
)
def test_a_million_tokens_take_a_tenth_of_dense_attention(coarse, shares):
    """Eight heads a group of 128 dimensions, in bf16."""
    config = tiny_config(num_heads=32, num_kv_heads=4, head_dim=128, num_layers=48)
    dense = cache_bytes(config, 2, 2**20)
    for kind, expected in zip(("native", "fp8"), shares, strict=True):
        asked = dict(coarse_block_size=coarse, resident_blocks=64, entries_dtype=kind)
        arguments = SparseAttentionConfig(**asked).arguments
        found = cache_bytes(config, 2, 2**20, arguments)
        assert found / dense == pytest.approx(expected, abs=1e-4)
        # what a token more adds: all but the regions
        growth = cache_growth(config, 2, arguments)
        regions = 48 * 89 * 64 * 2 * 4 * 128 * 2
        assert found - regions == pytest.approx(growth * 2**20, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"resident_blocks": None, "resident_interval": 8}, "resident_blocks=null keeps all"),
        ({"resident_interval": 6}, "attention.resident_interval 6 must be a multiple"),
        ({"merge": "gated"}, "set attention.merge=lse"),
        ({"select": "index"}, "set attention.select=mass"),
        ({"noise_steps": 3}, "set attention.noise_steps=0"),
        ({"tail": "drop"}, "attention.resident_blocks leaves"),
        (
            {"resident_blocks": None, "resident_interval": 1024, "entries_dtype": "fp8"},
            "attention.entries_dtype=fp8 is of a bounded cache",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(settings, words):
    found = SparseAttentionConfig(**SMALL | settings).problems(tiny_config())
    assert len(found) == 1 and words in found[0], found


def test_dense_steps_are_refused():
    model = model_of(dense_steps=4).eval()
    model.set_step(3)
    with pytest.raises(ValueError, match="still attend densely"):
        model.logits(torch.zeros(1, 8, dtype=torch.long), model.new_caches(1, 8))
