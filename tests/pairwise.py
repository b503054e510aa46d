"""A few settings in which every two values of two columns meet, instead of their whole product."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from itertools import combinations


def cover(cases: Iterable[tuple[Hashable, ...]]) -> Iterator[tuple[Hashable, ...]]:
    """The cases among `cases`, greedily chosen, in which every pair of values that stands in one of
    them stands again.

    cases: tuples of equal length, one value per column; leave out those that are not allowed. The
        choice depends on their order only: ties go to the first.
    """
    left = {case: list(combinations(enumerate(case), 2)) for case in cases}
    missing = {pair for pairs in left.values() for pair in pairs}
    while missing:
        case = max(left, key=lambda c: sum(pair in missing for pair in left[c]))
        missing.difference_update(left.pop(case))
        yield case
