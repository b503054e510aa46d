"""Weights of ZeRO-3 that are shared out one by one, each as soon as it has its numbers: beside its
parts a rank never holds more than one whole parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model.parallel.family import Family, family_of
from model.parallel.groups import ParallelGroups
from model.parallel.topology import StageTopology
from train.config.run import RunConfig
from train.config.training import TrainConfig
from train.engine.library import (
    _register_family,
    deepspeed_settings,
    import_deepspeed,
    zero_stage_of,
)


def mark_family(parameter: nn.Parameter, groups: ParallelGroups) -> str | None:
    """Tell DeepSpeed of a parameter that is not on every rank alike, which to it is a kind of
    expert; returns its name of that kind, None for a parameter that every rank has.
    """
    family = family_of(parameter)
    if family is Family.REPLICATED:
        return None
    name = _register_family(groups, family)
    parameter.group_name = name  # type: ignore[attr-defined]
    parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
    parameter.ds_zero_partition_group_name = name  # type: ignore[attr-defined]
    return name


def place_buffers(model: nn.Module) -> None:
    """Onto the device that computes, in their own dtype: DeepSpeed moves those of a model only
    where its weights are whole.
    """
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().current_device_name())
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def partition_of(config: RunConfig, groups: ParallelGroups) -> Partition | None:
    """What shares out the weights of a run while they are made; None: they stay whole until the
    engine has them, as below stage 3. So do those that get adapters or are upcycled, which are
    looked at again after they were drawn.
    """
    if zero_stage_of(config.deepspeed) != 3 or config.lora.rank or config.init.upcycle.num_experts:
        return None
    return Partition(groups, config.train, config.deepspeed)


class Partition:
    """Called with a parameter that has its numbers, keeps this rank's part of it. As DeepSpeed
    would do once it has the model: over the stage, and of experts over the ranks that have the
    same ones. Nothing is sent, since every rank has drawn the same.
    """

    def __init__(
        self, groups: ParallelGroups, train: TrainConfig, deepspeed_config: dict[str, Any]
    ):
        deepspeed = import_deepspeed()
        topology = StageTopology(groups)
        self._groups = groups
        # Given a module, if an empty one, it changes the linear function as it does for a whole
        # model: the same arithmetic whichever way the weights were made.
        self._init: Any = deepspeed.zero.Init(
            module=nn.Module(),
            data_parallel_group=topology.get_data_parallel_group(),
            config_dict_or_path=deepspeed_settings(groups, train, deepspeed_config),
            mpu=topology,
        )

    @torch.no_grad()
    def __call__(self, parameter: nn.Parameter) -> None:
        from deepspeed.utils import groups as ds_groups

        name = mark_family(parameter, self._groups)
        if name is not None:
            parameter.ds_zero_partition_process_group = (  # type: ignore[attr-defined]
                ds_groups._get_expert_data_parallel_group(name)
            )
        parameter.data = parameter.data.to(self._init.local_device)
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
