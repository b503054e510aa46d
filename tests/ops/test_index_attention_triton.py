"""The kernels of an index's scores, choice and gradients, in Triton's interpreter, against
ops/index_attention/reference.py and the plain torch of that op.

Cases: tests/ops/interpreter/index_cases.py.
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
            pytest.param(
                ("largest", "choice/2", "scores/3", "grads/3", "within/2", "taught/4", "far")
            ),
            pytest.param(
                (
                    *("chunks", "choice", "scores", "grads", "within", "tiles"),
                    *("taught", "taught in parts", "dense"),
                )
            ),
        ]
    ),
    ids=" ".join,
)
def test_scores_choice_and_gradients_match_the_definition(interpret, cases) -> None:
    interpret("index_cases.py", *cases)


@pytest.mark.parametrize(
    ("dtype", "width", "taken"),
    [
        (torch.bfloat16, 256, "triton"),
        (torch.bfloat16, 257, "torch"),
        (torch.float32, 128, "triton"),
        (torch.float32, 129, "torch"),
        (torch.float64, 64, "torch"),
    ],
)
def test_an_index_is_taken_up_to_the_width_that_its_kernels_hold(dtype, width, taken) -> None:
    device = torch.device("cuda")
    assert pick_backend(None, device, dtype, 128, 1, width) == taken
    assert pick_backend(None, device, dtype, None, 64, width) == taken
    if taken == "torch":
        with pytest.raises(
            ValueError, match=r"backend=triton cannot take this call: .*(257|129|float64)"
        ):
            pick_backend("triton", device, dtype, 128, 1, width)
