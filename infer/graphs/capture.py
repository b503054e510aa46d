"""The seam to CUDA graphs: something that runs becomes something that is replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

WARM_UPS = 2
"""Runs before a capture: libraries make workspaces and kernels are compiled in the first ones."""

Replay = Callable[[], None]


class CaptureError(RuntimeError):
    """A step cannot be captured: something in it waits for the host, or memory is short."""


class Capture(Protocol):
    """Records what `run` does on the device, as kernels on the memory that they had.

    It may call `run` several times: to warm up, which computes, and to record, which need not. What
    it gives back does the same work again on the numbers that stand in that memory then.

    Raises:
        CaptureError: the device cannot record it.
    """

    def __call__(self, run: Callable[[], None]) -> Replay: ...


class CudaCapture:
    """torch.cuda.CUDAGraph, with one pool of memory for all graphs: they run one after the other,
    and what one leaves in the pool nobody reads.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Replay:
        present = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(present)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                run()
        present.wait_stream(self.stream)

        # A server has other threads, whose calls are no part of what is recorded here.
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                run()
        except RuntimeError as error:
            raise CaptureError(f"the capture failed ({type(error).__name__}: {error})") from error
        replay: Replay = graph.replay
        return replay
