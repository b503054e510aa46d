"""The Triton kernels of the grouped MLP in Triton's interpreter against
ops/grouped_mlp/reference.py.

Cases: tests/ops/interpreter/grouped_mlp_cases.py.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")


@pytest.mark.slow
def test_output_and_every_gradient_match_the_definition(interpret) -> None:
    interpret("grouped_mlp_cases.py", "float32")


@pytest.mark.slow
def test_output_and_every_gradient_match_the_definition_in_half_precision(interpret) -> None:
    interpret("grouped_mlp_cases.py", "half")


@pytest.mark.slow
def test_weights_of_8_bits_are_scaled_where_their_products_end(interpret) -> None:
    interpret("grouped_mlp_cases.py", "int8")


@pytest.mark.slow
def test_products_of_8_bit_floats_match_the_definition(interpret) -> None:
    interpret("grouped_mlp_cases.py", "fp8")
