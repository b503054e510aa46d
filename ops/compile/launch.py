"""Starting Triton kernels, or recording what would be started, to compile it ahead of time
(ops/compile/ahead_of_time.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


_recorded: list[Launch] | None = None
_recorded_for = 90


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start a kernel on the current stream; an empty grid starts nothing."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, args, options))
    elif all(grid):
        kernel[grid](*args, **options)


def architecture(device: torch.device) -> int:
    """The compute capability that tile sizes are chosen for: 80, 90, 100."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return _recorded_for


@contextlib.contextmanager
def record_launches(architecture: int) -> Iterator[list[Launch]]:
    """Collect launches instead of starting them."""
    global _recorded, _recorded_for
    _recorded, _recorded_for = [], architecture
    try:
        yield _recorded
    finally:
        _recorded, _recorded_for = None, 90
