"""Sampling: what is drawn, when it ends, what is refused."""

from __future__ import annotations

import pytest
import torch
from common import VOCAB_SIZE, build, tiny_config

from model.config import BalanceConfig
from model.generate import generate, sample_token

PROMPT = [5, 9, 2]


@pytest.fixture(scope="module")
def model():
    model = build(tiny_config(max_seq_len=24), BalanceConfig())
    with torch.no_grad():
        # far from uniform, so that seeds and temperatures matter
        model.head.weight *= 10
    return model


def drawn(
    probabilities: list[float], top_p: float, temperature: float = 1.0, draws: int = 300
) -> list[float]:
    """Share of each token among `draws`."""
    gen = torch.Generator().manual_seed(0)
    logits = torch.tensor(probabilities).log()
    tokens = [sample_token(logits, temperature, top_p, gen) for _ in range(draws)]
    return [tokens.count(i) / draws for i in range(len(probabilities))]


def test_the_same_seed_gives_the_same_text(model):
    texts = [list(generate(model, PROMPT, 16, seed=seed)) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 16 and all(0 <= t < VOCAB_SIZE for t in texts[0])


def test_temperature_zero_takes_the_most_likely_token_each_time(model):
    text, expected = list(generate(model, PROMPT, 10, temperature=0, seed=1)), list(PROMPT)
    for _ in range(10):  # without a cache
        expected.append(int(model.logits(torch.tensor([expected]))[0, -1].argmax()))
    assert text == expected[3:]
    assert list(generate(model, PROMPT, 10, temperature=0, seed=2)) == text


def test_temperature_zero_takes_the_lowest_id_on_ties():
    gen = torch.Generator().manual_seed(0)
    assert sample_token(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 0, 1.0, gen) == 1
    assert sample_token(torch.zeros(1000), 0, 1.0, gen) == 0


def test_without_limits_tokens_come_with_their_probability():
    probabilities = [0.1, 0.6, 0.3]
    assert drawn(probabilities, top_p=1.0, draws=2000) == pytest.approx(probabilities, abs=0.05)


def test_temperature_sharpens_and_flattens():
    cold, hot = (drawn([0.1, 0.6, 0.3], 1.0, t, draws=1000)[1] for t in (0.25, 4.0))
    assert cold == pytest.approx(0.6**4 / (0.6**4 + 0.3**4 + 0.1**4), abs=0.05)
    assert hot == pytest.approx(0.6**0.25 / (0.6**0.25 + 0.3**0.25 + 0.1**0.25), abs=0.05)


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [
        (0.3, {2}),
        (0.45, {2}),
        (0.55, {2, 0}),
        (0.75, {2, 0}),
        (0.85, {2, 0, 3}),
        (0.99, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_nucleus(top_p, nucleus):
    shares = drawn([0.3, 0.05, 0.5, 0.15], top_p)
    assert {i for i, share in enumerate(shares) if share} == nucleus


def test_top_p_of_a_tie_keeps_the_lowest_ids():
    assert [i for i, share in enumerate(drawn([0.25] * 4, 0.45)) if share] == [0, 1]


def test_generation_stops_at_the_stop_token_and_does_not_yield_it(model):
    text = list(generate(model, PROMPT, 16, seed=3))
    stop = text[7]
    assert list(generate(model, PROMPT, 16, seed=3, stop_token=stop)) == text[: text.index(stop)]


def test_generation_stops_at_max_seq_len(model):
    assert len(list(generate(model, PROMPT, 1000))) == 24 - len(PROMPT)
    assert len(list(generate(model, [1] * 23, 1000))) == 1


def test_no_tokens_are_asked_for(model):
    assert list(generate(model, PROMPT, 0)) == []


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 24, {}, "the prompt has 24 tokens; model.max_seq_len is 24"),
        (PROMPT, dict(temperature=-0.1), "temperature -0.1 must be >= 0"),
        (PROMPT, dict(top_p=0.0), "top_p 0.0 in"),
        (PROMPT, dict(top_p=1.5), "top_p 1.5 in"),
    ],
)
def test_bad_requests_are_refused(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        list(generate(model, prompt, 4, **options))
