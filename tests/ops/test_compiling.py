"""The compiler is told what it may assume, and is imported by those who compile only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ops.compiling import constant_when_compiled

ROOT = Path(__file__).resolve().parents[2]


def test_the_mark_is_the_one_that_torch_sets():
    def ours() -> bool:
        return True

    def theirs() -> bool:
        return True

    torch.compiler.assume_constant_result(theirs)
    assert vars(constant_when_compiled(ours)) == vars(theirs) != {}


def test_what_is_marked_is_called_while_tracing_only():
    calls = []

    @constant_when_compiled
    def factor() -> int:
        calls.append(1)
        return 3

    compiled = torch.compile(lambda x: x * factor(), fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(2)).tolist() == [3, 3] and compiled(torch.ones(2)).tolist() == [3, 3]
    assert len(calls) == 1


@pytest.mark.slow
def test_starting_a_command_does_not_import_the_compiler():
    """A second of CPU time in every process, a quarter of what a refusal costs."""
    code = (
        "import sys, launch.job.agent, launch.audit, launch.evaluate, launch.generate, "
        "launch.plan, launch.prepare\n"
        "import launch.train, model.transformer, train.engine, train.loop\n"
        "assert 'torch' in sys.modules and 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)
