"""The Triton kernels of the grouped MLP in Triton's interpreter against
ops/grouped_mlp/reference.py.

Cases: tests/ops/interpreter/grouped_mlp_cases.py.
"""

from __future__ import annotations

import pytest

from tests.pairwise import some_daily

pytest.importorskip("triton", reason="triton has wheels for Linux only")


@pytest.mark.slow
@pytest.mark.parametrize("cases", some_daily(["float32/4", "float32"]))
def test_output_and_every_gradient_match_the_definition(interpret, cases) -> None:
    interpret("grouped_mlp_cases.py", cases)


@pytest.mark.slow
@pytest.mark.parametrize("cases", some_daily(["half/4", "half"]))
def test_output_and_every_gradient_match_the_definition_in_half_precision(interpret, cases) -> None:
    interpret("grouped_mlp_cases.py", cases)


@pytest.mark.slow
def test_weights_of_8_bits_are_scaled_where_their_products_end(interpret) -> None:
    interpret("grouped_mlp_cases.py", "stored")


@pytest.mark.slow
@pytest.mark.parametrize("cases", some_daily(["fp8/4", "fp8"]))
def test_products_of_8_bit_floats_match_the_definition(interpret, cases) -> None:
    interpret("grouped_mlp_cases.py", cases)


@pytest.mark.slow
@pytest.mark.parametrize("cases", some_daily(["fp8_all/3", "fp8_all"]))
def test_rounded_tiles_and_gradients_made_of_them_match_the_definition(interpret, cases) -> None:
    interpret("grouped_mlp_cases.py", cases)
