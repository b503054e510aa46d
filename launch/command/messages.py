"""What a command says: its errors, each with the exit code of its kind, and its result."""

from __future__ import annotations

import errno
import sys
from typing import Any, NoReturn

from launch.process.exits import BAD_CONFIG
from launch.process.identity import rank
from launch.process.secrets import redact_text
from train.files.strict_json import dumps
from train.rank.errors import is_ours


def failure_of(error: BaseException) -> str:
    """Which kind of failure (launch/process/exits.py) an exception means for the job."""
    from train.checkpoint.folder import CheckpointsGoneError, NoSuchCheckpointError
    from train.files.manifest import CheckpointError
    from train.guard.alarms import AlarmStop
    from train.rank.lock import RunLocked
    from train.rank.ports import RendezvousError

    if isinstance(error, _of_torch("train.guard.nonfinite", "NonFiniteError")):
        return "non_finite"
    if isinstance(error, AlarmStop):
        return "alarm"
    if isinstance(error, (IsADirectoryError, NotADirectoryError)):
        return "config"  # where a file should be; another attempt meets it again
    if isinstance(
        error, _of_torch("train.checkpoint.agreement", "CheckpointWriteError")
    ) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return "disk_full"

    if isinstance(error, CheckpointsGoneError):
        return "gone"
    if isinstance(error, NoSuchCheckpointError):
        return "config"
    if isinstance(error, CheckpointError):
        return "checkpoint"
    if isinstance(error, RunLocked):
        return "in_use"
    if isinstance(error, RendezvousError):
        return "rendezvous"

    if isinstance(error, (ValueError, FileNotFoundError)) and is_ours(error):
        return "config"

    if is_out_of_memory(error):
        return "out_of_memory"

    # Back-ends raise plain RuntimeErrors when a peer is gone: only their words tell.
    lost = (
        "gloo",
        "NCCL",
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Socket Timeout",
    )
    if isinstance(error, _of_torch("torch.distributed", "DistError")) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in lost)
    ):
        return "communication"

    return "failed"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host. torch has a class for its CUDA
    allocator alone; of the others only their words tell.
    """
    words = (
        "can't allocate memory",  # torch's allocator of the CPU
        "CUDA out of memory",
        "CUDA error: out of memory",
        "std::bad_alloc",
        "Cannot allocate memory",
    )
    return (
        isinstance(error, (MemoryError, _of_torch("torch", "OutOfMemoryError")))
        or getattr(error, "errno", None) == errno.ENOMEM
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
    )


def _of_torch(module: str, name: str) -> type[BaseException] | tuple[()]:
    """An exception class of a module that imports torch, for isinstance; nothing where the module
    was never imported, since then nobody can have raised it.
    """
    return getattr(sys.modules.get(module), name, ())


def fail(problems: list[str], every_rank: bool = False, code: int = BAD_CONFIG) -> NoReturn:
    """Print the problems and end with the exit code. Those that all ranks see are printed by rank 0
    only.
    """
    if rank() == 0 or every_rank:
        for problem in problems:
            print(
                "error: " if rank() == 0 else f"error (rank {rank()}): ",
                redact_text(problem),
                sep="",
                file=sys.stderr,
                flush=True,
            )
    raise SystemExit(code)


def print_result(result: dict[str, Any]) -> None:
    """The last line on stdout: one JSON object."""
    sys.stderr.flush()
    print(dumps(result), flush=True)
