"""What torch.compile is told about our functions, without importing the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_compiled(function: Function) -> Function:
    """Mark `function` as torch.compiler.assume_constant_result does: torch.compile calls it once,
    while it traces, and keeps the result.

    torch's own decorator imports torch._dynamo on the spot, which costs a second of CPU time in
    every process, also in those that never compile anything. tests/ops/test_compiling.py holds that
    the mark is the one that torch sets.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
