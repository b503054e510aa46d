"""Memory and time of a step under one layout. Imports no torch.

The model: products take the FLOPs of the step (a third more where blocks are recomputed) over the
rate that devices reach; every exchange takes its bytes over the rate of the link it goes by. Of a
pipeline the slowest stage counts, and besides it once what a micro-batch takes on all others, while
it fills and drains (bubble); with virtual stages as many times less. Nothing overlaps, all ranks
are even, and no kernel is too small to be fast. So times are for comparing layouts, not for
promising.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.job.memory import PlannedStage, planned_stages, waited
from launch.layouts.devices import LINKS, Cluster
from model.cost.memory import DeviceMemory
from model.cost.parameters import count_parameters
from train.config.run import RunConfig


@dataclass(frozen=True)
class Estimate:
    """What a layout would take."""

    run: RunConfig
    """The run under it."""
    world_size: int
    memory: DeviceMemory
    """Bytes on a device of the fullest stage, but for the next."""
    gathered: int
    """Bytes of the weights that ZeRO-3 has together for the layer at work and the next."""
    available: int
    """Bytes that may be filled."""
    seconds: dict[str, float]
    """Of a step, by part."""

    @property
    def num_bytes(self) -> int:
        """All that is on a device."""
        return self.memory.total + self.gathered

    @property
    def fits(self) -> bool:
        return self.num_bytes <= self.available

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.run.train.global_batch_size * self.run.train.seq_len / self.step_seconds


def estimated(run: RunConfig, world_size: int, cluster: Cluster) -> Estimate:
    """The estimate of a run on so many devices."""
    stages = planned_stages(run, world_size)
    times = [_seconds(run, world_size, cluster, stage) for stage in stages]
    slowest = max(times, key=lambda parts: sum(parts.values()))
    seconds = dict(slowest)
    if len(stages) > 1:
        num_micro = run.gradient_accumulation_steps(run.parallel.rows_size(world_size))
        others = [parts for parts in times if parts is not slowest]
        waits = sum(parts[name] for parts in others for name in BY_MICRO_BATCH)
        share = waited(len(stages), num_micro, run.parallel.virtual_stages)
        seconds["bubble"] = share * waits / num_micro
    return Estimate(
        run,
        world_size,
        max((stage.memory for stage in stages), key=lambda memory: memory.total),
        _gathered_bytes(run),
        cluster.device.usable,
        seconds,
    )


BY_MICRO_BATCH = ("compute", "heads", "keys", "tensor", "rows", "stages")
"""Parts of a step's time that every micro-batch has a share of."""


def _seconds(
    run: RunConfig, world_size: int, cluster: Cluster, stage: PlannedStage
) -> dict[str, float]:
    """Of a step on one stage, by part."""
    train, parallel, exchange = run.train, run.parallel, stage.exchange
    links, size = _Links(cluster), parallel.stage_size(world_size)
    again = 4 / 3 if run.model.recompute == "block" else 1.0
    tokens = train.global_batch_size * train.seq_len
    expert_size, expert_data = (
        parallel.expert_parallel_size,
        size // parallel.expert_parallel_size,
    )
    return {
        "compute": again * stage.flops * tokens / (size * cluster.flops),
        "heads": links.all_to_all(
            exchange.heads, parallel.context_heads_size, parallel.tensor_parallel_size
        ),
        "keys": links.ring(
            exchange.keys,
            parallel.context_gather_size,
            parallel.context_heads_size * parallel.tensor_parallel_size,
        ),
        "tensor": links.all_to_all(exchange.tensor, parallel.tensor_parallel_size),
        "rows": links.all_to_all(exchange.rows, expert_size),
        "stages": links.next_stage(exchange.stages, world_size),
        "gradients": links.ring(exchange.dense_gradients, size)
        + links.ring(exchange.expert_gradients, expert_data, expert_size),
        "weights": links.ring(exchange.dense_weights, size)
        + links.ring(exchange.expert_weights, expert_data, expert_size),
    }


def _gathered_bytes(run: RunConfig) -> int:
    """Of two layers: that at work and the one that is fetched meanwhile."""
    if run.zero_stage < 3:
        return 0
    model = run.model
    count = count_parameters(model, run.experts_per_token, run.attention.arguments)
    tensor = run.parallel.tensor_parallel_size
    dense = count.dense - count.cut + count.cut / tensor - count.embedding / tensor
    layer = dense / model.num_layers
    if model.moe_layers:
        own = count.all_experts / run.parallel.expert_parallel_size
        layer += own / len(model.moe_layers)
    return round(2 * layer * (4 if run.train.precision == "fp32" else 2))


@dataclass(frozen=True)
class _Links:
    """How long bytes take that a device sends to a group's other ranks, `stride` apart."""

    cluster: Cluster

    def _near(self, size: int, stride: int) -> int:
        """Ranks of the group on a device's own node."""
        return max(1, min(size, self.cluster.per_node // stride))

    def all_to_all(self, num_bytes: float, size: int, stride: int = 1) -> float:
        """Every peer gets as much: those of the node by its own links, others by the network."""
        if size == 1:
            return 0.0
        near = (self._near(size, stride) - 1) / (size - 1)
        cluster = self.cluster
        return num_bytes / LINKS * (near / cluster.within + (1 - near) / cluster.between)

    def ring(self, num_bytes: float, size: int, stride: int = 1) -> float:
        """A ring leaves the node by the network cards of all its ranks there."""
        if size == 1:
            return 0.0
        near, cluster = self._near(size, stride), self.cluster
        rate = cluster.within if near > 1 else cluster.between
        if near < size:
            rate = min(rate, near * cluster.between)
        return num_bytes / LINKS / rate

    def next_stage(self, num_bytes: float, world_size: int) -> float:
        """Stages follow each other across nodes where there are several."""
        cluster = self.cluster
        rate = cluster.within if world_size <= cluster.per_node else cluster.between
        return num_bytes / LINKS / rate
