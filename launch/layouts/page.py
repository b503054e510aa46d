"""The best layouts as text: what each takes, what limits it, and the command that starts it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from launch.layouts.devices import LINKS, Cluster
from launch.layouts.estimate import Estimate
from launch.layouts.search import Found
from train.config.commands.plan import NODE_SIZE
from train.files.sizes import GIB

SEARCHED = (
    "world=",
    "device=",
    "mfu=",
    "price=",
    "parallel=",
    "parallel.expert_parallel_size=",
    "parallel.context_parallel_size=",
    "parallel.context_gather_size=",
    "parallel.tensor_parallel_size=",
    "parallel.pipeline_parallel_size=",
    "parallel.virtual_stages=",
    "model.recompute=",
    "train.micro_batch_size=",
    "deepspeed.zero_optimization.stage=",
    "launch.num_devices=",
    "launch.num_nodes=",
)
"""Beginnings of overrides that a command line of a layout has instead of those given."""


def lines(found: Found, world_size: int, cluster: Cluster, given: Sequence[str]) -> Iterator[str]:
    """given: the overrides that the search was asked with."""
    device = cluster.device
    yield (
        f"{world_size} x {device.name} in nodes of {NODE_SIZE}: {found.num_layouts:,} layouts are "
        f"possible, {found.num_fitting:,} fit"
    )
    yield (
        f"model: products reach {cluster.flops / 1e12:,.0f} of {device.tflops:,.0f} TFLOP/s (mfu), "
        f"links {LINKS:.0%} of {cluster.within / 1e9:,.0f} GB/s within a node and of "
        f"{cluster.between / 1e9:,.0f} GB/s a device between nodes, nothing overlaps; "
        f"{device.usable / GIB:.1f} of {device.memory / GIB:.0f} GiB may be filled"
    )
    for number, estimate in enumerate(found.best, 1):
        yield f"{number}. {_heading(estimate)}"
        yield from _parts(estimate)
        yield f"   {command_line(estimate, given)}"
    if found.nearest is not None:
        yield f"none fits; the least memory takes: {_heading(found.nearest)}"
        yield from _parts(found.nearest)
        yield (
            "   more devices, a smaller train.seq_len or model.loss_chunk_size=4096 would take less"
        )
    for problem in found.problems:
        yield f"  error: {problem}"


def as_data(estimate: Estimate) -> dict[str, Any]:
    """The numbers of a layout."""
    run = estimate.run
    return {
        "pipeline_parallel_size": run.parallel.pipeline_parallel_size,
        "virtual_stages": run.parallel.virtual_stages,
        "stage_layers": [len(layers) for layers in run.stage_layers],
        "context_parallel_size": run.parallel.context_parallel_size,
        "context_gather_size": run.parallel.context_gather_size,
        "tensor_parallel_size": run.parallel.tensor_parallel_size,
        "expert_parallel_size": run.parallel.expert_parallel_size,
        "zero_stage": run.zero_stage,
        "recompute": run.model.recompute,
        "micro_batch_size": run.train.micro_batch_size,
        "step_seconds": estimate.step_seconds,
        "tokens_per_second": estimate.tokens_per_second,
        "seconds": estimate.seconds,
        "memory_bytes": {**_memory(estimate), "total": estimate.num_bytes},
        "limits": _limits(estimate),
    }


def command_line(estimate: Estimate, given: Sequence[str]) -> str:
    """What starts a run under the layout: the given overrides, without those that it decides."""
    run, world = estimate.run, estimate.world_size
    plain = [override.lstrip("+") for override in given]
    kept = [override for override in plain if not override.startswith(SEARCHED)]
    nodes = max(1, world // NODE_SIZE)
    if world == 1:
        kept = [override for override in kept if not override.startswith("launch")]
        launch = []
    else:
        launch = [f"launch.num_devices={world // nodes}", f"launch.num_nodes={nodes}"]
        if not any(override.startswith("launch=") for override in kept):
            launch.insert(0, "launch=deepspeed")
            if nodes > 1 and not any(o.startswith("launch.hostfile=") for o in kept):
                launch.append("launch.hostfile=HOSTS")
    virtual = run.parallel.virtual_stages
    decided = [
        f"parallel.expert_parallel_size={run.parallel.expert_parallel_size}",
        f"parallel.context_parallel_size={run.parallel.context_parallel_size}",
        f"parallel.context_gather_size={run.parallel.context_gather_size}",
        f"parallel.tensor_parallel_size={run.parallel.tensor_parallel_size}",
        f"parallel.pipeline_parallel_size={run.parallel.pipeline_parallel_size}",
        *([f"parallel.virtual_stages={virtual}"] if virtual > 1 else []),
        f"deepspeed.zero_optimization.stage={run.zero_stage}",
        f"model.recompute={run.model.recompute}",
        f"train.micro_batch_size={run.train.micro_batch_size}",
    ]
    words = [shlex.quote(word) for word in (*kept, *decided, *launch)]
    return " ".join(("python -m launch.train", *words))


def _heading(estimate: Estimate) -> str:
    run, world = estimate.run, estimate.world_size
    parallel, rows = run.parallel, run.parallel.rows_size(world)
    stages = gather = ""
    if parallel.context_gather_size > 1:
        of = f"{parallel.context_heads_size} by heads x {parallel.context_gather_size} that gather"
        gather = f" ({of})"
    if parallel.pipeline_parallel_size > 1:
        numbers = " ".join("+".join(str(len(part)) for part in runs) for runs in run.stage_runs)
        stages = f"{parallel.pipeline_parallel_size} stages of {numbers} layers x "
    return (
        f"{estimate.step_seconds:.3g} s a step, {estimate.tokens_per_second:,.0f} tokens/s: "
        f"{stages}rows "
        f"{rows} x context {parallel.context_parallel_size}{gather} x tensor "
        f"{parallel.tensor_parallel_size}, expert "
        f"{parallel.expert_parallel_size}, ZeRO {run.zero_stage}, recompute="
        f"{run.model.recompute}, {run.train.micro_batch_size} x {rows} rows x "
        f"{run.gradient_accumulation_steps(rows)} accumulation steps"
    )


def _parts(estimate: Estimate) -> Iterator[str]:
    yield "   time    " + _listed({n: f"{s:.3g} s" for n, s in estimate.seconds.items() if s})
    memory = {n: f"{b / GIB:.1f}" for n, b in _memory(estimate).items() if b}
    yield (
        f"   memory  {estimate.num_bytes / GIB:.1f} of {estimate.available / GIB:.1f} GiB: "
        f"{_listed(memory)}"
    )
    yield f"   limits  {_limits(estimate)}"


def _memory(estimate: Estimate) -> dict[str, int]:
    parts = {name.replace("_", " "): size for name, size in vars(estimate.memory).items()}
    return {**parts, "gathered weights": estimate.gathered}


def _limits(estimate: Estimate) -> str:
    """The largest part of the time and of the memory."""
    slowest = max(estimate.seconds, key=lambda name: estimate.seconds[name])
    memory = _memory(estimate)
    largest = max(memory, key=lambda name: memory[name])
    return (
        f"{slowest} takes {estimate.seconds[slowest] / estimate.step_seconds:.0%} of the step, "
        f"{largest} {memory[largest] / max(estimate.num_bytes, 1):.0%} of the memory"
    )


def _listed(parts: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parts.items())
