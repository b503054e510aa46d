"""Layers shared out over the stages of a pipeline, so that the slowest stage is as fast as it can
be. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from model.config import ModelConfig
from model.cost.parameters import flops_per_token


def ranges_of(split: Sequence[int]) -> tuple[range, ...]:
    """Numbers of layers by stage -> the layers of each."""
    ends = itertools.accumulate(split)
    return tuple(range(end - number, end) for number, end in zip(split, ends, strict=True))


def balanced_split(
    config: ModelConfig,
    experts_per_token: float,
    seq_len: int,
    attention: Mapping[str, Any] | None,
    num_stages: int,
) -> tuple[int, ...]:
    """How many layers each stage has, at least one.

    The slowest stage has as few FLOPs as it can, with the head and what is behind it on the last
    stage. Of several such splits it is the one whose first stages have fewest layers: they hold the
    most micro-batches at a time.

    Raises:
        ValueError: there are more stages than layers.
    """
    num_layers = config.num_layers
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_layers} layers are not enough for {num_stages} stages")
    before = _flops_before(config, experts_per_token, seq_len, attention)

    # most[k][i]: of the slowest of k stages that have the layers from i on.
    inf = float("inf")
    most = [[0.0 if i == num_layers else inf for i in range(num_layers + 1)]]
    for _ in range(num_stages):
        rest = most[-1]
        most.append(
            [
                min(
                    (
                        max(before[j] - before[i], rest[j])
                        for j in range(i + 1, num_layers + 1)
                        if rest[j] < inf
                    ),
                    default=inf,
                )
                for i in range(num_layers + 1)
            ]
        )

    # Sums in another order may differ in their last digits, which must not decide.
    bound = most[num_stages][0] * (1 + 1e-9)
    split, first = [], 0
    for left in range(num_stages - 1, -1, -1):
        end = next(
            j
            for j in range(first + 1, num_layers + 1)
            if before[j] - before[first] <= bound and most[left][j] <= bound
        )
        split.append(end - first)
        first = end
    return tuple(split)


def even_split(
    config: ModelConfig,
    experts_per_token: float,
    seq_len: int,
    attention: Mapping[str, Any] | None,
    num_runs: int,
) -> tuple[int, ...]:
    """How many layers each run has where stages have several, at least one.

    The runs are as even in FLOPs as they can be (least sum of squares), with the head in the last:
    whichever of their runs stages are at, the slowest sets the pace.

    Raises:
        ValueError: there are more runs than layers.
    """
    num_layers = config.num_layers
    if not 1 <= num_runs <= num_layers:
        raise ValueError(f"{num_layers} layers are not enough for {num_runs} runs")
    before = _flops_before(config, experts_per_token, seq_len, attention)

    # Of so many runs over the first layers: sum of squares by number of layers, where the last of
    # them begins.
    least = [0.0, *[float("inf")] * num_layers]
    begins: list[list[int]] = []
    for _ in range(num_runs):
        found = [
            min(((least[i] + (before[j] - before[i]) ** 2, i) for i in range(j)), default=None)
            for j in range(num_layers + 1)
        ]
        least = [float("inf") if one is None else one[0] for one in found]
        begins.append([0 if one is None else one[1] for one in found])

    split, end = [], num_layers
    for starts in reversed(begins):
        split.append(end - starts[end])
        end = starts[end]
    return tuple(reversed(split))


def _flops_before(
    config: ModelConfig,
    experts_per_token: float,
    seq_len: int,
    attention: Mapping[str, Any] | None,
) -> list[float]:
    """Of a token in the layers before each one, and at last in all of them with the head."""
    cost = (
        flops_per_token(config, experts_per_token, seq_len, attention, range(i, i + 1))
        for i in range(config.num_layers)
    )
    return [0.0, *itertools.accumulate(cost)]
