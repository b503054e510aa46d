"""The kernels that gather chosen rows, in Triton's interpreter, against
ops/gather_attention/reference.py and the plain torch of the ops that start them.

Cases: tests/ops/interpreter/gather_cases.py.
"""

from __future__ import annotations

import pytest
import torch

from ops.gather_attention import pick_backend
from tests.pairwise import some_daily

pytest.importorskip("triton", reason="triton has wheels for Linux only")


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    some_daily(
        [
            pytest.param(("kernels/5", "ops/3", "lookup/2", "held/3")),
            pytest.param(("kernels", "half", "ops", "lookup", "held")),
        ]
    ),
    ids=" ".join,
)
def test_attention_masses_and_every_gradient_match_the_definition(interpret, cases) -> None:
    interpret("gather_cases.py", *cases)


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "head_dim", "span", "taken"),
    [
        (None, "cpu", torch.bfloat16, 128, 1, "torch"),
        (None, "cuda", torch.bfloat16, 512, 4, "triton"),
        (None, "cuda", torch.float32, 128, 1, "triton"),
        (None, "cuda", torch.float32, 256, 1, "torch"),
        (None, "cuda", torch.float64, 128, 1, "torch"),
        (None, "cuda", torch.float16, 96, 1, "torch"),
        (None, "cuda", torch.float16, 128, 3, "torch"),
        ("torch", "cuda", torch.float16, 128, 1, "torch"),
        ("triton", "cpu", torch.float32, 16, 2, "triton"),
    ],
    ids=str,
)
def test_kernels_take_what_they_are_built_for(asked, device, dtype, head_dim, span, taken) -> None:
    assert pick_backend(asked, torch.device(device), dtype, head_dim, span) == taken


@pytest.mark.parametrize(
    ("asked", "dtype", "head_dim", "span", "said"),
    [
        ("cutlass", torch.float32, 128, 1, "backend is 'cutlass'; choose one of triton, torch"),
        ("triton", torch.float64, 128, 1, "float64 is not what the kernels compute in"),
        ("triton", torch.float32, 96, 1, "head_dim is 96"),
        ("triton", torch.float32, 64, 6, "6 rows are chosen together"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(asked, dtype, head_dim, span, said) -> None:
    with pytest.raises(ValueError, match=said):
        pick_backend(asked, torch.device("cpu"), dtype, head_dim, span)
