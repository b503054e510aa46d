"""Mixtures: which source training sample i comes from, and which of the source's samples it is.

A pure function of the settings and the sizes of the sources, so a run can be continued, extended or
split over other ranks. Inside a phase sources are blended by megatron-core's error-minimising
sequence, whose beginning does not depend on its length; a source that has been seen as often as it
may gives its share to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.config.data import DataConfig


@dataclass(frozen=True)
class Mixture:
    """How sources are blended over a training."""

    phases: tuple[tuple[int, tuple[float, ...]], ...]
    """First sample, and the weight of each source from there on; 0 leaves it out."""
    limits: tuple[int | None, ...]
    """Samples that a source may give in all; None: without end."""

    @classmethod
    def of(
        cls,
        config: DataConfig,
        tokens: Sequence[int],
        limits: tuple[int | None, ...],
        seq_len: int,
    ) -> Mixture:
        """
        Args:
            tokens, limits: of every source, its tokens and how many samples it may give.
        """
        weights = np.array([source.weight for source in config.sources], dtype=np.float64)
        if config.mixture.temperature is not None:
            weights = weights * np.array(tokens, dtype=np.float64) ** (
                1 / config.mixture.temperature
            )
        phases = [(0, tuple(weights.tolist()))]
        for phase in config.mixture.schedule:
            first = -(-phase.start_tokens // seq_len)
            phases = [earlier for earlier in phases if earlier[0] < first]
            phases.append((first, phase.weights))
        limits = tuple(None if limit is None else max(1, limit) for limit in limits)
        return cls(tuple(phases), limits)

    @property
    def is_one_source(self) -> bool:
        return len(self.limits) == 1 and self.limits[0] is None


class Blend:
    """The samples of a mixture by their number."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture
        self._source_of = np.empty(0, dtype=np.int16)
        self._index_in_source = np.empty(0, dtype=np.int64)

    def locate(self, index: int) -> tuple[int, int]:
        """Source of training sample `index`, and which of the source's samples it is.

        Raises:
            ValueError: all sources that the mixture has there were seen as often as they may be.
        """
        if self.mixture.is_one_source:
            return 0, index
        if index >= len(self._source_of):
            self._build(max(1024, 2 * (index + 1)))
        if index >= len(self._source_of):
            raise ValueError(
                f"the mixture ends after {len(self._source_of):,} rows, when every source was seen "
                f"data.sources.*.max_epochs times, and row {index + 1:,} is asked for: raise one "
                "of them, or lower train.num_steps"
            )
        return int(self._source_of[index]), int(self._index_in_source[index])

    def counts(self, number: int) -> list[int]:
        """Of the first `number` samples, how many each source gives."""
        if self.mixture.is_one_source or number == 0:
            return [number] * len(self.mixture.limits)
        self.locate(number - 1)
        sources = self._source_of[:number]
        return [int(n) for n in np.bincount(sources, minlength=len(self.mixture.limits))]

    def _build(self, size: int) -> None:
        """The tables of the first `size` samples, or of as many as there are."""
        sources: list[np.ndarray] = []
        places: list[np.ndarray] = []
        counts = np.zeros(len(self.mixture.limits), dtype=np.int64)
        limits = np.array(
            [size if limit is None else limit for limit in self.mixture.limits], dtype=np.int64
        )
        ends = [*(first for first, _ in self.mixture.phases[1:]), size]
        start = 0
        for (_, weights), end in zip(self.mixture.phases, ends, strict=True):
            end = min(end, size)
            while start < end:
                active = np.flatnonzero((np.array(weights) > 0) & (counts < limits))
                if not len(active):  # nothing is left to give
                    self._keep(sources, places)
                    return
                chosen, place = _blended(np.array(weights)[active], end - start)
                source = active[chosen]
                place = place + counts[source]

                # The first source that has given all it may ends the stretch: its share is divided.
                last = np.flatnonzero(place + 1 == limits[source])
                length = int(last[0]) + 1 if len(last) else end - start
                sources.append(source[:length])
                places.append(place[:length])
                counts += np.bincount(source[:length], minlength=len(counts))
                start += length
        self._keep(sources, places)

    def _keep(self, sources: list[np.ndarray], places: list[np.ndarray]) -> None:
        self._source_of = np.concatenate([np.empty(0, np.int64), *sources]).astype(np.int16)
        self._index_in_source = np.concatenate([np.empty(0, np.int64), *places])


def _blended(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """[size] which of the weights, and how many times it was chosen before."""
    from megatron.core.datasets import helpers_cpp

    chosen = np.zeros(size, dtype=np.int16)
    place = np.zeros(size, dtype=np.int64)
    if len(weights) == 1:
        return chosen, np.arange(size)
    shares = (weights / weights.sum()).tolist()
    helpers_cpp.build_blending_indices(chosen, place, shares, len(shares), size, False)
    return chosen, place
