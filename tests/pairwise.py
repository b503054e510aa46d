"""What runs daily of many cases: those in which every two values of two columns meet, or every so
many of like ones; all run nightly.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

import pytest


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


def some_daily(cases: Sequence[Any], one_in: int = 2) -> list[Any]:
    """Arguments of parametrize, of which the first of every `one_in` runs daily and the others
    nightly. For cases of one rule that each cost seconds: what is new may well fall to the night.

    cases: of several arguments as tuples or pytest.param, of one as they are.
    """
    daily = []
    for number, case in enumerate(cases):
        if number % one_in:
            named = isinstance(case, type(pytest.param()))
            values = case.values if named else case if isinstance(case, tuple) else (case,)
            name = case.id if named else None
            case = pytest.param(*values, id=name, marks=[pytest.mark.nightly])
        daily.append(case)
    return daily
