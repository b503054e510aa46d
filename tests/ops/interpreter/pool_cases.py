"""Worker of tests/ops/test_compressed_pool_triton.py, run by path with TRITON_INTERPRET=1: the
kernels of the gated pool in Triton's interpreter, against its definition. Arguments: names of
groups of cases; prints one line per failure.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from dataclasses import dataclass, replace

import shim  # noqa: F401
import torch
from torch import Tensor

from ops.compressed_attention import closed_windows, gated_pool
from ops.compressed_attention.reference import reference_pool
from ops.testing import assert_close, poisoned_memory

torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    bounds: tuple[int, ...] = (0, 14, 14, 15, 18, 41, 43)
    """Documents that end within a window, with one, and before the first is closed."""
    size: int = 4
    width: int = 6
    overlap: bool = False
    dtype: torch.dtype = torch.float32
    sharp: bool = False
    """Gates of which one takes everything, and some that are -inf."""


FIRST = {
    "windows": Case(),
    "windows that overlap": Case(overlap=True),
}
MORE = {
    "many windows, three tokens": Case((0, 80, 101), 3, 5, overlap=True),
    "long windows": Case((0, 67, 72), 32, 3),
    "sharp gates": Case(overlap=True, sharp=True),
    "one window": Case((0, 4), overlap=True),
    "a document at an end of the row": Case((0, 2, 10), overlap=True),
    "no window is closed": Case((0, 3, 5), overlap=True),
    "no tokens": Case((0, 0)),
    **{
        f"{name} {dtype}": replace(case, dtype=dtype)
        for name, case in FIRST.items()
        for dtype in (torch.bfloat16, torch.float16)
    },
}


def check(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    bounds, length = list(case.bounds), case.bounds[-1]
    row = case.width * (2 if case.overlap else 1)
    # parts of wider rows, as the model has them
    rows = torch.randn(length, 2 * row + 1, generator=generator).to(case.dtype)
    content, gates = rows[:, :row], rows[:, row : 2 * row]
    bias = torch.randn(case.size, row, generator=generator)
    if case.sharp:
        gates.mul_(60.0)
        gates[::3] = torch.where(gates[::3] < 0, -math.inf, gates[::3])
    windows = closed_windows(bounds, case.size, torch.device("cpu"))
    into = torch.randn(len(windows.starts), case.width, generator=generator).to(case.dtype)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [
            content.to(dtype),
            gates.to(dtype),
            bias.to(bias.dtype if backend == "triton" else dtype),
        ]
        leaves = [x.detach().requires_grad_() for x in leaves]
        found = gated_pool(*leaves, windows, case.overlap, backend)
        return [found.detach(), *torch.autograd.grad(found, leaves, into.to(dtype))]

    with poisoned_memory():
        ours, again = run("triton", case.dtype), run("triton", case.dtype)
    theirs = run("torch", torch.float64)
    for name, one, two, expected in zip(
        ("entries", "content", "gates", "bias"), ours, again, theirs, strict=True
    ):
        assert torch.equal(one, two), f"{name} differ from one run to the next"
        assert_close(name, one, expected, case.dtype)
    exact = [x.double() for x in (content, gates, bias)]
    assert_close(
        "definition", ours[0], reference_pool(*exact, bounds, case.size, case.overlap), case.dtype
    )


GROUPS = {"first": FIRST, "more": MORE}


def main(groups: list[str]) -> int:
    failed = False
    for group, name in [(asked, name) for asked in groups for name in GROUPS[asked]]:
        start = time.process_time()
        try:
            check(GROUPS[group][name])
        except Exception as error:
            failed = True
            print(f"FAILED {group} / {name}: {error}\n{traceback.format_exc()}", flush=True)
        print(f"{group} / {name}: {time.process_time() - start:.1f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
