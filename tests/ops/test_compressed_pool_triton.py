"""The kernels of the gated pool in Triton's interpreter, against
ops/compressed_attention/reference.py.

Cases: tests/ops/interpreter/pool_cases.py.
"""

from __future__ import annotations

import pytest
import torch

from ops.compressed_attention import closed_windows, gated_pool
from tests.pairwise import some_daily

pytest.importorskip("triton", reason="triton has wheels for Linux only")


@pytest.mark.slow
@pytest.mark.parametrize("cases", some_daily(["first", "more"]))
def test_entries_and_their_gradients_match_the_definition(interpret, cases) -> None:
    interpret("pool_cases.py", cases)


def test_what_the_kernels_cannot_take_is_refused() -> None:
    windows = closed_windows([0, 8], 4, torch.device("cpu"))
    rows = torch.zeros(8, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64 is not what the kernels compute in"):
        gated_pool(rows, rows, rows[:4], windows, True, "triton")
    with pytest.raises(ValueError, match="backend is 'cpp'; choose one of triton, torch"):
        gated_pool(rows, rows, rows[:4], windows, True, "cpp")
