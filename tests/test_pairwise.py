"""A pairwise cover leaves no two values apart that stand together in the product."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.pairwise import cover, some_daily


def pairs(cases) -> set:
    return {pair for case in cases for pair in combinations(enumerate(case), 2)}


@pytest.mark.parametrize(
    "columns", [("ab", (0, 1, 2, 3), (1, 2), (0.0, 0.5), "xyz"), ("ab", "cd"), ((1,), (2,))]
)
def test_every_two_values_meet_in_few_cases(columns):
    whole = list(product(*columns))
    chosen = list(cover(whole))
    assert set(chosen) <= set(whole) and pairs(chosen) == pairs(whole)
    largest, second = sorted(map(len, columns))[:-3:-1]
    assert largest * second <= len(chosen) <= min(len(whole), 2 * largest * second)


def test_pairs_that_are_not_allowed_are_not_asked_for():
    allowed = [case for case in product("ab", "cd", "ef") if case[:2] != ("a", "c")]
    chosen = list(cover(allowed))
    assert pairs(chosen) == pairs(allowed) and chosen == list(cover(allowed))


def test_of_every_few_cases_the_first_is_daily_and_all_others_nightly():
    cases = ["a", (1, 2), pytest.param("b", id="of b"), {"values": 1}, "c"]
    marked = some_daily(cases, 3)
    assert marked[0] == "a" and marked[3] == {"values": 1}
    nightly = [marked[i] for i in (1, 2, 4)]
    assert [case.values for case in nightly] == [(1, 2), ("b",), ("c",)]
    assert [case.id for case in nightly] == [None, "of b", None]
    assert all(mark.name == "nightly" for case in nightly for mark in case.marks)
    assert all(case.marks for case in nightly)
