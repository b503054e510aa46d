"""Importing DeepSpeed, and what it needs to be told so that it leaves the groups and sums to us."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from model.parallel.family import Family
from model.parallel.groups import ParallelGroups
from train.config.training import TrainConfig
from train.engine.optimizer import TENSOR_GROUP


def import_deepspeed() -> Any:
    """Import DeepSpeed quietly and without its start-up compilation on CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    # init_distributed would compile a shared-memory all-reduce for CPU: minutes, and an error
    # without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def _anchor(num_experts: int) -> nn.Module:
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    class _ExpertAnchor(AutoEPMoELayer):  # type: ignore[misc]
        """Has no parameters and is never called; tells the engine that the model holds experts."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            pass  # the groups are registered already

    return _ExpertAnchor()


def _register_family(groups: ParallelGroups, family: Family) -> str:
    """Enter megatron-core's groups of a family in DeepSpeed's tables of experts; returns the name
    that parameters refer to them by.
    """
    from deepspeed.utils import groups as ds_groups

    if family is Family.TENSOR:
        name, shards, replicas = TENSOR_GROUP, groups.tensor, groups.tensor_data
    else:
        name, shards = f"ep_size_{groups.expert_size}", groups.expert
        replicas = groups.expert_data
    ds_groups._EXPERT_PARALLEL_GROUP[name] = shards
    ds_groups._EXPERT_DATA_PARALLEL_GROUP[name] = replicas
    ds_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(shards)
    ds_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(replicas)
    return name


def _precision_of_sums(train: TrainConfig, deepspeed_config: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings for how gradients of bf16 weights are added up: over micro-batches, and
    over ranks.
    """
    if train.precision != "bf16":
        return {}
    return {
        "data_types": {"grad_accum_dtype": train.grad_accum_dtype},
        "communication_data_type": deepspeed_config.get("communication_data_type")
        or train.grad_accum_dtype,
    }


def zero_stage_of(deepspeed_config: dict[str, Any]) -> int:
    return int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))


def deepspeed_settings(
    groups: ParallelGroups, train: TrainConfig, deepspeed_config: dict[str, Any]
) -> dict[str, Any]:
    """The user's DeepSpeed keys with those that follow from the run."""
    stage = zero_stage_of(deepspeed_config)
    # DeepSpeed calls this the accumulation count, but the boundaries are set by hand in
    # Engine.backward.
    micro_steps = max(1, train.global_batch_size // (train.micro_batch_size * groups.rows_size))
    rounds = train.master_dtype == "bf16"
    return {
        **deepspeed_config,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": micro_steps,
        "bf16": {
            "enabled": train.precision == "bf16",
            # The second would only keep DeepSpeed from asking for an optimizer of its own on the
            # host: moments are RoundedAdamW's, in fp32.
            "bf16_master_weights_and_grads": rounds,
            "bf16_optimizer_states": rounds,
        },
        **_precision_of_sums(train, deepspeed_config),
        "gradient_allreduce_op": "sum" if stage in (1, 2) else "mean",
        "gradient_clipping": 0.0 if stage == 0 else train.clip_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _one_zero_optimizer(engine_class: Any) -> None:
    """Let DeepSpeed's engine take the ZeRO optimizer of stages 1 and 2 for stage 1 whatever the
    dtype of the sums.

    Without it stage 1 in bf16 with fp32 sums gets BF16_Optimizer, while stage 1 with offload and
    stage 2 keep the ZeRO one. Checkpoints, norms and skipped steps are then the same code for both
    stages and both dtypes.
    """
    from deepspeed.runtime.engine import BFLOAT16, ZERO_OPTIMIZATION

    choose = engine_class._do_optimizer_sanity_check
    if choose.__module__ == __name__:
        return  # done before, in this process

    def chosen(engine: Any, optimizer: Any) -> str:
        found = choose(engine, optimizer)
        takes_zero = found == BFLOAT16 and engine.zero_optimization()
        return str(ZERO_OPTIMIZATION if takes_zero else found)

    engine_class._do_optimizer_sanity_check = chosen


def _join_stages(optimizer: Any, pipeline: Any) -> None:
    """Let ZeRO's optimizer (stages 1 and 2) take gradient norm and overflow over all stages of a
    pipeline.

    DeepSpeed would add up over model-parallel ranks once for each parameter group, and a stage
    without experts has a group less than others: they would wait for ever (DeepSpeed #1522, #6714).
    Here each is one all-reduce, whatever a stage holds, and a NaN on one stage is one on all.
    """
    own_norm, own_overflow = optimizer.scaled_global_norm, optimizer.has_overflow

    def norm(norm_type: int = 2) -> torch.Tensor:
        own = torch.as_tensor(own_norm(norm_type))
        # A norm that is not finite is -1 there.
        is_bad = ~torch.isfinite(own) | (own < 0)
        both = torch.stack((torch.where(is_bad, 0.0, own.double().square()), is_bad.double()))
        dist.all_reduce(both, group=pipeline)
        return torch.where(both[1] > 0, -1.0, both[0].sqrt()).to(own.dtype)

    def overflow(*args: Any, **kwargs: Any) -> bool:
        flag = torch.tensor([float(own_overflow(*args, **kwargs))], device=_device_of(optimizer))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=pipeline)
        return bool(flag.item())

    optimizer.scaled_global_norm, optimizer.has_overflow = norm, overflow


def _device_of(optimizer: Any) -> torch.device:
    device: torch.device = optimizer.bit16_groups[0][0].device
    return device
