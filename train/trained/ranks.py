"""The ranks that read a run together: evaluation and generation without an engine for training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from model.dispatch.config import AllToAllConfig
from model.parallel.groups import ParallelGroups, initialize_parallel
from train.config.run import RunConfig
from train.config.training import ParallelConfig
from train.rank.runtime import from_rank_zero, process_group

T = TypeVar("T")


class Place(NamedTuple):
    """Where this process stands."""

    groups: ParallelGroups
    device: torch.device
    rank: int
    """Of all ranks, each of which has requests or rows of its own."""
    size: int

    def meet(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def first(self, function: Callable[[], T]) -> T:
        """What the function returns on rank 0, which alone calls it."""
        return function() if self.size == 1 else from_rank_zero(function)

    def added(self, numbers: list[int]) -> list[int]:
        """Sums over all ranks."""
        if self.size == 1:
            return numbers
        total = torch.tensor(numbers, device=self.device)
        dist.all_reduce(total)
        return [int(n) for n in total.tolist()]


@contextmanager
def joined(num_devices: int, parallel: ParallelConfig) -> Iterator[Place]:
    """This rank's place among num_devices; a single process joins nothing.

    Raises:
        ValueError: the job has another number of ranks.
    """
    if num_devices == 1:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        yield Place(ParallelGroups.single(), device, 0, 1)
        return

    with process_group(parallel.timeout_seconds) as device:
        size = dist.get_world_size()
        if size != num_devices:
            raise ValueError(
                f"launch.num_devices is {num_devices}, but the launcher has started {size} ranks"
            )
        groups = initialize_parallel(parallel.expert_parallel_size)
        yield Place(groups, device, dist.get_rank(), size)


def spread(config: RunConfig, parallel: ParallelConfig) -> RunConfig:
    """A run's config as its experts are spread over ranks."""
    if parallel.expert_parallel_size == 1:
        return config
    return replace(config, dispatcher=AllToAllConfig(), parallel=parallel)
