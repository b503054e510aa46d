"""How sure a difference of losses is: by seed and by held-out text together."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_SEEDS = 1000
"""Beyond these nobody is told to run more."""


def t_probability(t: float, degrees: int) -> float:
    """P(T <= t) of Student's t with a whole number of degrees of freedom, by its finite series
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4).
    """
    if math.isinf(t):
        return float(t > 0)
    theta = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    total, term = 0.0, 1.0
    if degrees % 2:
        term = cosine
        for k in range(1, (degrees - 1) // 2 + 1):
            total += term
            term *= cosine * cosine * 2 * k / (2 * k + 1)
        within = 2 / math.pi * (theta + sine * total)
    else:
        for k in range(1, degrees // 2 + 1):
            total += term
            term *= cosine * cosine * (2 * k - 1) / (2 * k)
        within = sine * total
    return 0.5 + within / 2


def t_quantile(probability: float, degrees: int) -> float:
    """The value below which T lies with that probability, by bisection."""
    assert 0 < probability < 1
    low, high = -1.0, 1.0
    while t_probability(low, degrees) > probability:
        low *= 2
    while t_probability(high, degrees) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if t_probability(middle, degrees) < probability else (low, middle)
        )
    return (low + high) / 2


@dataclass(frozen=True)
class Difference:
    """Of a variant's held-out loss to another's, in nats per token; below 0 is better.

    Its error is that of the mean over seeds (paired: a seed has the same order of text in both)
    and that of the mean over held-out rows (paired: the same rows), added as variances. The second
    holds some of the first, so the interval is rather too wide; the degrees of freedom are those of
    the seeds.
    """

    mean: float
    by_seed: tuple[float, ...]
    text_error: float
    """Standard error over held-out rows."""

    @property
    def seeds(self) -> int:
        return len(self.by_seed)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; NaN of one."""
        return float(np.std(self.by_seed, ddof=1)) if self.seeds > 1 else math.nan

    def error(self, seeds: int | None = None) -> float:
        """Standard error, with so many seeds of the same spread; infinite with one."""
        number = self.seeds if seeds is None else seeds
        if self.seeds < 2 or number < 2:
            return math.inf
        return math.sqrt(self.spread**2 / number + self.text_error**2)

    def interval(self, coverage: float = 0.95) -> tuple[float, float]:
        if self.seeds < 2:
            return -math.inf, math.inf
        half = t_quantile((1 + coverage) / 2, self.seeds - 1) * self.error()
        return self.mean - half, self.mean + half

    def below(self, limit: float) -> float:
        """How probable it is that the difference lies below a limit: the one-sided t-test's
        confidence, which is also the posterior's under a flat prior; 1/2 with one seed.
        """
        if self.seeds < 2:
            return 0.5
        error = self.error()
        if error == 0:
            return float(self.mean < limit) if self.mean != limit else 0.5
        return t_probability((limit - self.mean) / error, self.seeds - 1)

    def seeds_for(self, half_width: float, confidence: float) -> int | None:
        """The least number of seeds, of the same mean and spread, at which a one-sided bound lies
        `half_width` from the mean; None: more than MAX_SEEDS, or the held-out text is too short for
        any number.
        """

        def suffices(number: int) -> bool:
            return t_quantile(confidence, number - 1) * self.error(number) <= half_width

        if half_width <= 0 or self.seeds < 2 or not suffices(MAX_SEEDS):
            return None
        # Both factors fall with the number.
        numbers = range(2, MAX_SEEDS + 1)
        return numbers[bisect.bisect_left(numbers, True, key=suffices)]


def difference(
    sums: Sequence[np.ndarray], base: Sequence[np.ndarray], counts: np.ndarray
) -> Difference:
    """Of two variants, from summed losses of held-out rows, one array [rows] a seed, in the same
    order of seeds; counts: targets of each row, [rows].
    """
    rows = np.mean([one - other for one, other in zip(sums, base, strict=True)], axis=0)
    total = counts.sum()
    mean = float(rows.sum() / total)
    by_seed = tuple(
        float((one - other).sum() / total) for one, other in zip(sums, base, strict=True)
    )
    # Of a ratio of means, by the delta method (Cochran, Sampling Techniques, 6.4).
    has = counts > 0
    number = int(has.sum())
    if number < 2:
        return Difference(mean, by_seed, math.inf)
    residuals = (rows - mean * counts)[has]
    error = math.sqrt(float(np.square(residuals).sum()) * number / (number - 1)) / float(total)
    return Difference(mean, by_seed, error)


def holm(confidences: Sequence[float], level: float = 0.95) -> list[bool]:
    """Which of several statements hold at once with `level` (Holm, Scand. J. Statist. 6, 1979):
    the surest one must be sure against all, the next against the rest, until one is not.
    """
    found = [False] * len(confidences)
    order = sorted(range(len(confidences)), key=lambda i: (-confidences[i], i))
    for place, i in enumerate(order):
        if 1 - confidences[i] > (1 - level) / (len(order) - place):
            break
        found[i] = True
    return found
