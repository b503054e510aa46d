"""What saving costs a run: the share of the training time in which the training thread waits for checkpoints.

One process trains a small MoE model under DeepSpeed for 200 steps in each way, a checkpoint every 20: without, in the
training thread, in the background. The ways take turns every 20 steps, so drift hits all alike. Rows, in milliseconds a
step; the rival is the same step without:

    checkpoint_sync, checkpoint_async    time with saving; extra.blocked_share: waiting for save() over the rival's time
    checkpoint_manifest                  the rival's time and that of hashing every file of one checkpoint
"""

from __future__ import annotations

import functools
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.common import Row, main, make_row
from bench.train_step import QUICKSTART, random_batch
from model.attention.dense import DenseAttention
from model.config import BalanceConfig
from model.dispatch import LocalDispatcher
from model.loss import training_loss
from model.moe import ModelParts
from model.parallel import initialize_parallel
from model.routers.top_k import TopKRouter
from model.transformer import Transformer
from train.checkpoint import CheckpointWriter
from train.config import CheckpointConfig, OptimConfig, TrainConfig
from train.engine import Engine
from train.manifest import file_facts
from train.runtime import process_group

ROWS, LENGTH, TOP_K = 2, 128, 2
ROUNDS, STEPS = 10, 20
BALANCE = BalanceConfig(aux_loss_coeff=0.01)


@dataclass
class Measured:
    """Seconds of each round of STEPS steps: in all, and of those the time the training thread waited for a save."""

    total: list[float] = field(default_factory=list)
    blocked: list[float] = field(default_factory=list)


def build(device: torch.device) -> tuple[Engine, Callable[[], None]]:
    """An engine and a function that takes one optimisation step."""
    parts = ModelParts(functools.partial(TopKRouter, top_k=TOP_K), DenseAttention, LocalDispatcher, BALANCE)
    groups = initialize_parallel(1)
    settings = TrainConfig(num_steps=ROUNDS * STEPS, seq_len=LENGTH, micro_batch_size=ROWS, global_batch_size=ROWS)
    engine = Engine(Transformer(QUICKSTART, parts, groups), groups, settings, OptimConfig(lr=1e-4),
                    {"zero_optimization": {"stage": 1}})
    batch = random_batch(ROWS, LENGTH, QUICKSTART.vocab_size, device)

    def step() -> None:
        engine.backward(training_loss(engine.forward(**batch), ROWS * LENGTH, ROWS * LENGTH, BALANCE), is_last=True)
        engine.step()

    return engine, step


def take_turns(engine: Engine, step: Callable[[], None], writers: dict[str, CheckpointWriter | None]) -> dict[str, Measured]:
    """ROUNDS rounds of STEPS steps in each way. A save stands at the beginning of its round, so that what is written in the
    background slows down the steps it is charged to; the wait for it at the end is charged too."""
    measured = {name: Measured() for name in writers}
    names, count = list(writers), 0
    for round_ in range(ROUNDS):
        for name in names[round_ % len(names):] + names[:round_ % len(names)]:
            writer, begin, blocked = writers[name], time.perf_counter(), 0.0
            if writer is not None:
                count += 1
                writer.save(engine, {"step": count})
                blocked += time.perf_counter() - begin
            for _ in range(STEPS):
                step()
            waiting = time.perf_counter()
            if writer is not None:
                writer.wait()
                blocked += time.perf_counter() - waiting
            measured[name].total.append(time.perf_counter() - begin)
            measured[name].blocked.append(blocked)
    return measured


def hash_seconds(checkpoint: Path) -> float:
    """Median time of hashing every file of a checkpoint."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for path in files:
            file_facts(path)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def checkpoint_rows(device: torch.device) -> list[Row]:
    engine, step = build(device)
    for _ in range(3):
        step()
    with tempfile.TemporaryDirectory() as folder:
        writers: dict[str, CheckpointWriter | None] = {"none": None}
        for name in ("sync", "async"):
            config = CheckpointConfig(keep_last=2, asynchronous=name == "async")
            writers[name] = CheckpointWriter(Path(folder) / name, config, engine.groups, "config: {}\n")
        measured = take_turns(engine, step, writers)
        newest = max((Path(folder) / "sync" / "checkpoints").glob("step-*"))
        num_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        hashing = hash_seconds(newest)
    engine.close()
    without = statistics.median(measured["none"].total)
    shape: dict[str, int | str] = {"steps": ROUNDS * STEPS, "save_interval": STEPS, "B": ROWS, "S": LENGTH,
                                   "D": QUICKSTART.hidden_size, "layers": QUICKSTART.num_layers, "E": QUICKSTART.num_experts,
                                   "checkpoint_bytes": num_bytes}

    def row(op: str, seconds: float, blocked: float) -> Row:
        times = {"ours": 1e3 * seconds / STEPS, "without": 1e3 * without / STEPS}
        return make_row(op, shape, torch.float32, device, times, None, blocked_share=round(blocked / without, 5),
                        blocked_ms_per_save=round(1e3 * blocked, 3))

    rows = [row(f"checkpoint_{name}", statistics.median(measured[name].total), statistics.median(measured[name].blocked))
            for name in ("sync", "async")]
    return [*rows, row("checkpoint_manifest", without + hashing, hashing)]


def run(device: torch.device) -> list[Row]:
    """Every row of this bench. The watchdog's share is one more function here, inside the same process group."""
    with process_group(60):
        logging.getLogger("loadstone").setLevel(logging.WARNING)
        return checkpoint_rows(device)


if __name__ == "__main__":
    main("reliability", run)
