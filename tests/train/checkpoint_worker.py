"""Ranks that save under faults, for test_checkpoint.py: rank 0 prints one JSON object per case with
what every rank saw.

checkpoint_worker.py FOLDER          all cases of CASES, each in sync and asynchronously
checkpoint_worker.py FOLDER kill     dies of SIGKILL while the second checkpoint is being written
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

import train.checkpoint.writer as checkpoint
from model.attention.config.dense import DenseAttentionConfig
from model.config import BalanceConfig, ModelConfig
from model.dispatch.config import AllToAllConfig
from model.moe.layer import ModelParts
from model.parallel.groups import destroy_parallel, initialize_parallel
from model.request import TokenBatch
from model.routers.config import TopKConfig
from model.transformer import Transformer
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.restore import restore
from train.checkpoint.writer import (
    CheckpointWriteError,
    CheckpointWriter,
    damage,
    find_checkpoint,
    load_weights,
)
from train.config.training import CheckpointConfig, OptimConfig, TrainConfig
from train.engine.deepspeed import Engine
from train.rank.runtime import process_group

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=16,
    num_experts=4,
    expert_intermediate_size=8,
    max_seq_len=16,
)
PARTS = ModelParts(TopKConfig(top_k=2), DenseAttentionConfig(), AllToAllConfig(), BalanceConfig())


# --- what goes wrong ------------------------------------------------------------------------------


def fails(
    target: str, code: int, on: Callable[..., bool] = lambda *arguments: True
) -> contextlib.AbstractContextManager:
    """The function of train.checkpoint raises, for the arguments that `on` picks."""
    original = getattr(checkpoint, target)

    def broken(*arguments):
        if on(*arguments):
            raise OSError(code, os.strerror(code), str(arguments[0]))
        return original(*arguments)

    return mock.patch.object(checkpoint, target, broken)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses longer files, in the middle of torch's serialiser."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_space() -> contextlib.AbstractContextManager:
    return mock.patch.object(
        os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 9, 3, 3, 9, 9, 9, 0, 255))
    )


CASES: dict[str, tuple[int, Callable[[], contextlib.AbstractContextManager]]] = {
    "tensors": (1, lambda: file_size_limit(20_000)),
    "last tensor": (1, lambda: file_size_limit(2_000)),
    "records": (1, lambda: fails("write_json", errno.EIO)),
    "hash": (1, lambda: fails("file_facts", errno.EIO)),
    "space": (0, no_space),
    "manifest": (
        0,
        lambda: fails("write_json", errno.ENOSPC, lambda path, data: path.name == "manifest.json"),
    ),
    "rename": (0, lambda: fails("put_in_place", errno.EROFS)),
    "bug": (1, lambda: mock.patch.object(checkpoint, "rng_file", lambda rank: 1 / 0)),
}
"""Name -> the rank it happens on, and the fault."""


# --- cases ----------------------------------------------------------------------------------------


class Job:
    def __init__(self, folder: Path, expert_size: int | None = None, stage: int = 1):
        self.folder, self.groups = folder, initialize_parallel(expert_size or dist.get_world_size())
        settings = TrainConfig(
            num_steps=9, seq_len=8, micro_batch_size=1, global_batch_size=dist.get_world_size()
        )
        self.engine = Engine(
            Transformer(CONFIG, PARTS, self.groups),
            self.groups,
            settings,
            OptimConfig(lr=0.1),
            {"zero_optimization": {"stage": stage}},
        )
        self.step()

    def step(self) -> None:
        ids = torch.arange(8).unsqueeze(0)
        cu_seqlens = torch.tensor([0, 8], dtype=torch.int32)
        output = self.engine.forward(TokenBatch(ids, ids + 1, ids, cu_seqlens, max_seqlen=8))
        self.engine.backward(output.loss_sum, is_last=True)
        self.engine.step()

    def writer(self, name: str, **settings) -> CheckpointWriter:
        return CheckpointWriter(
            self.folder / name, CheckpointConfig(**settings), self.groups, "config: {}\n", 60.0
        )

    def save(self, writer: CheckpointWriter, step: int) -> Path | None:
        return writer.save(self.engine, {"step": step})

    def digest(self, run: Path) -> float:
        """Of the newest checkpoint's weights, read into one process."""
        model = Transformer(CONFIG, PARTS)
        load_weights(model, find_checkpoint(run))
        return float(sum(p.double().square().sum() for p in model.parameters()))


def names(writer: CheckpointWriter) -> list[str]:
    return sorted(path.name for path in writer.folder.iterdir())


def report(case: str, **facts) -> None:
    """One line with the facts of every rank. Collective."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    if dist.get_rank() == 0:
        print(json.dumps({"case": case, "ranks": everyone}), flush=True)


def failing(job: Job, case: str, asynchronous: bool, on_error: str) -> None:
    """A whole checkpoint, one that fails, and a whole one again."""
    rank, fault = CASES[case]
    writer = job.writer(
        f"{case}-{asynchronous}-{on_error}".replace(" ", "_"),
        asynchronous=asynchronous,
        on_error=on_error,
    )
    job.save(writer, 1)
    writer.wait()
    seen: dict = {"error": None, "saved": None}
    with fault() if dist.get_rank() == rank else contextlib.nullcontext():
        try:
            path = job.save(writer, 2)
            seen["saved"] = path is not None and writer.wait()
        except CheckpointWriteError as error:
            seen |= {"error": str(error), "errno": error.errno, "rank": error.rank}
    dist.barrier()
    seen |= {
        "left": names(writer),
        "damage": damage(writer.folder / "step-00000001"),
        "step": writer.saved_step,
    }
    dist.barrier()
    job.save(writer, 3)
    writer.wait()
    report(
        f"{case}/{asynchronous}/{on_error}",
        **seen,
        after=names(writer),
        newest=find_checkpoint(writer.folder.parent).name,
    )


def snapshot(job: Job, asynchronous: bool) -> None:
    """What is saved is what was true when save() was called, however late it is written."""
    writer = job.writer(f"snapshot-{asynchronous}", asynchronous=asynchronous)
    job.save(writer, 1)
    writer.wait()
    digest = job.digest(writer.folder.parent)
    go = threading.Event()
    original = CheckpointWriter._write_tensors

    def late(*arguments):
        if asynchronous:
            go.wait()
        original(*arguments)

    torch.manual_seed(7)
    state = {"step": 2, "progress": {"tokens": 5}}
    with mock.patch.object(CheckpointWriter, "_write_tensors", late):
        path = writer.save(job.engine, state)
        before = (writer.folder / "step-00000002").exists()
        job.step()
        torch.rand(9)
        state["progress"]["tokens"] = 6
        go.set()
        writer.wait()
    saved = json.loads((path / "state.json").read_text())
    torch.manual_seed(7)
    same_rng = (
        json.loads((path / f"rng-{dist.get_rank():05d}.json").read_text()) == checkpoint.rng_state()
    )
    report(
        f"snapshot/{asynchronous}",
        there_at_once=before,
        same=job.digest(writer.folder.parent) == digest,
        tokens=saved["progress"]["tokens"],
        same_rng=same_rng,
        latest=(writer.folder / "latest").read_text(),
    )


def one_after_another(job: Job) -> None:
    """The next save, and marking the best, wait for the one in flight."""
    writer = job.writer("queue", asynchronous=True, keep_last=1)
    original = CheckpointWriter._write_tensors

    def slow(*arguments):
        time.sleep(0.3)
        original(*arguments)

    with mock.patch.object(CheckpointWriter, "_write_tensors", slow):
        job.save(writer, 1)
        writer.mark_best(1, 2.5)
        marked = names(writer)
        job.save(writer, 2)
        job.save(writer, 3)
        second = find_checkpoint(writer.folder.parent).name
        writer.mark_best(9, 1.0)  # was never saved
        writer.wait()
    report("queue", marked=marked, second=second, left=names(writer), best=writer.best_loss())


def unshared(job: Job) -> None:
    writer = job.writer(f"unshared-{dist.get_rank()}")
    with mock.patch.object(time, "sleep", lambda seconds: None):
        try:
            job.save(writer, 1)
            report("unshared", error=None)
        except CheckpointWriteError as error:
            report("unshared", error=str(error))


def durable(job: Job) -> None:
    """The order of what makes a checkpoint survive a power cut, as rank 0 does it: ["sync" or
    "rename", path] ...
    """
    writer = job.writer("durable")
    done: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def inside(path: object) -> str:
        return os.path.relpath(str(path), writer.folder)

    def recorded_fsync(descriptor):
        done.append(("sync", inside(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def recorded_rename(self, target):
        done.append(("rename", inside(target)))
        return rename(self, target)

    def recorded_replace(self, target):
        done.append(("rename", inside(target)))
        return replace(self, target)

    with (
        mock.patch.object(os, "fsync", recorded_fsync),
        mock.patch.object(Path, "rename", recorded_rename),
        mock.patch.object(Path, "replace", recorded_replace),
    ):
        final = job.save(writer, 1)
    files = sorted(str(path.relative_to(final)) for path in final.rglob("*"))
    report("durable", done=done, files=files)


def other_layout(job: Job) -> None:
    """Saved at ZeRO 1 by two ranks with half the experts each, resumed at ZeRO 3 with all experts
    on both. Half-way through its only file with tensors of rank 1, the newest checkpoint is
    damaged.
    """
    writer = job.writer("layout", keep_last=5)
    job.save(writer, 1)
    job.step()
    newest = job.save(writer, 2)
    if dist.get_rank() == 0:
        path = newest / "weights" / "__1_0.distcp"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    job.engine.close()
    destroy_parallel()
    other = Job(job.folder, expert_size=1, stage=3)
    found, state = restore(other.engine, writer.folder.parent)
    again = other.save(other.writer("layout-again"), 1)
    before, after = (everything_in(path) for path in (found, again))
    report(
        "layout",
        step=state["step"],
        keys=before.keys() == after.keys(),
        same=all(torch.equal(tensor, after[key]) for key, tensor in before.items()),
        damage=damage(again),
    )
    other.engine.close()


def everything_in(path: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(path)
    tensors = {key: torch.empty(shape) for key, shape in reader.shapes.items()}
    reader.read(tensors)
    return tensors


def killed(job: Job) -> None:
    writer = job.writer("killed", asynchronous=True)
    job.save(writer, 1)
    writer.wait()
    original = CheckpointWriter._write_tensors

    def die(*arguments):
        original(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    CheckpointWriter._write_tensors = die
    job.save(writer, 2)
    writer.wait()


def main() -> None:
    with process_group(60):
        logging.getLogger("loadstone").setLevel(logging.ERROR)
        job = Job(Path(sys.argv[1]))
        if sys.argv[2:] == ["kill"]:
            killed(job)
        for asynchronous in (False, True):
            for case in CASES:
                failing(job, case, asynchronous, "stop")
            failing(job, "records", asynchronous, "continue")
            snapshot(job, asynchronous)
        one_after_another(job)
        unshared(job)
        durable(job)
        other_layout(job)


if __name__ == "__main__":
    main()
