"""Process groups of the parallel axes. megatron-core's parallel_state is the only authority on
topology.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from model.parallel.family import Family
from ops.all_to_all import NodeGroups


@dataclass(frozen=True)
class ParallelGroups:
    """Groups, sizes and this process's ranks. `None` groups mean a single process.

    stage: all ranks that hold tokens of their own and the same layers, a run of neighbours. Without
        pipeline parallelism that is the whole world. What belongs to no other family has a replica
        on each of them; gradients are sums over it.
    pipeline: ranks that hold one layer after the other and hand the same rows on, e.g. [0,2][1,3]
        with stages [0,1][2,3].
    rows: along it ranks hold different rows, as the loader and the arithmetic of batches count.
    tensor: ranks that hold parts of the same matrices, and neighbouring parts of the tokens of the
        same rows, e.g. [0,1][2,3].
    tensor_data: ranks that hold the same parts of matrices, e.g. [0,2][1,3].
    parts: all ranks that share rows, by tensor or context parallelism or both; tensor groups are
        neighbours in it.
    context: ranks that hold parts of the same rows, which attention puts together; megatron-core
        makes them neighbours, e.g. [0,1][2,3] with rows [0,2][1,3].
    heads: of a context group the neighbours that exchange heads in attention; all of them, where
        none gather.
    gather: of a context group those that gather keys and values, as far apart as there are ranks
        that exchange heads, e.g. [0,2][1,3] with heads [0,1][2,3] and one context group.
    expert: ranks that share one copy of the experts; megatron-core makes them neighbours, e.g.
        [0,1][2,3].
    expert_data: ranks that hold the same experts and average their gradients, e.g. [0,2][1,3].
    nodes: the expert group by nodes, where it spans several and rows are to travel within nodes
        first.
    """

    stage: Any = None
    pipeline: Any = None
    context: Any = None
    heads: Any = None
    gather: Any = None
    tensor: Any = None
    tensor_data: Any = None
    parts: Any = None
    expert: Any = None
    expert_data: Any = None
    nodes: NodeGroups | None = None
    stage_size: int = 1
    stage_rank: int = 0
    pipeline_size: int = 1
    pipeline_rank: int = 0
    rows_size: int = 1
    rows_rank: int = 0
    context_size: int = 1
    context_rank: int = 0
    gather_size: int = 1
    gather_rank: int = 0
    tensor_size: int = 1
    tensor_rank: int = 0
    expert_size: int = 1
    expert_rank: int = 0
    expert_data_size: int = 1
    expert_data_rank: int = 0

    @staticmethod
    def single() -> ParallelGroups:
        return ParallelGroups()

    @property
    def is_last_stage(self) -> bool:
        """Whether the loss is made here."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def parts_size(self) -> int:
        """How many ranks share a row."""
        return self.context_size * self.tensor_size

    @property
    def parts_rank(self) -> int:
        """Whose part of its rows this rank has, in the order of the tokens."""
        return self.context_rank * self.tensor_size + self.tensor_rank

    @property
    def heads_size(self) -> int:
        """How many ranks of a context group exchange heads."""
        return self.context_size // self.gather_size

    @property
    def heads_rank(self) -> int:
        return self.context_rank % self.heads_size

    def shards(self, family: Family) -> Any:
        """The group over which parameters of a family are spread; None: every rank of the stage
        has all of them.
        """
        return {Family.EXPERT: self.expert, Family.TENSOR: self.tensor}.get(family)

    def local_experts(self, num_experts: int) -> range:
        """Global ids of the experts this rank holds: consecutive blocks in rank order."""
        per_rank = num_experts // self.expert_size
        return range(self.expert_rank * per_rank, (self.expert_rank + 1) * per_rank)


def initialize_parallel(
    expert_parallel_size: int = 1,
    timeout_seconds: float = 1800,
    ranks_per_node: int | None = None,
    context_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    tensor_parallel_size: int = 1,
    context_gather_size: int = 1,
) -> ParallelGroups:
    """Create the groups on an initialised torch.distributed world.

    ranks_per_node: an expert group of more ranks gets groups within and between its nodes; None: it
        does not.
    context_gather_size: of the ranks of a context group, those that gather keys and values; the
        others exchange heads.

    Raises:
        ValueError: the world size is not divisible by `pipeline_parallel_size`, or a stage's not by
            `expert_parallel_size` or `context_parallel_size` x `tensor_parallel_size`, or the first
            of these not by `ranks_per_node`, or `context_parallel_size` not by
            `context_gather_size`.
    """
    from megatron.core import parallel_state

    world_size = dist.get_world_size()
    for name, size in (
        ("expert_parallel_size", pipeline_parallel_size * expert_parallel_size),
        (
            "context_parallel_size x tensor_parallel_size",
            pipeline_parallel_size * context_parallel_size * tensor_parallel_size,
        ),
    ):
        if world_size % size:
            stages = f"{pipeline_parallel_size} stages x " if pipeline_parallel_size > 1 else ""
            raise ValueError(
                f"world size {world_size} is not divisible by {stages}{name} "
                f"{size // pipeline_parallel_size}"
            )
    by_heads, left = divmod(context_parallel_size, context_gather_size)
    if left:
        raise ValueError(
            f"context_parallel_size {context_parallel_size} is not divisible by "
            f"context_gather_size {context_gather_size}"
        )
    # Neighbours exchange heads, and gather across these.
    levels = [by_heads, context_gather_size] if context_gather_size > 1 else None
    # Expert groups are runs of neighbours of their own, whatever the other axes are.
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=expert_parallel_size,
        pipeline_model_parallel_size=pipeline_parallel_size,
        context_parallel_size=context_parallel_size,
        hierarchical_context_parallel_sizes=levels,
        tensor_model_parallel_size=tensor_parallel_size,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=timeout_seconds / 60,
    )
    stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    rows = parallel_state.get_data_parallel_group()
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    context = parallel_state.get_context_parallel_group()
    heads, gather = context, None
    if levels is not None:
        heads, gather = parallel_state.get_hierarchical_context_parallel_groups()
    tensor = parallel_state.get_tensor_model_parallel_group()
    expert = parallel_state.get_expert_model_parallel_group()
    expert_data = parallel_state.get_expert_data_parallel_group()
    return ParallelGroups(
        stage=stage,
        pipeline=pipeline,
        context=context,
        heads=heads,
        gather=gather,
        tensor=tensor,
        tensor_data=parallel_state.get_data_parallel_group(with_context_parallel=True),
        parts=parallel_state.get_tensor_and_context_parallel_group(),
        expert=expert,
        expert_data=expert_data,
        nodes=_node_groups(expert, ranks_per_node, timeout_seconds),
        stage_size=dist.get_world_size(stage),
        stage_rank=dist.get_rank(stage),
        pipeline_size=dist.get_world_size(pipeline),
        pipeline_rank=dist.get_rank(pipeline),
        rows_size=dist.get_world_size(rows),
        rows_rank=dist.get_rank(rows),
        context_size=dist.get_world_size(context),
        context_rank=dist.get_rank(context),
        gather_size=context_gather_size,
        gather_rank=0 if gather is None else dist.get_rank(gather),
        tensor_size=dist.get_world_size(tensor),
        tensor_rank=dist.get_rank(tensor),
        expert_size=dist.get_world_size(expert),
        expert_rank=dist.get_rank(expert),
        expert_data_size=dist.get_world_size(expert_data),
        expert_data_rank=dist.get_rank(expert_data),
    )


def _node_groups(
    expert: Any, ranks_per_node: int | None, timeout_seconds: float
) -> NodeGroups | None:
    """Groups of this rank along both axes of its expert group. Collective over the world, as making
    a group is.
    """
    size = dist.get_world_size(expert)
    if ranks_per_node is None or size <= ranks_per_node:
        return None
    if size % ranks_per_node:
        raise ValueError(
            f"expert_parallel_size {size} is not a multiple of ranks_per_node {ranks_per_node}"
        )
    timeout = datetime.timedelta(seconds=timeout_seconds)
    mine: dict[str, Any] = {}
    # expert groups are runs of neighbours
    for start in range(0, dist.get_world_size(), size):
        ranks = list(range(start, start + size))
        axes = [("within", ranks[i : i + ranks_per_node]) for i in range(0, size, ranks_per_node)]
        axes += [("between", ranks[i::ranks_per_node]) for i in range(ranks_per_node)]
        for axis, members in axes:
            group = dist.new_group(members, timeout=timeout)
            if dist.get_rank() in members:
                mine[axis] = group
    return NodeGroups(mine["within"], mine["between"], ranks_per_node, size // ranks_per_node)


def destroy_parallel() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
