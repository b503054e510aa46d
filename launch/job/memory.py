"""Whether a machine has the memory that the plan asks for: before ranks start on it, or by a rank
for its own node.

The plan (model/cost/memory.py) leaves out buffers and slack, so a job that does not fit by it does
not fit at all; one that fits may still run out. Compared with what the machine has, not with what
is free now. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from launch.process.ask import ask
from launch.saved.teacher import read_teacher
from model.cost.exchange import Exchange, exchanged_bytes
from model.cost.memory import DeviceMemory, device_memory
from model.cost.parameters import flops_per_token
from train.config.run import RunConfig
from train.engine.muon.planned import planned_muon
from train.files.sizes import GIB, MIB
from train.objectives.cost import taught_bytes
from train.pipeline.schedule import in_flight, waiting

PROGRAM_SECONDS = 20.0
UNLIMITED = 2**60
"""A control group's limit above this is none."""


@dataclass(frozen=True)
class Machine:
    """Memory of one node."""

    devices: tuple[int, ...]
    """Bytes of every device that a process sees; empty: the CPU computes."""
    host: int
    """Bytes of the host."""


def this_machine(environ: Mapping[str, str] = os.environ) -> Machine:
    """What this process may use: CUDA_VISIBLE_DEVICES and the limits of control groups (containers,
    Slurm) count.
    """
    return Machine(
        _devices(environ), min([psutil.virtual_memory().total, *_limits(Path("/sys/fs/cgroup"))])
    )


def _devices(environ: Mapping[str, str]) -> tuple[int, ...]:
    """By nvidia-smi, since asking torch would open a context on the device."""
    try:
        if version("torch").endswith("+cpu"):
            return ()
    except PackageNotFoundError:
        return ()
    answer = ask(
        ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"], PROGRAM_SECONDS
    )
    if answer.code != 0:
        return ()
    found = [int(line) * MIB for line in answer.output.split() if line.isdigit()]
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not found:
        return tuple(found)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    # Names other than numbers (UUIDs, parts of a device) say how many; the smallest device is never
    # too much to assume.
    return tuple(
        found[int(name)] if name.isdigit() and int(name) < len(found) else min(found)
        for name in names
        if name != "-1"
    )


def _limits(root: Path, own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Memory limits of this process's control group and those above it, version 1 and 2."""
    found = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, name = (
            (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        )
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(base):
                found.append(_limit(group / name))
    return [limit for limit in found if limit is not None and 0 < limit < UNLIMITED]


def _limit(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # there is none, or it is "max"
        return None


def ranks_of_this_node(environ: Mapping[str, str], default: int) -> int:
    """As many as the launcher says that it has started here."""
    names = (
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        "MPI_LOCALNRANKS",
    )
    return next((int(environ[name]) for name in names if environ.get(name, "").isdigit()), default)


def memory_problem(run: Any, num_ranks: int, ranks_here: int, machine: Machine) -> str | None:
    """Why `ranks_here` ranks of a run of `num_ranks` do not fit the machine, or None where by the
    plan they do.

    On CPUs all ranks of a node share its memory; on CUDA each has its device, and the host holds
    what is offloaded.
    """
    plan, zero = planned_memory(run, num_ranks), run.deepspeed.get("zero_optimization", {})
    weights = plan.dense_weights + plan.expert_weights

    # What is offloaded leaves the device and counts against the host.
    offloaded = sum(
        size
        for name, size in (("offload_optimizer", plan.optimizer), ("offload_param", weights))
        if (zero.get(name) or {}).get("device", "none") == "cpu"
    )

    # Bytes of a rank, how many ranks share the place, its size, and what it is called.
    if machine.devices:
        needs = [
            (plan.total - offloaded, 1, min(machine.devices), "a device"),
            (offloaded, ranks_here, machine.host, "the host"),
        ]
    else:
        needs = [(plan.total, ranks_here, machine.host, "this machine")]

    for each, ranks, there, place in needs:
        if each * ranks > there:
            who = f"{ranks} ranks need" if ranks > 1 else "a rank needs"
            return (
                f"by the plan {who} {each * ranks / GIB:.1f} GiB on {place}, which has "
                f"{there / GIB:.1f} GiB (python -m launch.plan says for what); use more ranks, "
                "deepspeed=zero3, model.recompute=block or a smaller train.micro_batch_size, or "
                "start anyway with launch.check_memory=false"
            )
    return None


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a pipeline, or the whole model."""

    layers: Sequence[int]
    """Numbers of its layers, ascending."""
    memory: DeviceMemory
    """Bytes on each of its devices."""
    exchange: Exchange
    """Bytes that each of its devices sends in a step."""
    in_flight: int
    """Micro-batches that it holds at most; with virtual stages those of single laps."""
    flops: float
    """Of a token, forward and backward."""


def planned_stages(run: Any, num_ranks: int) -> list[PlannedStage]:
    """All stages of a run, in their order; one where there is no pipeline."""
    parallel = run.parallel
    every = run.stage_layers
    size = parallel.stage_size(num_ranks)
    num_micro = run.gradient_accumulation_steps(parallel.rows_size(num_ranks))
    zero = run.deepspeed.get("zero_optimization", {})
    shared: dict[str, Any] = dict(
        precision=run.train.precision,
        zero_stage=run.zero_stage,
        world_size=size,
        expert_parallel_size=parallel.expert_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        tensor_parallel_size=parallel.tensor_parallel_size,
        context_gather_size=parallel.context_gather_size,
        micro_batch_size=run.train.micro_batch_size,
        seq_len=run.train.seq_len,
        attention=run.attention.arguments,
        grad_accum_dtype=run.train.grad_accum_dtype,
    )
    found = []
    for place, layers in enumerate(every):
        laps = parallel.virtual_stages
        held = in_flight(place, len(every), num_micro, laps, parallel.overlap_experts)
        memory = device_memory(
            run.model,
            run.experts_per_token,
            **shared,
            recompute_experts=run.experts.recompute,
            expert_precision=run.experts.precision,
            master_dtype=run.train.master_dtype,
            averaged=run.optim.ema_decay is not None,
            # Stages and parameters that are not trained do not go together.
            trained=run.trained if len(every) == 1 else None,
            one_moment=planned_muon(run, num_ranks, layers).parameters,
            layers=layers,
            in_flight=held / laps,
            max_live=int(zero.get("stage3_max_live_parameters", 10**9)),
            bucket_size=int(zero.get("reduce_bucket_size", 5 * 10**8)),
        )
        exchange = exchanged_bytes(
            run.model,
            run.experts_per_token,
            **shared,
            num_micro_batches=num_micro,
            payload=run.dispatcher.arguments.get("payload", "native"),
            layers=layers,
        )
        flops = flops_per_token(
            run.model, run.experts_per_token, run.train.seq_len, run.attention.arguments, layers
        )
        found.append(PlannedStage(layers, memory, exchange, held, flops))
    return found


def planned_memory(run: Any, num_ranks: int) -> DeviceMemory:
    """Bytes on the fullest device of a run."""
    found = max((s.memory for s in planned_stages(run, num_ranks)), key=lambda m: m.total)
    return replace(found, teacher=taught_bytes(run, planned_teacher(run)))


def planned_teacher(run: Any) -> Any:
    """The config of the teacher that is there while a run learns. None: there is none, or it cannot
    be read here, which those say who check it.
    """
    if not run.objective.needs_teacher:
        return None
    return _read_teacher(run.objective)


@cache
def _read_teacher(settings: Any) -> Any:
    try:
        return read_teacher(settings)
    except (OSError, ValueError):
        return None


def planned_exchange(run: Any, num_ranks: int) -> Exchange:
    """Bytes that a device of a run sends in an optimisation step, one of those that send most."""
    return max((s.exchange for s in planned_stages(run, num_ranks)), key=lambda e: e.total)


def planned_bubble(run: RunConfig, num_ranks: int) -> float:
    """Share of a step that a device of the slowest stage waits while the pipeline fills and drains
    (1F1B), as stages take what their FLOPs say and nothing else takes time; 0 without a pipeline.
    """
    stages = planned_stages(run, num_ranks)
    num_micro = run.gradient_accumulation_steps(run.parallel.rows_size(num_ranks))
    slowest = max(stage.flops for stage in stages)
    others = sum(stage.flops for stage in stages) - slowest
    waits = others * waited(len(stages), num_micro, run.parallel.virtual_stages)
    return waits / (num_micro * slowest + waits)


def waited(num_stages: int, num_micro_batches: int, laps: int) -> float:
    """What a stage waits for in a step, of the time that one micro-batch takes on all others."""
    if num_stages == 1:
        return 0.0
    return waiting(num_stages, num_micro_batches, laps) / laps / (num_stages - 1)
