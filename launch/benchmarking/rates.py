"""What the machine could do at most: multiplications and bytes a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ops.device import memory_bandwidth_tbs, peak_tflops

MATRIX, COPIED = 1024, 2**25
"""Rows of a square matrix; values of a copy, beyond any cache."""
ATTEMPTS = 5


@dataclass(frozen=True)
class Rates:
    """Of one device in one precision."""

    device: str
    flops: float
    """A second."""
    num_bytes: float
    """A second, read and written."""
    source: str
    """data sheet, or measured: the fastest of a few products and copies."""

    def seconds(self, flops: float, num_bytes: float) -> float:
        """The least time for so much of both (roofline)."""
        return max(flops / self.flops, num_bytes / self.num_bytes)


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """The vendor's where they are known and meant (half precision on a GPU), else measured."""
    name = name_of(device)
    if device.type == "cuda":
        peak, bandwidth = peak_tflops(name), memory_bandwidth_tbs(name)
        if peak is not None and bandwidth is not None and dtype != torch.float32:
            return Rates(name, peak * 1e12, bandwidth * 1e12, "data sheet")

    a, b = (torch.rand(MATRIX, MATRIX, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = _fastest(lambda: torch.mm(a, b, out=out), device)
    source = torch.zeros(COPIED, device=device)
    target = torch.ones_like(source)
    copy = _fastest(lambda: target.copy_(source), device)
    return Rates(name, 2 * MATRIX**3 / product, 2 * 4 * COPIED / copy, "measured")


def name_of(device: torch.device) -> str:
    """What a device is called where its speed was measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    found = []
    for _ in range(1 + ATTEMPTS):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin)
    return min(found[1:])
