"""Process groups of the parallel axes. megatron-core's parallel_state is the only authority on topology."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ops.all_to_all import NodeGroups


@dataclass(frozen=True)
class ParallelGroups:
    """Groups, sizes and this process's ranks. `None` groups mean a single process.

    data: all ranks that hold different tokens (the whole world while tensor, pipeline and context sizes are 1).
    expert: ranks that share one copy of the experts; megatron-core makes them neighbours, e.g. [0,1][2,3].
    expert_data: ranks that hold the same experts and average their gradients, e.g. [0,2][1,3].
    nodes: the expert group by nodes, where it spans several and rows are to travel within nodes first.
    """

    data: Any = None
    expert: Any = None
    expert_data: Any = None
    nodes: NodeGroups | None = None
    data_size: int = 1
    data_rank: int = 0
    expert_size: int = 1
    expert_rank: int = 0
    expert_data_size: int = 1
    expert_data_rank: int = 0

    @staticmethod
    def single() -> ParallelGroups:
        return ParallelGroups()

    def local_experts(self, num_experts: int) -> range:
        """Global ids of the experts this rank holds: consecutive blocks in rank order."""
        per_rank = num_experts // self.expert_size
        return range(self.expert_rank * per_rank, (self.expert_rank + 1) * per_rank)


def initialize_parallel(expert_parallel_size: int = 1, timeout_seconds: float = 1800,
                        ranks_per_node: int | None = None) -> ParallelGroups:
    """Create the groups on an initialised torch.distributed world.

    ranks_per_node: an expert group of more ranks gets groups within and between its nodes; None: it does not.

    Raises:
        ValueError: the world size is not divisible by `expert_parallel_size`, or that not by `ranks_per_node`.
    """
    from megatron.core import parallel_state

    world_size = dist.get_world_size()
    if world_size % expert_parallel_size:
        raise ValueError(f"world size {world_size} is not divisible by expert_parallel_size {expert_parallel_size}")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_parallel_size,
                                             distributed_timeout_minutes=timeout_seconds / 60)
    data = parallel_state.get_data_parallel_group()
    expert = parallel_state.get_expert_model_parallel_group()
    expert_data = parallel_state.get_expert_data_parallel_group()
    return ParallelGroups(
        data=data, expert=expert, expert_data=expert_data, nodes=_node_groups(expert, ranks_per_node, timeout_seconds),
        data_size=dist.get_world_size(data), data_rank=dist.get_rank(data),
        expert_size=dist.get_world_size(expert), expert_rank=dist.get_rank(expert),
        expert_data_size=dist.get_world_size(expert_data), expert_data_rank=dist.get_rank(expert_data),
    )


def _node_groups(expert: Any, ranks_per_node: int | None, timeout_seconds: float) -> NodeGroups | None:
    """Groups of this rank along both axes of its expert group. Collective over the world, as making a group is."""
    size = dist.get_world_size(expert)
    if ranks_per_node is None or size <= ranks_per_node:
        return None
    if size % ranks_per_node:
        raise ValueError(f"expert_parallel_size {size} is not a multiple of ranks_per_node {ranks_per_node}")
    timeout = datetime.timedelta(seconds=timeout_seconds)
    mine: dict[str, Any] = {}
    for start in range(0, dist.get_world_size(), size):  # expert groups are runs of neighbours
        ranks = list(range(start, start + size))
        axes = [("within", ranks[i:i + ranks_per_node]) for i in range(0, size, ranks_per_node)]
        axes += [("between", ranks[i::ranks_per_node]) for i in range(ranks_per_node)]
        for axis, members in axes:
            group = dist.new_group(members, timeout=timeout)
            if dist.get_rank() in members:
                mine[axis] = group
    return NodeGroups(mine["within"], mine["between"], ranks_per_node, size // ranks_per_node)


def destroy_parallel() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


class MegatronTopology:
    """`mpu` object that shows megatron-core's groups to DeepSpeed.

    DeepSpeed still asks for names that megatron-core has dropped (get_model_parallel_rank and others), and probes
    optional ones with hasattr, which must answer no; hence an explicit list instead of passing the module itself.
    """

    _FORWARDED = frozenset({
        "get_data_parallel_group", "get_data_parallel_rank", "get_data_parallel_world_size",
        "get_model_parallel_group",
        "get_tensor_model_parallel_group", "get_tensor_model_parallel_rank",
        "get_tensor_model_parallel_world_size", "get_tensor_model_parallel_src_rank",
        "get_pipeline_model_parallel_group", "get_pipeline_model_parallel_rank",
        "get_pipeline_model_parallel_world_size",
    })

    def __getattr__(self, name: str) -> Any:
        if name in self._FORWARDED:
            from megatron.core import parallel_state

            return getattr(parallel_state, name)
        raise AttributeError(name)

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_model_parallel_group())

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())
