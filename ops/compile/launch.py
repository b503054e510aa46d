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


def without_tma(target: int, *matrices: torch.Tensor) -> str | None:
    """Why the tensor memory accelerator of an architecture cannot load tiles of these contiguous
    matrices [..., width]; None: it can.
    """
    if target < 90:
        return f"sm_{target} has no tensor memory accelerator"
    for x in matrices:
        row = x.shape[-1] * x.element_size()
        if x.numel() == 0:
            return "a matrix has no values"
        if row % 16:
            return f"rows of {row} bytes are no multiple of 16"
        if x.data_ptr() % 16:
            return f"a matrix begins {x.data_ptr() % 16} bytes behind a multiple of 16"
    return None


@contextlib.contextmanager
def record_launches(architecture: int) -> Iterator[list[Launch]]:
    """Collect launches instead of starting them."""
    global _recorded, _recorded_for
    _recorded, _recorded_for = [], architecture
    try:
        yield _recorded
    finally:
        _recorded, _recorded_for = None, 90
