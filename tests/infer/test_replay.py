"""A text read again: under what it was served under it says the same, and under other settings what
a model with those would say.
"""

from __future__ import annotations

import pytest
import torch
from common import VOCAB_SIZE, build, tiny_config

from infer.budget import capture
from infer.config import EngineConfig, SamplingConfig
from infer.engine import Engine
from infer.replay import Reading, agreement, attention_errors, reading, top_k_of, use_top_k
from infer.request import Request
from model.config import BalanceConfig
from model.routers.config import ThresholdConfig

SPARSE = {"block_size": 4, "coarse_block_size": 2, "top_k": 1, "window_size": 4, "offset": False}
EVERY_BLOCK = 64 // 4


@pytest.fixture(scope="module")
def pair():
    """The same weights with sparse and with dense attention."""
    models = [
        build(tiny_config(), BalanceConfig(), attention=attention).eval()
        for attention in ({**SPARSE, "trust": False, "sink": False}, None)
    ]
    models[1].load_state_dict(models[0].state_dict())
    with torch.no_grad():
        for model in models:
            model.head.weight *= 10
            for block in model.blocks:  # far from even attention, so that blocks matter
                block.attention.q_proj.weight *= 8
    return models


def text(length: int = 50) -> list[int]:
    g = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCAB_SIZE, (length,), generator=g).tolist()


def logits(model, how: Reading) -> torch.Tensor:
    with torch.no_grad(), reading(model, how):
        return model.logits(torch.tensor([text()]))


def test_densely_and_with_every_block_it_is_the_dense_model(pair):
    sparse, dense = pair
    expected = logits(dense, Reading())
    torch.testing.assert_close(logits(sparse, Reading(densely=True)), expected)
    torch.testing.assert_close(
        logits(sparse, Reading(top_k=EVERY_BLOCK)), expected, rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(logits(sparse, Reading()), expected, atol=1e-2)


def test_settings_are_as_before_afterwards_also_behind_an_error(pair):
    sparse, _ = pair
    before = logits(sparse, Reading())
    state = capture(sparse.routers())
    with pytest.raises(RuntimeError), reading(sparse, Reading(state, 5, densely=True)):
        assert top_k_of(sparse) == 5
        raise RuntimeError
    assert top_k_of(sparse) == 1 and torch.equal(logits(sparse, Reading()), before)


def test_errors_are_those_of_attention_and_fall_with_more_blocks(pair):
    sparse, dense = pair
    found = {
        k: attention_errors(sparse, text(), Reading(top_k=k), 1000) for k in (1, 2, EVERY_BLOCK)
    }
    layers = len(sparse.sparse_attentions())
    assert all(len(errors) == layers for errors in found.values())
    assert max(found[EVERY_BLOCK]) < 1e-4 < max(found[2]) < max(found[1]) < 1
    assert top_k_of(dense) is None
    # few rows are near all of them; of none nothing is said
    some = attention_errors(sparse, text(), Reading(), 25)
    assert some is not None and some != found[1]
    assert attention_errors(sparse, text()[:3], Reading(), 1e-9) is None
    assert all(a.audit_rows != 1.0 for a in sparse.sparse_attentions())


def served_by(model, budgets=None, budget=None, **sampling):
    settings = SamplingConfig(**{"max_new_tokens": 12, "temperature": 1.0, "seed": 5, **sampling})
    engine = Engine(model, EngineConfig(), budgets=budgets)
    (done,) = engine.run([Request("a", text(20), settings, budget=budget)])
    return done


@pytest.mark.parametrize("top_k", [1, 3])
def test_what_was_served_is_what_its_own_replay_says(pair, top_k):
    sparse, _ = pair
    use_top_k(sparse, top_k)
    try:
        done = served_by(sparse)
    finally:
        use_top_k(sparse, 1)
    tokens, same = [*text(20), *done.tokens], Reading(top_k=top_k)
    found = agreement(sparse, tokens, 20, same, same, done.log_probabilities)
    assert (found.tokens, found.same, found.divergence) == (12, 12, 0.0)
    assert found.difference < 1e-4
    other = agreement(sparse, tokens, 20, Reading(top_k=4 - top_k), same, done.log_probabilities)
    assert other.difference > 1e-3, "another setting shows"


def test_dense_attention_agrees_as_far_as_the_dense_model_does(pair):
    sparse, dense = pair
    done = served_by(sparse)
    tokens = [*text(20), *done.tokens]
    found = agreement(sparse, tokens, 20, Reading(), Reading(densely=True))
    with torch.no_grad():
        one, other = (
            m.logits(torch.tensor([tokens]))[0, 19:-1].double().log_softmax(-1) for m in pair
        )
    assert found.same == int((one.argmax(-1) == other.argmax(-1)).sum())
    assert found.divergence == pytest.approx(float((other.exp() * (other - one)).sum()), rel=1e-4)
    assert found.divergence > 0 and found.difference != found.difference


def test_budgets_are_read_by_their_own_routers():
    model = build(tiny_config(), BalanceConfig(), router=ThresholdConfig, budget=2.0).eval()
    states = {}
    with torch.no_grad():
        for budget, cut in ((1.0, 0.6), (3.0, 0.4)):
            for router in model.routers():
                router.balance_bias.fill_(-cut)
            states[budget] = capture(model.routers())
    done = served_by(model, states, 1.0)
    tokens = [*text(20), *done.tokens]
    low, high = (Reading(states[b]) for b in (1.0, 3.0))
    assert agreement(model, tokens, 20, low, high, done.log_probabilities).difference < 1e-4
    assert agreement(model, tokens, 20, high, low, done.log_probabilities).difference > 1e-3
    assert agreement(model, tokens, 20, low, high).divergence > 0
