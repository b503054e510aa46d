"""The plan's memory against what ranks on a CPU really hold: peak resident memory of short
trainings under many layouts, whole and part by part.

`python -m bench.plan_memory [--cases "dp2, ZeRO 1;ep2, ZeRO 1"] [--json FILE]`. Every rank is a
process of its own, which says what it holds at the beginning (imports, groups of ranks, what
training a tiny model in the same layout has left behind), and then how much more: with its model,
with its engine, at the peak of the passes of a step, at the peak of the update, and after it. Freed
blocks go back to the kernel at once, since the plan leaves out an allocator's slack. Compared is
the fullest rank in the second step, which finds the optimizer's state there; the second micro-batch
of a step finds gradients. `--measured FILE` plans anew what was measured before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from bench.common import ROOT, find_commit
from launch.config.overrides import plain
from launch.config.parse import parse, world_size
from launch.job.memory import planned_memory
from model.loss import training_loss
from model.parallel.groups import ParallelGroups, initialize_parallel
from model.request import TokenBatch, part_of
from train.components import build_model, training_dtype
from train.config.run import RunConfig
from train.engine.deepspeed import Engine
from train.engine.library import import_deepspeed
from train.engine.partition import partition_of
from train.files.sizes import MIB
from train.files.strict_json import dumps
from train.pipeline.flow import Pipeline
from train.pipeline.schedule import Pass
from train.pretrained.start import Weights, fill_optimizer
from train.rank.runtime import process_group

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt."""

MODEL = (
    *("model.vocab_size=2048", "model.hidden_size=256", "model.num_layers=4"),
    *("model.num_dense_layers=1", "model.num_heads=4", "model.num_kv_heads=4"),
    *("model.intermediate_size=1024", "model.num_experts=8"),
    *("model.num_shared_experts=1", "model.expert_intermediate_size=256"),
    *("router.top_k=2", "model.max_seq_len=256", "train.seq_len=256"),
    *("train.micro_batch_size=2", "model.tie_embeddings=false", "optim.warmup_steps=1"),
)
RANKS = ("launch=deepspeed", "launch.num_devices=2")
CASES = {
    "one rank, ZeRO 0": ("deepspeed=zero0",),
    "one rank, recompute": ("deepspeed=zero0", "model.recompute=block"),
    "dp2, ZeRO 0": (*RANKS, "deepspeed=zero0"),
    "dp2, ZeRO 1": (*RANKS, "deepspeed=zero1"),
    "dp2, ZeRO 2": (*RANKS, "deepspeed=zero2"),
    "dp2, ZeRO 3": (*RANKS, "deepspeed=zero3"),
    "ep2, ZeRO 0": (*RANKS, "parallel=ep2", "deepspeed=zero0"),
    "ep2, ZeRO 1": (*RANKS, "parallel=ep2", "deepspeed=zero1"),
    "ep2, ZeRO 3": (*RANKS, "parallel=ep2", "deepspeed=zero3"),
    "cp2, ZeRO 1": (*RANKS, "parallel=cp2", "deepspeed=zero1"),
    "tp2, ZeRO 1": (*RANKS, "parallel=tp2", "deepspeed=zero1"),
    "pp2, ZeRO 1": (*RANKS, "parallel=pp2", "deepspeed=zero1"),
    "ep2, ZeRO 1, recompute": (
        *(*RANKS, "parallel=ep2", "deepspeed=zero1"),
        "model.recompute=block",
    ),
    "dp2, ZeRO 2, offloaded optimizer": (
        *(*RANKS, "deepspeed=zero2"),
        "+deepspeed.zero_optimization.offload_optimizer.device=cpu",
    ),
    "ep2, ZeRO 1, bf16": (*RANKS, "parallel=ep2", "deepspeed=zero1", "train.precision=bf16"),
    "dp2, ZeRO 2, bf16 sums": (
        *(*RANKS, "deepspeed=zero2", "train.precision=bf16"),
        "train.grad_accum_dtype=bf16",
    ),
}
LATE = (
    *("deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("torch._dynamo", "megatron.core.parallel_state"),
)
"""What is imported when an engine is made."""
CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}
"""What keeps torch from holding compiled products of bf16 for each shape that it has met on a CPU:
of 160 numbers of rows x 256 x 512 they took 102 MB.
"""
MICRO_BATCHES = 2
STEPS = 2
SMALL = (
    *("model.vocab_size=512", "model.hidden_size=64", "model.num_layers=2"),
    *("model.intermediate_size=128", "model.expert_intermediate_size=64"),
    *("model.num_heads=4", "model.num_kv_heads=2", "train.seq_len=64"),
)


def settings_of(overrides: tuple[str, ...]) -> tuple[RunConfig, int]:
    """The records of a run, and how many ranks it has."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", overrides=list(overrides))
    ranks = world_size(config)
    settings = plain(config)
    parts = [f"{axis}_parallel_size" for axis in ("pipeline", "context", "tensor")]
    rows = ranks
    for axis in parts:
        rows //= settings["parallel"][axis]
    settings["train"]["global_batch_size"] = (
        settings["train"]["micro_batch_size"] * rows * MICRO_BATCHES
    )
    return parse(settings, ranks), ranks


# --- one rank -------------------------------------------------------------------------------------


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def begin_peak() -> None:
    """VmHWM starts anew."""
    Path("/proc/self/clear_refs").write_text("5")


Found = tuple[Engine, dict[str, int]]


class Passes:
    """Of a step, on rows of drawn tokens."""

    def __init__(self, run: RunConfig, groups: ParallelGroups, engine: Engine, step: int):
        self.run, self.engine = run, engine
        draw = torch.Generator().manual_seed(1000 * step + groups.rows_rank)
        shape = (run.train.micro_batch_size, run.train.seq_len)
        self.inputs: list[TokenBatch] = []
        for _ in range(MICRO_BATCHES):
            ids = torch.randint(0, run.model.vocab_size, shape, generator=draw)
            places = torch.arange(shape[1]).expand(shape)
            ends = torch.arange(0, ids.numel() + 1, shape[1], dtype=torch.int32)
            batch = TokenBatch(ids, ids.roll(-1, 1), places, ends, shape[1])
            if groups.parts_size > 1:
                length = shape[1] // groups.parts_size
                batch = part_of(batch, groups.parts_rank * length, length)
            self.inputs.append(batch)
        self.outputs: dict[tuple[int, int], Any] = {}

    def forward(self, one: Pass, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """As train.pipeline.flow.Passes."""
        output = self.engine.forward(self.inputs[one.number], hidden=hidden, lap=one.lap)
        self.outputs[one.unit] = output
        return output.handed_on

    def backward(self, one: Pass, carried: torch.Tensor | None, is_last: bool) -> None:
        """As train.pipeline.flow.Passes."""
        output = self.outputs.pop(one.unit)
        tokens = self.run.train.global_batch_size * self.run.train.seq_len
        share = training_loss(output, tokens, tokens, self.run.balance)
        self.engine.backward(share, is_last, carried)


def begun(run: RunConfig) -> ParallelGroups:
    """The groups of this rank."""
    parallel = run.parallel
    return initialize_parallel(
        parallel.expert_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        tensor_parallel_size=parallel.tensor_parallel_size,
    )


def build(
    run: RunConfig,
    groups: ParallelGroups,
    at_once: bool,
    base: int,
    weights: Weights | None = None,
) -> Found:
    """An engine, and bytes above `base`. at_once: as training does (train/engine/partition.py).
    weights: what the run begins with; None: what was drawn.
    """
    found = {}
    begin_peak()
    settle = partition_of(run, groups) if at_once else None
    model = build_model(run, groups, training_dtype(run), settle)
    found["model"] = resident("VmRSS") - base
    found["model_peak"] = resident("VmHWM") - base
    if weights is not None:
        begin_peak()
        weights.fill_model(model)
        found["read_peak"] = resident("VmHWM") - base
    begin_peak()
    engine = Engine(model, groups, run.train, run.optim, run.deepspeed)
    fill_optimizer(weights, engine, run)
    found["engine"] = resident("VmRSS") - base
    found["engine_peak"] = resident("VmHWM") - base
    return engine, found


def train(run: RunConfig, groups: ParallelGroups, base: int) -> dict[str, int]:
    """Two steps; bytes above `base` in the second one."""
    engine, found = build(run, groups, True, base)
    pipeline = Pipeline(engine, groups)
    for step in range(STEPS):
        passes = Passes(run, groups, engine, step)
        begin_peak()
        pipeline.run(MICRO_BATCHES, passes.inputs[0].input_ids.shape, passes)
        found["passes_peak"] = resident("VmHWM") - base
        found["gradients"] = resident("VmRSS") - base
        begin_peak()
        engine.step()
        found["update_peak"] = resident("VmHWM") - base
        found["kept"] = resident("VmRSS") - base
    engine.close()
    return found


def work(overrides: tuple[str, ...]) -> dict[str, int]:
    """Train as this rank; bytes above what the process held at first, by phase."""
    run, _ = settings_of(overrides)
    with process_group(600):
        groups = begun(run)
        train(settings_of((*overrides, *SMALL))[0], groups, 0)
        gc.collect()
        base = resident("VmRSS")
        return {"base": base} | train(run, groups, base)


# --- all of them ----------------------------------------------------------------------------------


def import_all() -> None:
    """What every rank would import by itself, and hold beside what it began with."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ |= CACHES
    torch.set_num_threads(1)
    import_deepspeed()
    for name in LATE:
        importlib.import_module(name)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


Work = Callable[[tuple[str, ...]], dict[str, int]]
Started = tuple[list[Any], Any]
"""Processes of ranks, and the queue that they answer in."""


def begin(
    work: Work, overrides: tuple[str, ...], rank: int, ranks: int, port: int, found: Any
) -> None:
    """A rank, in a process of its own."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    mallopt = ctypes.CDLL(None).mallopt
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        mallopt(option, 2**16)
    found.put((rank, work(overrides)))


def start(work: Work, overrides: tuple[str, ...], ranks: int) -> Started:
    """Begin to measure. Ranks are forks of a process that has imported everything."""
    context = multiprocessing.get_context("fork")
    found, port = context.SimpleQueue(), free_port()
    processes = [
        context.Process(target=begin, args=(work, overrides, rank, ranks, port, found))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes, found


def finish(started: Started) -> list[dict[str, int]]:
    """What each rank found."""
    processes, found = started
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"ranks ended with {[process.exitcode for process in processes]}")
    return [by_rank for _, by_rank in sorted((found.get() for _ in processes), key=lambda f: f[0])]


def compared(overrides: tuple[str, ...], fullest: dict[str, int]) -> dict[str, Any]:
    """The plan of a run, and what its fullest rank has held."""
    run, ranks = settings_of(overrides)
    plan = planned_memory(run, ranks)
    peak = max(fullest["passes_peak"], fullest["update_peak"])
    return {
        "settings": overrides,
        "planned": {**vars(plan), "total": plan.total},
        "measured": fullest,
        "peak": peak,
        "planned_over_peak": round(plan.total / peak, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", help="names, with a semicolon between; by default all")
    parser.add_argument("--size", choices=("usual", "small"), default="usual")
    parser.add_argument(
        "--measured", type=Path, nargs="*", help="what was measured before: plan it"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    before: dict[str, Any] = {}
    for path in options.measured or ():
        before |= json.loads(path.read_text())["rows"]
    names = options.cases.split(";") if options.cases else list(before or CASES)
    if not before:
        import_all()

    def overrides_of(name: str) -> tuple[str, ...]:
        return (*MODEL, *(SMALL if options.size == "small" else ()), *CASES[name])

    rows: dict[str, Any] = {}
    started: dict[str, Started] = {}
    for number, name in enumerate(names):
        overrides = overrides_of(name)
        if name in before:
            fullest = before[name]["measured"]
        else:
            # So many at a time as are asked for: what a rank holds does not depend on others.
            if not started:
                for other in names[number : number + options.jobs]:
                    others = overrides_of(other)
                    started[other] = start(work, others, settings_of(others)[1])
            by_rank = finish(started.pop(name))
            fullest = max(by_rank, key=lambda of: max(of["passes_peak"], of["update_peak"]))
        row = rows[name] = compared(overrides, fullest)
        print(
            f"{name:34s} plan {row['planned']['total'] / MIB:7.1f} MiB, peak "
            f"{row['peak'] / MIB:7.1f}, ratio {row['planned_over_peak']:.3f}",
            flush=True,
        )
        for label in ("planned", "measured"):
            parts = {key: f"{value / MIB:.1f}" for key, value in row[label].items() if value}
            print("    ", label, parts, flush=True)
        result = {"bench": "plan_memory", "commit": find_commit(), "device": "cpu", "rows": rows}
        if options.json is not None:
            options.json.write_text(dumps(result, indent=1) + "\n")
    print(dumps(result))


if __name__ == "__main__":
    main()
