"""Start and stop of a training process: process group, device, seeds, determinism, logging."""

from __future__ import annotations

import datetime
import errno
import ipaddress
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from model.parallel.groups import destroy_parallel
from train.rank.ports import STORE, RendezvousError, cannot_listen, free_port, listen
from train.rank.stop import Stopped

log = logging.getLogger("loadstone")
T = TypeVar("T")


@contextmanager
def process_group(timeout_seconds: int) -> Iterator[torch.device]:
    """Join the job's process group (or make one of a single process); yields this rank's device."""
    single = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }

    added: dict[str, str | None] = {}
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= set(os.environ):
        # Alone, whatever a scheduler has set for the ranks that a launcher was to start here.
        added = {name: os.environ.get(name) for name in single}
        os.environ.update(single)
    elif missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} does not know "
            f"where rank 0 listens: set {' and '.join(missing)}, the same for all ranks"
        )

    if torch.cuda.is_available():
        # Some schedulers show each task only its own device.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cuda:nccl,cpu:gloo"
    else:
        device, backend = torch.device("cpu"), "gloo"

    timeout = datetime.timedelta(seconds=timeout_seconds)
    # DeepSpeed makes groups that take no timeout; they would wait for torch's default instead of
    # the job's.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout

    if (store := _own_store(timeout)) is None:
        _meet_in_torchs_store(backend, timeout)
    else:
        dist.init_process_group(
            backend,
            timeout=timeout,
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )

    # Every rank would say the same; what goes wrong is said by each.
    logging.basicConfig(
        level=logging.INFO if dist.get_rank() == 0 else logging.ERROR, format="%(message)s"
    )
    for noisy in ("megatron", "httpx", "datasets", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)

    try:
        yield device
    except BaseException as error:
        if isinstance(error, SystemExit) or getattr(error, "on_all_ranks", False):
            _leave(added)
        raise
    # After any other exception there is no clean-up: peers may be inside a collective, and it would
    # wait for them.
    _leave(added)


def _meet_in_torchs_store(backend: str, timeout: datetime.timedelta) -> None:
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        raise RendezvousError(cannot_listen(address, port, errno.EADDRINUSE)) from error


def _own_store(timeout: datetime.timedelta) -> dist.Store | None:
    """Where the ranks find each other. Torch's own store listens on every interface and lets
    everybody read and write.

    One process needs none. The ranks of a supervisor on one machine use a file in a folder of their
    user's. On several machines rank 0 listens on MASTER_ADDR alone. None, torch's own: where a
    foreign torchrun keeps the store, or MASTER_ADDR is a name, which may mean loopback on its own
    host.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if int(os.environ["WORLD_SIZE"]) == 1:
        return dist.HashStore()

    if STORE in os.environ:
        store = dist.FileStore(os.environ[STORE], int(os.environ["WORLD_SIZE"]))
        store.set_timeout(timeout)
        return store

    try:
        ipaddress.ip_address(address)
    except ValueError:
        return None

    # torchrun's agent listens there already: a second server on its port would fail.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None

    is_server = os.environ["RANK"] == "0"
    listening = listen(address, port).detach() if is_server else None
    return dist.TCPStore(
        address,
        port,
        int(os.environ["WORLD_SIZE"]),
        is_server,
        timeout,
        master_listen_fd=listening,
    )


def _leave(added: dict[str, str | None]) -> None:
    destroy_parallel()
    dist.destroy_process_group()
    for name, before in added.items():  # a sweep runs several jobs in one process
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def seed_everything(seed: int, rank: int, deterministic: bool) -> None:
    """Different random streams per rank; bf16 products add up in fp32; `deterministic` refuses
    nondeterministic kernels.
    """
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
    # cuBLAS may otherwise split a bf16 product over its rows and add the parts up in bf16
    # (docs/numerics.md).
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def from_rank_zero(function: Callable[[], T]) -> T:
    """Call the function on rank 0 and return its result on every rank. Collective.

    Raises:
        ValueError: on every rank, with rank 0's message (and class, where it is one of ours), when
            the call failed there; no rank is left waiting.
        Stopped: on every rank, when rank 0 was asked to stop inside the call.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer = [function(), None]
        except Stopped:
            answer = [None, (Stopped, "")]
        except Exception as error:
            ours = isinstance(error, ValueError) and type(error).__module__.startswith("train.")
            kind = type(error) if ours else ValueError
            answer = [None, (kind, str(error) or type(error).__name__)]
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        kind, message = answer[1]
        raise kind(message)
    result: T = answer[0]
    return result
