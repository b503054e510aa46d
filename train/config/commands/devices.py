"""The processes of a command that reads a run."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig
from train.config.commands.source import InferenceRouterConfig
from train.config.training import ParallelConfig


@dataclass(frozen=True)
class DevicesConfig:
    """Of a command that reads a run."""

    num_devices: int = 1
    """Processes on this machine, one a device; each has a share of the rows or prompts."""


def devices_problems(
    launch: DevicesConfig,
    parallel: ParallelConfig,
    router: InferenceRouterConfig,
    path: str | None,
) -> list[str]:
    found = parallel.problems()
    number, size = launch.num_devices, parallel.expert_parallel_size
    if number < 1:
        found.append(f"launch.num_devices is {number}; it must be at least 1")
    elif size >= 1 and number % size:
        found.append(
            f"launch.num_devices {number} is not divisible by parallel.expert_parallel_size {size}"
        )
    alone = {
        "ranks_per_node": None,
        "placement": None,
        "context_parallel_size": 1,
        "context_gather_size": 1,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "pipeline_split": None,
        "virtual_stages": 1,
        "overlap_experts": False,
    }
    for name, default in alone.items():
        if getattr(parallel, name) != default:
            found.append(f"parallel.{name} is of training alone; leave it out here")
    if number > 1 and path is not None:
        found.append(
            "path=DIR is read in one process; with several devices give run=RUN, or set "
            "launch.num_devices=1"
        )
    if number > 1 and router.budget is not None:
        found.append(
            "router.budget is calibrated in one process; with several devices leave it out, or set "
            "launch.num_devices=1"
        )
    return found


def require_even_experts(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises ValueError where the experts of a run cannot be spread as asked."""
    if model.num_experts % parallel.expert_parallel_size:
        raise ValueError(
            f"the run has {model.num_experts} experts, which parallel.expert_parallel_size "
            f"{parallel.expert_parallel_size} does not divide"
        )
