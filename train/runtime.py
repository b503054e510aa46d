"""Start and stop of a training process: process group, device, seeds, determinism, logging, stop signals."""

from __future__ import annotations

import datetime
import logging
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
import torch.distributed as dist

from model.parallel import destroy_parallel

log = logging.getLogger("loadstone")
T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def process_group(timeout_seconds: int) -> Iterator[torch.device]:
    """Join the job's process group (or make one of a single process); yields this rank's device."""
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port())}
    added = {name: value for name, value in single.items() if name not in os.environ}
    os.environ.update(added)
    if torch.cuda.is_available():
        # Some schedulers show each task only its own device.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cuda:nccl,cpu:gloo"
    else:
        device, backend = torch.device("cpu"), "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))
    logging.basicConfig(level=logging.INFO if dist.get_rank() == 0 else logging.ERROR, format="%(message)s")
    for noisy in ("megatron", "httpx", "datasets", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        yield device
    except SystemExit:  # raised by all ranks alike
        _leave(added)
        raise
    # After any other exception there is no clean-up: peers may be inside a collective, and it would wait for them.
    _leave(added)


def _leave(added: dict[str, str]) -> None:
    destroy_parallel()
    dist.destroy_process_group()
    for name in added:  # a sweep runs several jobs in one process
        os.environ.pop(name, None)


def seed_everything(seed: int, rank: int, deterministic: bool) -> None:
    """Different random streams per rank; `deterministic` refuses nondeterministic kernels."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def from_rank_zero(function: Callable[[], T]) -> T:
    """Call the function on rank 0 and return its result on every rank. Collective.

    Raises:
        ValueError: on every rank, with rank 0's message, when the call failed there; no rank is left waiting.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer = [function(), None]
        except Exception as error:
            answer = [None, str(error) or type(error).__name__]
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


class StopSignal:
    """Remembers SIGTERM and SIGUSR1, which ask to save and end; the loop agrees on the step with all ranks.

    A rank whose launching process (LOADSTONE_PARENT) is gone is asked to end as well, so that no job runs on unowned.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._parent = int(os.environ.get("LOADSTONE_PARENT", "0"))
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGUSR1)}

    @property
    def received(self) -> bool:
        if self._parent and not psutil.pid_exists(self._parent):
            self._signalled = True
        return self._signalled

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self._signalled = True
