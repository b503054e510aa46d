"""What the times of requests say. Definitions: docs/how_to/benchmark.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

Z = 0.95
"""Coverage of intervals."""


@dataclass(frozen=True)
class RequestTimes:
    """Of one request, in seconds of one clock."""

    arrived: float
    tokens: tuple[float, ...]
    """When each generated token was known; none: it was given up."""

    @property
    def first(self) -> float:
        """Time to the first token (TTFT), waiting included; infinite where there is none."""
        return self.tokens[0] - self.arrived if self.tokens else math.inf

    @property
    def between(self) -> list[float]:
        """From each token to the next (ITL)."""
        return [after - before for before, after in itertools.pairwise(self.tokens)]

    @property
    def per_token(self) -> float:
        """Mean between its tokens (TPOT), one value a request; infinite where there is no mean."""
        number = len(self.tokens) - 1
        return (self.tokens[-1] - self.tokens[0]) / number if number > 0 else math.inf


@dataclass(frozen=True)
class Speed:
    """Of the requests of one round."""

    ttft_p50: float
    """Seconds, as the following ones."""
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    tpot_p50: float
    tokens_per_second: float
    """Generated, over all requests."""
    total_tokens_per_second: float
    """With those of the prompts."""
    goodput: float
    """Requests a second that keep both limits; one that was given up counts as missed."""


def speed_of(
    requests: Sequence[RequestTimes], prompt_tokens: int, ttft: float, tpot: float
) -> Speed:
    """Args: prompt_tokens: of all requests; ttft, tpot: the limits, in seconds."""
    begin = min(r.arrived for r in requests)
    end = max((r.tokens[-1] for r in requests if r.tokens), default=begin)
    seconds = max(end - begin, 1e-9)
    between = sorted(x for r in requests for x in r.between)
    first = sorted(r.first for r in requests)
    generated = sum(len(r.tokens) for r in requests)
    met = sum(r.first <= ttft and r.per_token <= tpot for r in requests)
    return Speed(
        ttft_p50=quantile(first, 0.5),
        ttft_p99=quantile(first, 0.99),
        itl_p50=quantile(between, 0.5),
        itl_p99=quantile(between, 0.99),
        tpot_p50=quantile(sorted(r.per_token for r in requests), 0.5),
        tokens_per_second=generated / seconds,
        total_tokens_per_second=(generated + prompt_tokens) / seconds,
        goodput=met / seconds,
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The least value that `share` of them do not exceed; NaN of none."""
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median with 95% at least, whatever the distribution: order
    statistics of the sample (Conover, Practical Nonparametric Statistics, 3.2). It needs six
    values; of fewer it is infinite.
    """
    ordered, number = sorted(values), len(values)
    outside, rank = 0.0, 0
    # Below the value of rank k are fewer than k + 1 with the probability of a binomial's tail.
    while rank < number // 2:
        outside += math.comb(number, rank) / 2**number
        if 2 * outside > 1 - Z:
            break
        rank += 1
    return (-math.inf, math.inf) if rank == 0 else (ordered[rank - 1], ordered[number - rank])


@dataclass(frozen=True)
class Ratio:
    """Of a variant to the first one, round by round."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """To the farther end, as a share."""
        return max(self.high - self.median, self.median - self.low) / self.median


def ratio_of(values: Sequence[float], base: Sequence[float]) -> Ratio:
    """Of two variants' numbers of the same rounds: what disturbs a round hits both."""
    ratios = [value / b for value, b in zip(values, base, strict=True)]
    return Ratio(median(ratios), *median_interval(ratios))
