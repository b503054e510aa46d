"""Mixtures of sources: weights, temperature, most passes, and a schedule over the training; each
sample a function of its number.
"""

from __future__ import annotations

import numpy as np
import pytest

from train.config.data import (
    DataConfig,
    MixtureConfig,
    PhaseConfig,
    SourceConfig,
    TokenizerConfig,
)
from train.data.loader import TrainingLoader
from train.data.mixture import Blend, Mixture
from train.data.prepare import fingerprint, prepare
from train.data.store import TokenStore, TrainingSamples

SEQ_LEN = 16


def by_definition(mixture: Mixture, size: int) -> list[tuple[int, int]]:
    """Each sample from the source that lags most behind its share since the stretch began: a phase,
    or what follows the end of a source.
    """
    counts = [0] * len(mixture.limits)
    found: list[tuple[int, int]] = []
    stretch = None
    for index in range(size):
        weights = [phase for phase in mixture.phases if phase[0] <= index][-1]
        active = [
            s
            for s, (weight, limit) in enumerate(zip(weights[1], mixture.limits, strict=True))
            if weight > 0 and (limit is None or counts[s] < limit)
        ]
        if not active:
            return found
        if stretch != (weights, active):
            stretch, begin, since = (weights, active), index, dict.fromkeys(active, 0)
        total = sum(weights[1][s] for s in active)
        lag = [weights[1][s] / total * max(index - begin, 1) - since[s] for s in active]
        source = active[int(np.argmax(lag))]
        found.append((source, counts[source]))
        counts[source] += 1
        since[source] += 1
    return found


@pytest.mark.parametrize(
    ("phases", "limits"),
    [
        (((0, (1.0, 3.0)),), (None, None)),
        (((0, (0.2, 0.3, 0.5)), (37, (0.0, 1.0, 1.0)), (90, (8.0, 1.0, 0.0))), (None,) * 3),
        (((0, (1.0, 1.0)),), (10, None)),
        (((0, (1.0, 2.0, 3.0)), (50, (3.0, 0.0, 1.0))), (11, 13, None)),
        (((0, (1.0, 1.0)), (30, (1.0, 0.0))), (20, 25)),  # ends where the first has given all
        (((0, (1.0,)),), (5,)),
    ],
)
def test_every_sample_comes_from_the_source_that_lags_most_in_its_phase(phases, limits):
    mixture, blend = Mixture(phases, limits), Blend(Mixture(phases, limits))
    expected = by_definition(mixture, 200)
    found = []
    for index in range(200):
        try:
            found.append(blend.locate(index))
        except ValueError as error:
            assert f"ends after {len(expected)} rows" in str(error)
            break
    assert found == expected
    # whatever was asked first: a longer table begins as a shorter one
    for index in (len(expected) - 1, 3):
        assert Blend(mixture).locate(index) == expected[index]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("mixture")
    for name, count in (("a", 60), ("b", 240)):
        lines = (f"{name} {i} " + name * (i % 30 + 5) for i in range(count))
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return DataConfig(
        tuple(
            SourceConfig("text", data_files=str(folder / f"{name}.txt"), sample_by="line")
            for name in "ab"
        ),
        TokenizerConfig(vocab_size=280),
        0.1,
        str(folder / "cache"),
    )


def with_mixture(config: DataConfig, caps=(None, None), **mixture) -> DataConfig:
    from dataclasses import replace

    sources = tuple(
        replace(source, max_epochs=cap) for source, cap in zip(config.sources, caps, strict=True)
    )
    return replace(config, sources=sources, mixture=MixtureConfig(**mixture))


def samples_of(config: DataConfig) -> TrainingSamples:
    store = TokenStore(prepare(config, lambda line: None))
    weights = tuple(source.weight for source in config.sources)
    samples = TrainingSamples(store, weights, SEQ_LEN, 7)
    samples.mix(config)
    return samples


def test_a_mixture_is_no_part_of_what_is_prepared(config):
    other = with_mixture(config, caps=(2.0, None), temperature=2.0)
    assert fingerprint(other) == fingerprint(config)


def test_temperature_goes_from_the_sizes_of_the_sources_to_even_shares(config):
    store = TokenStore(prepare(config, lambda line: None))
    tokens = np.array([source["tokens"] for source in store.manifest["sources"]])
    for temperature, expected in ((1.0, tokens), (2.0, np.sqrt(tokens)), (1e9, np.ones(2))):
        samples = samples_of(with_mixture(config, temperature=temperature))
        share = np.mean([samples.source_of(i) for i in range(4000)])
        assert share == pytest.approx(expected[1] / expected.sum(), abs=2e-3)


def test_a_source_gives_no_more_than_its_passes_and_then_the_others_do(config):
    samples = samples_of(with_mixture(config, caps=(1.5, None)))
    most = int(1.5 * samples.sources[0].per_epoch)
    sources = [samples.source_of(i) for i in range(4 * most)]
    assert sources.count(0) == most and set(sources[2 * most + 2 :]) == {1}


def test_a_training_that_wants_more_than_all_sources_give_is_refused(config):
    samples = samples_of(with_mixture(config, caps=(1.0, 1.0)))
    total = sum(source.per_epoch for source in samples.sources)
    samples.require(total)
    with pytest.raises(ValueError, match=rf"ends after {total} rows.*max_epochs"):
        samples.require(total + 1)


def test_a_schedule_changes_the_mixture_at_its_token_and_resumes_exactly_under_any_layout(config):
    start = 20 * SEQ_LEN - 3  # in the midst of sample 19: the next one is the first
    scheduled = with_mixture(
        config, schedule=(PhaseConfig(start_tokens=start, weights=(1.0, 0.0)),)
    )
    samples = samples_of(scheduled)
    assert {samples.source_of(i) for i in range(20)} == {0, 1}
    assert {samples.source_of(i) for i in range(20, 60)} == {0}

    def rows(size: int, begin: int, steps: int, seq: int = 8) -> list[list[int]]:
        """The rows of so many steps on `size` ranks, in the order of the samples."""
        found = []
        loaders = []
        for rank in range(size):
            loader = TrainingLoader(samples_of(scheduled), SEQ_LEN, 2, 0, rank, size)
            loader.consumed_samples = begin
            loaders.append(loader)
        for _ in range(steps):
            batches = [loader.next_step(seq // (2 * size)) for loader in loaders]
            for micro in range(seq // (2 * size)):
                for batch in batches:
                    found += batch[micro].input_ids.tolist()
        return found

    whole = rows(1, 0, 6)
    assert whole == rows(2, 0, 6) == rows(4, 0, 6)
    # resumed before, in and after the change of the mixture
    for done in (1, 2, 3):
        assert rows(2, 0, done) + rows(4, 8 * done, 6 - done) == whole


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ({"temperature": 0.0}, "data.mixture.temperature is 0.0; it must be positive"),
        ({"schedule": (PhaseConfig(5, (1.0,)),)}, "schedule[0].weights has 1 weights; give one"),
        ({"schedule": (PhaseConfig(5, (1.0, -1.0)),)}, "no weight is below 0, and one is above"),
        ({"schedule": (PhaseConfig(5, (0.0, 0.0)),)}, "no weight is below 0, and one is above"),
        (
            {"schedule": (PhaseConfig(5, (1.0, 1.0)), PhaseConfig(5, (1.0, 1.0)))},
            "schedule[1].start_tokens is 5; it must be 0 at least, and more",
        ),
    ],
)
def test_a_mixture_that_means_nothing_is_told(config, mixture, said):
    (problem,) = with_mixture(config, **mixture).problems()
    assert said in problem


def test_a_temperature_of_one_source_and_no_passes_are_told(config):
    from dataclasses import replace

    one = replace(config, sources=config.sources[:1], mixture=MixtureConfig(temperature=2.0))
    assert "but there is one source" in one.problems()[0]
    (problem,) = with_mixture(config, caps=(0.0, None)).problems()
    assert "data.sources[0].max_epochs is 0.0; it must be positive" in problem
