"""The Triton kernels of sparse attention in Triton's interpreter against ops/sparse_attention/reference.py.

TRITON_INTERPRET is read when a kernel is decorated and would spoil compilation in the same process, and a wild pointer would
take the test run with it: cases run in processes of their own, many in each (tests/ops/interpreter/attention_cases.py).
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


def interpret(script: str, *arguments: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                                "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(WORKERS / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_attention_and_every_gradient_match_the_definition() -> None:
    interpret("attention_cases.py", "attend")


@pytest.mark.slow
def test_attention_matches_the_definition_in_half_precision() -> None:
    interpret("attention_cases.py", "half")


@pytest.mark.slow
def test_pooling_and_ranking_match_the_definition() -> None:
    interpret("attention_cases.py", "pool", "rank", "ties")


@pytest.mark.slow
def test_decoding_matches_the_last_token_of_the_definition() -> None:
    interpret("attention_cases.py", "decode")


def test_the_shim_is_needed() -> None:
    """The interpreter alone is silently wrong in bf16; once it is not, tests/ops/interpreter/shim.py can go."""
    assert float(interpret("raw_bf16.py")) > 1.0
    assert float(interpret("raw_bf16.py", "shim")) < 1e-4
