"""The Triton kernels of the grouped MLP in Triton's interpreter against ops/grouped_mlp/reference.py.

Cases run in processes of their own, many in each (tests/ops/interpreter/grouped_mlp_cases.py); why: the attention's tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")
WORKERS = Path(__file__).parent / "interpreter"
ROOT = Path(__file__).parents[2]


def interpret(*groups: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                                "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(WORKERS / "grouped_mlp_cases.py"), *groups]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_output_and_every_gradient_match_the_definition() -> None:
    interpret("float32")


@pytest.mark.slow
def test_output_and_every_gradient_match_the_definition_in_half_precision() -> None:
    interpret("half")
