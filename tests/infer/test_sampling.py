"""Draws: what each setting allows, with which probability, and that a row is drawn alone."""

from __future__ import annotations

import pytest
import torch

from infer.config import SamplingConfig
from infer.request import StopStrings
from infer.sampling import sample, uniform


def shares(probabilities: list[float], draws: int = 4000, **settings) -> list[float]:
    """Share of each token among draws of different numbers."""
    logits = torch.tensor(probabilities).log().expand(draws, -1)
    config = SamplingConfig(**{"temperature": 1.0, "top_p": 1.0, **settings})
    tokens, _ = sample(logits, [config] * draws, list(range(draws)))
    return [float((tokens == i).double().mean()) for i in range(len(probabilities))]


def test_uniform_draws_are_uniform_and_unlike_each_other():
    seeds = torch.arange(200).repeat_interleave(200)
    numbers = torch.arange(200).repeat(200)
    found = uniform(seeds, numbers)
    assert ((found > 0) & (found < 1)).all() and len(found.unique()) == len(found)
    counts = torch.histc(found.float(), 50, 0, 1)
    expected = len(found) / 50
    # chi-square with 49 degrees of freedom is below 94.6 in all but 1 of 10,000 cases
    assert float(((counts - expected) ** 2 / expected).sum()) < 94.6
    neighbours = torch.corrcoef(torch.stack((found[:-1], found[1:])))[0, 1]
    assert abs(float(neighbours)) < 0.02


def test_large_seeds_and_numbers_count():
    seeds = torch.tensor([1, 1 + 2**40, 1, 2**62])
    numbers = torch.tensor([0, 0, 2**35, 0])
    assert len(uniform(seeds, numbers).unique()) == 4


def test_tokens_come_with_their_probability():
    expected = [0.1, 0.6, 0.3]
    assert shares(expected) == pytest.approx(expected, abs=0.03)
    hot = [0.1**0.5, 0.6**0.5, 0.3**0.5]
    found = shares(expected, temperature=2.0)
    assert found == pytest.approx([h / sum(hot) for h in hot], abs=0.03)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_p": 0.3}, {2}),
        ({"top_p": 0.55}, {2, 0}),
        ({"top_p": 0.85}, {2, 0, 3}),
        ({"top_p": 0.99}, {0, 1, 2, 3}),
        ({"top_k": 1}, {2}),
        ({"top_k": 3}, {0, 2, 3}),
        ({"top_k": 3, "top_p": 0.55}, {0, 2}),
        ({"top_k": 9}, {0, 1, 2, 3}),
    ],
)
def test_top_p_and_top_k_keep_what_they_say(settings, kept):
    found = shares([0.3, 0.05, 0.5, 0.15], **settings)
    assert {i for i, share in enumerate(found) if share} == kept
    whole = sum([0.3, 0.05, 0.5, 0.15][i] for i in kept)
    assert found[2] == pytest.approx(0.5 / whole, abs=0.03)


def test_ties_fall_to_the_lowest_ids():
    greedy = SamplingConfig(temperature=0.0)
    tokens, _ = sample(torch.tensor([[1.0, 3, 3, 2], [0, 0, 0, 0]]), [greedy] * 2, [0, 0])
    assert tokens.tolist() == [1, 0]
    assert {i for i, s in enumerate(shares([0.25] * 4, top_p=0.45)) if s} == {0, 1}


def test_a_row_is_drawn_alike_in_any_batch():
    gen = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(32, 500, generator=gen)
    settings = [
        SamplingConfig(
            temperature=[0.0, 0.7, 1.3][i % 3],
            top_p=[1.0, 0.9][i % 2],
            top_k=[None, 20, 5][i % 5 % 3],
            seed=i,
        )
        for i in range(32)
    ]
    together, values = sample(logits, settings, list(range(32)))
    for i in range(32):
        alone, value = sample(logits[i : i + 1], [settings[i]], [i])
        assert int(alone) == int(together[i]) and float(value) == float(values[i])


def test_a_row_that_is_not_finite_has_no_token():
    logits = torch.zeros(3, 5)
    logits[1, 2] = float("nan")
    tokens, _ = sample(logits, [SamplingConfig()] * 3, [0, 0, 0])
    assert tokens[1] == -1 and (tokens[[0, 2]] >= 0).all()


@pytest.mark.parametrize(
    "pieces", [["one tw", "o th", "ree"], list("one two three"), ["one two three"]]
)
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("two",), "one "),
        (("three", "two th"), "one "),
        (("ree!", "xyz"), "one two three"),
        (("e",), "on"),
        (("three",), "one two "),
        ((), "one two three"),
    ],
)
def test_stop_strings_are_found_across_tokens(pieces, stop, text):
    watch, found = StopStrings(stop), ""
    for piece in pieces:
        found += watch.add(piece)
        assert text.startswith(found)
        if watch.found:
            break
    assert watch.found == (text != "one two three")
    assert found + watch.end() == text
