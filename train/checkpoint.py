"""Checkpoints that any layout can read: one key per parameter and per global expert, in torch's distributed format.

    checkpoints/step-00000100/
        weights/          torch.distributed.checkpoint files: "<parameter>[.<global expert>]/<fp32|exp_avg|exp_avg_sq>"
                          and "buffer/<name>"
        state.json        step, consumed samples and tokens, layout, versions, W&B id, last held-out loss
        rng-<rank>.json   random states of every rank
        config.yaml       the resolved config
        manifest.json     size and SHA-256 of every file above; written last
    checkpoints/latest    name of the newest complete checkpoint

This file writes them. A checkpoint is written into a hidden folder, put on disk and renamed when whole; a rank that
cannot write takes the others with it, and the last complete checkpoint stays. Each parameter is gathered on its own and
kept by one rank only, so no rank ever holds the full model. Which checkpoint is read: checkpoint_folder.py; how:
checkpoint_reader.py; what makes one whole: manifest.py.
"""

from __future__ import annotations

import copy
import datetime
import errno
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from model.parallel import ParallelGroups
from train.agreement import CheckpointWriteError, Failure, chain, describe, everyone
from train.background import Background
from train.checkpoint_folder import (
    damage,
    find_checkpoint,
    is_complete,
    name_of,
    point_best,
    point_latest,
    put_in_place,
    read_best,
    read_state,
    remember_saved,
    remove_leftovers,
    remove_old,
    set_newer_aside,
)
from train.checkpoint_reader import expert_ids_of, load_engine, load_weights
from train.config import CheckpointConfig
from train.engine import STATE_KEYS, Engine
from train.manifest import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    file_facts,
    remove,
    sync_folder,
    write_json,
    write_text,
)
from train.random_state import restore_rng, rng_file, rng_state

__all__ = ["CheckpointError", "CheckpointWriteError", "CheckpointWriter", "damage", "find_checkpoint", "load_engine",
           "load_weights", "read_state", "restore_rng", "rng_state", "set_newer_aside"]
log = logging.getLogger("loadstone")
SPACE_FACTOR = 1.02
"""Free space that is asked for, over the bytes to write."""
BYTES_PER_TENSOR, BYTES_PER_RANK = 2048, 40 * 1024
"""What a tensor's header with its line in the index, and a rank's random state (25 kB of JSON), take at most."""


@dataclass(frozen=True)
class Snapshot:
    """Everything this rank writes, on the host: what a checkpoint holds is what was true when it was made."""

    step: int
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]
    rng: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Estimate from above of what this rank writes."""
        return BYTES_PER_RANK + sum(t.numel() * t.element_size() + BYTES_PER_TENSOR for t in self.tensors.values())


class CheckpointWriter:
    """Saves, keeps the newest `keep_last` and the best, and never deletes before the new one is complete.

    With `config.asynchronous`, save() copies to the host and returns; one thread writes while training goes on. The ranks
    agree through a process group of their own, so a save and the training never wait in each other's collectives.

    Construct on every rank (collective). Every public method but best_loss is collective.

    Attributes:
        saved_step: step of the last checkpoint this writer has completed; None before there is one.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, groups: ParallelGroups, resolved_config: str,
                 timeout_seconds: float = 1800.0):
        self.folder = run_dir / "checkpoints"
        self.config, self.groups, self.resolved_config = config, groups, resolved_config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))
        self.saved_step: int | None = None
        self._background = Background("checkpoint")

    def save(self, engine: Engine, state: dict[str, Any]) -> Path | None:
        """Write the checkpoint of state["step"], after the one that may still be written; returns its folder.

        With `asynchronous` the folder is not there yet: the checkpoint is complete once wait(), or the next save,
        returns. None: it could not be written and `on_error` is "continue".

        Raises:
            CheckpointWriteError: on every rank, when this checkpoint, or the one before, could not be written on some.
        """
        self.wait()
        snapshot = self._snapshot(engine, state)
        if self.config.asynchronous:
            self._background.start(lambda: self._write(snapshot))
        elif not self._tolerated(lambda: self._write(snapshot)):
            return None
        return self.folder / name_of(snapshot.step)

    def wait(self) -> bool:
        """Return once no checkpoint is being written; False: the last one could not be, and `on_error` is "continue".

        Call it before the process group is left.

        Raises:
            CheckpointWriteError: on every rank, when it could not be written.
        """
        return self._tolerated(self._background.wait)

    def require(self, step: int) -> None:
        """Return once the checkpoint of this step, saved before, is complete.

        Raises:
            CheckpointWriteError: on every rank, when it could not be written, whatever `on_error` says.
        """
        self.wait()
        if self.saved_step != step:
            raise CheckpointWriteError(self.folder, Failure(0, errno.EIO, "the last checkpoint is missing, the reason "
                                                            "stands above"))

    def mark_best(self, step: int, val_loss: float, sequences: int | None = None) -> None:
        """Remember the saved checkpoint of this step as the one with the lowest held-out loss, over so many sequences.

        Raises:
            CheckpointWriteError: on every rank, when the record, or the checkpoint still being written, could not be.
        """
        if self.config.keep_best:
            self.wait()
            self._tolerated(lambda: self._on_rank_zero(self.folder / "best.json",
                                                       lambda: self._mark_best(name_of(step), val_loss, sequences)))

    def best_loss(self, sequences: int | None = None) -> float:
        """Held-out loss of the best checkpoint, in nats; infinite before there is one.

        sequences: infinite, too, if it was measured on another number of held-out ones: such losses do not compare.
        """
        best = read_best(self.folder)
        if best and sequences is not None and best.get("sequences", sequences) != sequences:
            log.info("the best loss so far, %.4f (%s), is of %s held-out sequences and does not compare with one of %d",
                     best["val_loss"], best["checkpoint"], best["sequences"], sequences)
            return float("inf")
        return float(best["val_loss"]) if best else float("inf")

    # --- on the thread that trains -----------------------------------------------------------------------------------

    def _snapshot(self, engine: Engine, state: dict[str, Any]) -> Snapshot:
        facts = {"format": FORMAT, **copy.deepcopy(state), "world_size": self.world_size, "zero_stage": engine.stage,
                 "expert_parallel_size": self.groups.expert_size, "versions": versions()}
        return Snapshot(state["step"], self._owned_tensors(engine), facts, rng_state())

    def _owned_tensors(self, engine: Engine) -> dict[str, torch.Tensor]:
        """The share of the state this rank writes. Every parameter is gathered by its group, then dropped by all but
        one rank: dense parameters go to the rank with the least so far, experts round-robin over their replicas."""
        engine.prepare_gather()
        expert_ids = expert_ids_of(engine.module)
        load = [0] * self.world_size
        owned: dict[str, torch.Tensor] = {}
        for name, parameter in engine.named_parameters():
            is_expert = name in expert_ids
            if not is_expert:
                owner = load.index(min(load))
                load[owner] += engine.parameter_shape(parameter).numel()
            for state_key in STATE_KEYS:
                full = engine.gather_state(parameter, state_key)
                if not is_expert and owner == self.rank:
                    owned[f"{name}/{state_key}"] = full.detach().to("cpu", copy=True)
                elif is_expert:
                    for local, expert in enumerate(expert_ids[name]):
                        if expert % self.groups.expert_data_size == self.groups.expert_data_rank:
                            owned[f"{name}.{expert}/{state_key}"] = full[local].detach().to("cpu", copy=True)
        if self.rank == 0:
            owned.update({f"buffer/{name}": b.detach().to("cpu", copy=True) for name, b in engine.module.named_buffers()})
        return owned

    def _tolerated(self, action: Callable[[], object]) -> bool:
        """Whether the action went well; its failure is raised unless `on_error` is "continue"."""
        try:
            action()
        except CheckpointWriteError as error:
            if self.config.on_error == "stop":
                raise
            log.warning("no checkpoint was saved: %s; training goes on (checkpoint.on_error=continue)", error)
            return False
        return True

    # --- on the thread that writes -----------------------------------------------------------------------------------

    def _write(self, snapshot: Snapshot) -> None:
        """From the snapshot to a complete checkpoint; what is left of one that failed is removed."""
        name = name_of(snapshot.step)
        scratch, final = self.folder / f".{name}.partial", self.folder / name
        try:
            needed = sum(everyone(self.group, scratch, lambda: snapshot.num_bytes))
            self._on_rank_zero(scratch, lambda: self._make_room(scratch, needed))
            everyone(self.group, scratch, lambda: wait_for_folder(scratch / "weights"))
            self._write_tensors(scratch / "weights", snapshot.tensors)
            everyone(self.group, scratch, lambda: self._write_records(scratch, snapshot))
            self._write_manifest(scratch)
            self._on_rank_zero(final, lambda: self._commit(scratch, final))
        except CheckpointWriteError:
            if self.rank == 0:
                remove(scratch)
            raise
        self.saved_step = snapshot.step
        log.info("saved %s", final)

    def _on_rank_zero(self, path: Path, action: Callable[[], None]) -> None:
        everyone(self.group, path, lambda: action() if self.rank == 0 else None)

    def _make_room(self, scratch: Path, needed: int) -> None:
        """An empty folder for the checkpoint, on a disk that has the space (bytes) for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder.parent)
        remove_leftovers(self.folder)
        disk = os.statvfs(self.folder)
        needed, free = int(needed * SPACE_FACTOR), disk.f_bavail * disk.f_frsize
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed and {free:,} are free; make room, or lower "
                                        "checkpoint.keep_last", str(self.folder))
        (scratch / "weights").mkdir(parents=True)

    def _write_tensors(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        try:
            dcp.save(tensors, storage_writer=_Writer(folder), process_group=self.group)
        except CheckpointException as error:  # the same one on every rank
            rank, (cause, _) = min(error.failures.items())
            raise CheckpointWriteError(folder, describe(rank, cause)) from cause

    def _write_records(self, folder: Path, snapshot: Snapshot) -> None:
        write_json(folder / rng_file(self.rank), snapshot.rng)
        if self.rank == 0:
            write_json(folder / "state.json", snapshot.facts)
            write_text(folder / "config.yaml", self.resolved_config)

    def _write_manifest(self, folder: Path) -> None:
        """Each rank hashes what it wrote; rank 0 writes the list, which makes the checkpoint complete.

        No rank lists the folder: on a network file system it may not see every new file of others at once.
        """
        shares = everyone(self.group, folder, lambda: {
            str(path.relative_to(folder)): file_facts(path) for path in self._own_files(folder)})
        files = {name: facts for share in shares for name, facts in share.items()}
        self._on_rank_zero(folder, lambda: write_json(folder / MANIFEST, {"format": FORMAT, "files": files}))

    def _own_files(self, folder: Path) -> list[Path]:
        own = [folder / rng_file(self.rank), *sorted((folder / "weights").glob(f"__{self.rank}_*"))]
        return own if self.rank else [folder / "state.json", folder / "config.yaml", folder / "weights" / ".metadata", *own]

    def _commit(self, scratch: Path, final: Path) -> None:
        """Everything on disk, then the name, then `latest`, then the old ones go."""
        sync_folder(scratch / "weights")
        sync_folder(scratch)
        put_in_place(scratch, final)
        try:
            remember_saved(self.folder.parent, final.name)
            point_latest(self.folder, final.name)
            sync_folder(self.folder)
            remove_old(self.folder, self.config.keep_last, self.config.keep_best)
        except OSError as error:  # the checkpoint itself is complete and found without them
            log.warning("%s is saved, but tidying up after it failed: %s", final, error)

    def _mark_best(self, name: str, val_loss: float, sequences: int | None) -> None:
        if not is_complete(self.folder / name):
            log.warning("%s was not saved, so it is not kept as the best", self.folder / name)
            return
        point_best(self.folder, name, val_loss, sequences)
        sync_folder(self.folder)
        remove_old(self.folder, self.config.keep_last, self.config.keep_best)


class _Writer(FileSystemWriter):
    """Puts every file on disk, and reports the operating system's error that torch's serialiser hides behind its own.

    Copies nothing ahead: the tensors are on the host, and torch would open a CUDA context on device 0 from the thread.
    """

    def __init__(self, folder: Path):
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)

    def write_data(self, plan: Any, planner: Any) -> Any:
        with _system_errors():
            return super().write_data(plan, planner)

    def finish(self, metadata: Any, results: Any) -> None:
        with _system_errors():
            super().finish(metadata, results)


@contextmanager
def _system_errors() -> Iterator[None]:
    """Errors travel between ranks without what caused them, so the cause is what must be raised."""
    try:
        yield
    except Exception as error:
        cause = next((link for link in chain(error) if isinstance(link, OSError)), None)
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, cause.filename) from error


def wait_for_folder(folder: Path) -> None:
    """
    Raises:
        RuntimeError: rank 0 has made the folder and this rank does not see it.
    """
    for _ in range(10):
        if folder.is_dir():
            return
        time.sleep(0.5)  # a network file system may take a moment
    raise RuntimeError("rank 0 has made it, but this rank does not see it: run_dir must be on a file system that all ranks "
                       "share")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed", "megatron-core")}}
