"""Whether a run fits a device that is named, and which settings would help. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launch.config.contradictions import contradictions
from launch.job.memory import planned_memory, this_machine
from ops.device import memory_gib, peak_tflops
from train.files.sizes import GIB

LEFT_OUT = 0.08
"""Share of a device's memory for what the plan leaves out: the context, communication buckets and
the allocator's slack.
"""
MOST = 6
"""Settings that are named."""


@dataclass(frozen=True)
class Device:
    """What a run is planned for."""

    name: str
    memory: int
    """Bytes."""
    tflops: float | None
    """Dense bf16 peak; None: not known."""

    @property
    def usable(self) -> int:
        return int((1 - LEFT_OUT) * self.memory)


def device_of(name: str | None) -> Device | None:
    """The device of that name, or the smallest of this machine; None: it has none."""
    if name is not None:
        size = memory_gib(name)
        assert size is not None, name
        return Device(name, int(size * GIB), peak_tflops(name))
    devices = this_machine().devices
    return Device("of this machine", min(devices), None) if devices else None


def alternatives(run: Any, num_ranks: int) -> list[tuple[str, int]]:
    """Settings that each alone would take memory from a device, the most first, with the total that
    the plan then has. Those that contradict the rest of the config are left out.
    """
    now = planned_memory(run, num_ranks).total
    known = set(contradictions(run, num_ranks))
    found = []
    for setting, other, ranks in _changes(run, num_ranks):
        if set(contradictions(other, ranks)) - known:
            continue
        total = planned_memory(other, ranks).total
        if total < 0.99 * now:
            found.append((setting, total))
    return sorted(found, key=lambda pair: pair[1])[:MOST]


def _changes(run: Any, ranks: int) -> Iterator[tuple[str, Any, int]]:
    """(as it is typed, the config with it, its ranks)"""
    replace = dataclasses.replace
    train, model, parallel = run.train, run.model, run.parallel

    def of_train(**values: Any) -> Any:
        return replace(run, train=replace(train, **values))

    if train.micro_batch_size > 1:
        half = train.micro_batch_size // 2
        yield f"train.micro_batch_size={half}", of_train(micro_batch_size=half), ranks
    if train.precision == "fp32":
        yield "train.precision=bf16", of_train(precision="bf16"), ranks
    elif train.grad_accum_dtype == "fp32":
        yield "train.grad_accum_dtype=bf16", of_train(grad_accum_dtype="bf16"), ranks
    if train.precision == "bf16" and train.master_dtype == "fp32":
        yield "train.master_dtype=bf16", of_train(master_dtype="bf16"), ranks
    if model.recompute != "block":
        yield "model.recompute=block", replace(run, model=replace(model, recompute="block")), ranks
    if model.num_experts and not run.experts.recompute:
        experts = replace(run.experts, recompute=True)
        yield "experts.recompute=true", replace(run, experts=experts), ranks
    if model.loss_chunk_size == 0:
        chunked = replace(model, loss_chunk_size=1024)
        yield "model.loss_chunk_size=1024", replace(run, model=chunked), ranks
    for stage in range(run.zero_stage + 1, 4):
        yield f"deepspeed=zero{stage}", run.under_zero(stage), ranks
    size = 2 * parallel.expert_parallel_size
    if model.num_experts and ranks % size == 0:
        spread = replace(parallel, expert_parallel_size=size)
        yield f"parallel.expert_parallel_size={size}", replace(run, parallel=spread), ranks
    size = 2 * parallel.context_parallel_size
    if ranks % size == 0:
        shared = replace(parallel, context_parallel_size=size)
        yield f"parallel.context_parallel_size={size}", replace(run, parallel=shared), ranks
        # where there are no heads left to share out
        if model.num_kv_heads % (2 * parallel.context_heads_size):
            gather = 2 * parallel.context_gather_size
            shared = replace(shared, context_gather_size=gather)
            more = f"parallel.context_parallel_size={size} parallel.context_gather_size={gather}"
            yield more, replace(run, parallel=shared), ranks
    size = 2 * parallel.tensor_parallel_size
    if ranks % size == 0:
        cut = replace(parallel, tensor_parallel_size=size)
        yield f"parallel.tensor_parallel_size={size}", replace(run, parallel=cut), ranks
    size = 2 * parallel.pipeline_parallel_size
    enough = size * parallel.virtual_stages <= model.num_layers
    if ranks % size == 0 and enough and parallel.pipeline_split is None:
        staged = replace(parallel, pipeline_parallel_size=size)
        yield f"parallel.pipeline_parallel_size={size}", replace(run, parallel=staged), ranks
    if run.launch.kind != "inline":
        nodes = 2 * run.launch.num_nodes
        more = replace(run, launch=replace(run.launch, num_nodes=nodes))
        yield f"launch.num_nodes={nodes}", more, 2 * ranks
