"""One outcome on all ranks of work that each does on its own: everybody goes on, or everybody
raises the same error.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Failure(NamedTuple):
    """Why one rank could not do its part."""

    rank: int
    """Its number."""
    errno: int | None
    """None when it was no error of the operating system."""
    reason: str
    """In words."""


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; raised on every rank, with the rank, the path and the
    reason in the message.

    errno: of the operating system's error (ENOSPC, EIO, EROFS, ...), None for others.
    """

    on_all_ranks = True

    def __init__(self, path: Path, failure: Failure):
        super().__init__(f"rank {failure.rank} could not write {path}: {failure.reason}")
        self.path = path
        self.rank = failure.rank
        self.errno = failure.errno
        self.reason = failure.reason


def everyone(group: Any, path: Path, action: Callable[[], T]) -> list[T]:
    """Call `action` on every rank of the group and return all results, in rank order. Collective.

    Args:
        path: what is being written, for the message.

    Raises:
        CheckpointWriteError: on every rank, when the action failed on some; of the lowest such
            rank.
    """
    result: Any = None
    cause: Exception | None = None
    failure: Failure | None = None
    try:
        result = action()
    except Exception as error:
        cause, failure = error, describe(dist.get_rank(), error)
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (failure, result), group=group)
    failed = [outcome for outcome, _ in outcomes if outcome is not None]
    if failed:
        raise CheckpointWriteError(path, failed[0]) from cause
    return [value for _, value in outcomes]


def describe(rank: int, error: BaseException) -> Failure:
    """One line for an error; of the operating system's error behind it where there is one."""
    for link in chain(error):
        if isinstance(link, OSError) and link.errno is not None:
            where = f" ({link.filename})" if link.filename else ""
            name = errno.errorcode.get(link.errno, str(link.errno))
            return Failure(
                rank, link.errno, f"{link.strerror or os.strerror(link.errno)} [{name}]{where}"
            )
    lines = str(error).strip().splitlines()
    return Failure(rank, None, f"{type(error).__name__}: {lines[0] if lines else 'no message'}")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it, what caused that, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
