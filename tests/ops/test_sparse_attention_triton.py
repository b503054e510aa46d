"""The Triton kernels of sparse attention in Triton's interpreter against
ops/sparse_attention/reference.py.

Cases: tests/ops/interpreter/attention_cases.py.
"""

from __future__ import annotations

import pytest

from tests.pairwise import some_daily

pytest.importorskip("triton", reason="triton has wheels for Linux only")


@pytest.mark.slow
@pytest.mark.parametrize("cases", some_daily(["attend/4", "attend"]))
def test_attention_and_every_gradient_match_the_definition(interpret, cases) -> None:
    interpret("attention_cases.py", cases)


@pytest.mark.slow
@pytest.mark.parametrize("cases", some_daily(["half/4", "half"]))
def test_attention_matches_the_definition_in_half_precision(interpret, cases) -> None:
    interpret("attention_cases.py", cases)


@pytest.mark.slow
def test_pooling_and_ranking_match_the_definition(interpret) -> None:
    interpret("attention_cases.py", "pool", "rank", "ties")


@pytest.mark.slow
def test_sets_of_queries_add_up_to_the_whole(interpret) -> None:
    interpret("attention_cases.py", "queries")


@pytest.mark.slow
def test_decoding_matches_the_last_token_of_the_definition(interpret) -> None:
    interpret("attention_cases.py", "decode")


def test_the_shim_is_needed(interpret) -> None:
    """The interpreter alone is silently wrong in bf16; once it is not,
    tests/ops/interpreter/shim.py can go.
    """
    assert float(interpret("raw_bf16.py")) > 1.0
    assert float(interpret("raw_bf16.py", "shim")) < 1e-4
