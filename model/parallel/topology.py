"""The parallel axes as DeepSpeed asks for them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from model.parallel.groups import ParallelGroups


class StageTopology:
    """`mpu` object that shows our groups to DeepSpeed: what it takes for data parallelism is the
    stage, all ranks that hold the same layers and tokens of their own. It knows of no other axis:
    what has to be added up over stages, train/engine/deepspeed.py adds up, and what tensor
    parallelism has cut is one more kind of expert to DeepSpeed.

    DeepSpeed asks for names that megatron-core has dropped (get_model_parallel_rank and others),
    and probes optional ones with hasattr, which must answer no; hence an explicit list. None of
    its sequence parallelism may be among them, which scales losses and gradients itself.
    """

    def __init__(self, groups: ParallelGroups):
        self._groups = groups

    def get_data_parallel_group(self) -> Any:
        return self._groups.stage

    def get_data_parallel_rank(self) -> int:
        return self._groups.stage_rank

    def get_data_parallel_world_size(self) -> int:
        return self._groups.stage_size

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._groups.stage)

    def get_model_parallel_group(self) -> Any:
        """One rank: DeepSpeed would reduce the gradient norm once for each parameter group, of
        which stages have different numbers, and wait for ever.
        """
        from megatron.core import parallel_state

        # Experts are never cut, so this is a group of one.
        return parallel_state.get_expert_tensor_parallel_group()

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_tensor_model_parallel_group(self) -> Any:
        return self.get_model_parallel_group()

    def get_tensor_model_parallel_rank(self) -> int:
        return 0

    def get_tensor_model_parallel_world_size(self) -> int:
        return 1

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_rank()
