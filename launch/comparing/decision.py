"""What is decided by the losses and costs of the variants at the largest size, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.comparing.intervals import Difference, holm

LEVEL = 0.95


@dataclass(frozen=True)
class Candidate:
    """A variant beside the first one."""

    name: str
    difference: Difference | None
    """Of its loss to the first's, over the seeds that both have; None: one of them has failed."""
    cost_ratio: float | None
    """Of its cost to the first's: the upper end of the interval where the cost is measured; None:
    not known.
    """
    seconds: float
    """Of one of its runs."""
    failed: int = 0
    """Runs that failed."""


@dataclass(frozen=True)
class Decision:
    """What the page says first."""

    kind: str
    """recommended, undecided, or failed: the first variant has no whole set of runs."""
    variant: str | None
    """The one that is recommended."""
    sentence: str
    reasons: tuple[str, ...]
    flips: str
    """What would change it."""
    more_seeds: int | None = None
    """Undecided: how many more would decide it; None: no number up to a thousand, or not known."""
    more_seconds: float | None = None


@dataclass(frozen=True)
class _Judged:
    """A candidate whose loss is known, and what holds of it at once with the others (Holm)."""

    candidate: Candidate
    difference: Difference
    better: bool
    worse: bool
    not_worse: bool
    """By more than the margin."""
    not_better: bool
    """By more than the margin."""
    worse_by_margin: bool
    saves: bool
    """Cost."""

    @property
    def is_settled(self) -> bool:
        """Whether it is known that the first variant need not give way to it."""
        return self.worse_by_margin if self.saves else self.not_better

    @property
    def name(self) -> str:
        return self.candidate.name


def decide(
    first: str,
    candidates: Sequence[Candidate],
    margin: float,
    cost: str,
    saving: float,
    first_seconds: float,
    first_failed: int = 0,
    pairs: Mapping[tuple[str, str], Difference] | None = None,
) -> Decision:
    """Recommend a variant where its held-out loss is lower with 95% confidence at equal training
    FLOPs; or where it is not higher by more than the margin and its cost lower by `saving` at
    least; or the first one where no other can be either. All statements about several variants hold
    at once (Holm). What is not known is undecided, with the runs that would decide it.

    Args:
        margin: nats per token; first_seconds: of one run of the first variant; first_failed: its
            runs that failed; pairs: differences between two candidates, (a, b) -> loss of a to b.
    """
    if first_failed or not candidates:
        why = (
            f"{first_failed} of the runs of {first} failed, which the others are compared with"
            if first_failed
            else f"{first} stands alone"
        )
        return Decision("failed", None, f"Nothing is decided: {why}.", (), "Other runs.")

    judged = _judged(candidates, margin, saving)
    left = [c for c in candidates if c.difference is None]
    notes = tuple(
        f"{c.name} is out: {c.failed} of its runs failed."
        if c.failed
        else f"{c.name} is out: it has no loss."
        for c in left
    )
    if not judged:
        told = "Nothing is decided: no variant beside the first has a whole set of runs."
        return Decision("failed", None, told, notes, "Runs that do not fail.")

    winners = [j for j in judged if j.better]
    if winners:
        best = min(winners, key=lambda j: j.difference.mean)
        return _better(first, best, judged, notes, pairs or {})
    thrifty = [j for j in judged if j.not_worse and j.saves]
    if thrifty:
        best = min(thrifty, key=lambda j: (j.candidate.cost_ratio or 1.0, j.name))
        return _thrifty(first, best, margin, cost, notes)
    if all(j.is_settled for j in judged):
        return _first(first, judged, margin, notes)
    return _undecided(first, judged, margin, saving, first_seconds, notes)


def _judged(candidates: Sequence[Candidate], margin: float, saving: float) -> list[_Judged]:
    known = [(c, c.difference) for c in candidates if c.difference is not None]

    def at_once(limit: float, below: bool) -> list[bool]:
        sure = [d.below(limit) for _, d in known]
        return holm(sure if below else [1 - p for p in sure], LEVEL)

    better, worse = at_once(0.0, True), at_once(0.0, False)
    not_worse, worse_by_margin = at_once(margin, True), at_once(margin, False)
    not_better = at_once(-margin, False)
    return [
        _Judged(
            candidate=c,
            difference=d,
            better=better[i],
            worse=worse[i],
            not_worse=not_worse[i],
            not_better=not_better[i],
            worse_by_margin=worse_by_margin[i],
            saves=c.cost_ratio is not None and c.cost_ratio <= 1 - saving,
        )
        for i, (c, d) in enumerate(known)
    ]


def told(d: Difference) -> str:
    """A difference with its interval."""
    low, high = d.interval()
    if math.isinf(low):
        return f"{d.mean:+.4f} nats (one seed: no interval)"
    return f"{d.mean:+.4f} nats [{low:+.4f}, {high:+.4f}]"


def _better(
    first: str,
    best: _Judged,
    judged: Sequence[_Judged],
    notes: tuple[str, ...],
    pairs: Mapping[tuple[str, str], Difference],
) -> Decision:
    d = best.difference
    reasons = [
        f"At equal training FLOPs its held-out loss differs from that of {first} by {told(d)}, 95% "
        f"over {d.seeds} seeds and the held-out text; it is lower with probability "
        f"{d.below(0.0):.3f}."
    ]
    for other in judged:
        between = pairs.get((best.name, other.name))
        if other.name != best.name and between is not None and between.below(0.0) < LEVEL:
            reasons.append(f"It is not told apart from {other.name}: {told(between)}.")
    flips = (
        f"New seeds whose mean difference is above 0 instead of {d.mean:+.4f} nats; the nearer end "
        f"of the interval is {-d.interval()[1]:.4f} away from that."
    )
    sentence = f"Take {best.name}: its loss is lower than that of {first}."
    return Decision("recommended", best.name, sentence, (*reasons, *notes), flips)


def _thrifty(
    first: str, best: _Judged, margin: float, cost: str, notes: tuple[str, ...]
) -> Decision:
    d, ratio = best.difference, best.candidate.cost_ratio
    assert ratio is not None
    reasons = (
        f"Its held-out loss differs from that of {first} by {told(d)}: it is not higher by more "
        f"than the margin of {margin:g} nats, with probability {d.below(margin):.3f}.",
        f"Its {cost} of inference are at most {ratio:.2f} of those of {first}.",
        *notes,
    )
    flips = (
        f"A margin below {max(d.interval()[1], 0.0):.4f} nats, or a wish for more than "
        f"{1 - ratio:.0%} less {cost}."
    )
    sentence = f"Take {best.name}: its loss is that of {first} within the margin, for less {cost}."
    return Decision("recommended", best.name, sentence, reasons, flips)


def _first(
    first: str, judged: Sequence[_Judged], margin: float, notes: tuple[str, ...]
) -> Decision:
    reasons = tuple(
        f"{j.name} differs by {told(j.difference)}: "
        + (
            "its loss is higher."
            if j.worse
            else f"its loss is not lower by more than {margin:g} nats, and it does not save enough."
        )
        for j in judged
    )
    nearest = min(judged, key=lambda j: j.difference.mean)
    flips = (
        f"{nearest.name} at a loss lower by {nearest.difference.mean + margin:.4f} nats than it "
        "was measured."
    )
    sentence = f"Stay with {first}: no other variant gains more than the margin."
    return Decision("recommended", first, sentence, (*reasons, *notes), flips)


def _undecided(
    first: str,
    judged: Sequence[_Judged],
    margin: float,
    saving: float,
    first_seconds: float,
    notes: tuple[str, ...],
) -> Decision:
    open_ = [j for j in judged if not j.is_settled]
    confidence = 1 - (1 - LEVEL) / len(judged)
    reasons, more = [], 0
    is_known = True
    for j in open_:
        d = j.difference
        needed = d.seeds_for(_width(d, margin, j.saves), confidence)
        text = f"{j.name} differs from {first} by {told(d)}: neither better nor settled."
        if needed is None:
            is_known = False
            text += (
                " Two seeds at least are needed to know the spread."
                if d.seeds < 2
                else f" The held-out text alone leaves an error of {d.text_error:.4f} nats, or the "
                "difference lies where no number of seeds up to 1000 tells the sides apart."
            )
        else:
            number = max(1, needed - d.seeds)
            more = max(more, number)
            text += f" With the measured spread of {d.spread:.4f}, {number} more seeds decide it."
        reasons.append(text)
    reasons += [f"{j.name} is settled: {told(j.difference)}." for j in judged if j.is_settled]
    seconds = more * (first_seconds + sum(j.candidate.seconds for j in open_))
    if is_known:
        sentence = f"Undecided: {more} more seed{'s' * (more > 1)} cost {_hours(seconds)}."
    elif any(j.difference.seeds < 2 for j in open_):
        more, seconds = 1, first_seconds + sum(j.candidate.seconds for j in open_)
        sentence = f"Undecided: one more seed, which costs {_hours(seconds)}, shows the spread."
        is_known = True
    else:
        sentence = "Undecided, and more seeds alone would not decide it."
    flips = (
        f"A lower loss with 95% confidence, or a loss within {margin:g} nats at {saving:.0%} less "
        "cost."
    )
    return Decision(
        "undecided",
        None,
        sentence,
        (*reasons, *notes),
        flips,
        more if is_known else None,
        seconds if is_known else None,
    )


def _width(d: Difference, margin: float, saves: bool) -> float:
    """How near its mean a bound must come for the difference to be decided either way."""
    if saves:
        return abs(margin - d.mean)  # below the margin, or above it
    return max(-d.mean, d.mean + margin)  # below 0, or not below -margin


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours >= 1 else f"{seconds / 60:.1f} minutes ({hours:.2f} hours)"
