"""Checkpoints that any layout can read: one key per parameter and per global expert, in torch's
distributed format.

    checkpoints/step-00000100/
        weights/          torch.distributed.checkpoint files: "<parameter>/<state>" with the states
                          fp32, exp_avg and exp_avg_sq (ema where there is
                          one, momentum_buffer with Muon) and all experts of a layer stacked
                          (expert_stacks.py), and "buffer/<name>"; small tensors share
                          entries (packs.py). Readers ask for
                          "<parameter>[.<global expert>]/<state>"
        state.json        step, consumed samples and tokens, layout, versions, W&B id, last held-out
                          loss
        rng-<rank>.json   random states of every rank
        config.yaml       the resolved config
        manifest.json     size and SHA-256 of every file above; written last
    checkpoints/latest    name of the newest complete checkpoint

This file writes them. A checkpoint is written into a hidden folder, put on disk and renamed when
whole; a rank that cannot write takes the others with it, and the last complete checkpoint stays.
Each parameter is gathered on its own and kept by one rank only, so no rank ever holds the full
model. Which checkpoint is read says folder.py, how reader.py, and what makes one whole
train/files/manifest.py.
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
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from model.moe.experts import expert_ids_of
from model.parallel.groups import ParallelGroups
from train.checkpoint.agreement import CheckpointWriteError, Failure, chain, describe, everyone
from train.checkpoint.background import Background
from train.checkpoint.expert_stacks import EXPERT_IDS, Rows, StackSavePlanner, rows_per_piece
from train.checkpoint.folder import (
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
from train.checkpoint.packs import BYTES_PER_MEMBER, Member, pack
from train.checkpoint.random_state import restore_rng, rng_file, rng_state
from train.checkpoint.reader import load_engine, load_weights
from train.config.training import CheckpointConfig
from train.engine.deepspeed import Engine
from train.files.durable import remove, sync_folder, write_json, write_text
from train.files.hashed_file import HashedFile
from train.files.manifest import FORMAT, MANIFEST, CheckpointError, file_facts

__all__ = [
    "CheckpointError",
    "CheckpointWriteError",
    "CheckpointWriter",
    "damage",
    "find_checkpoint",
    "load_engine",
    "load_weights",
    "read_state",
    "restore_rng",
    "rng_state",
    "set_newer_aside",
]
log = logging.getLogger("loadstone")
SPACE_FACTOR = 1.02
"""Free space that is asked for, over the bytes to write."""
BYTES_PER_TENSOR, BYTES_PER_RANK = 2048, 40 * 1024
"""What a tensor's header with its line in the index, and a rank's random state (25 kB of JSON),
take at most.
"""


@dataclass(frozen=True)
class Snapshot:
    """Everything this rank writes, on the host: what a checkpoint holds is what was true when it
    was made.
    """

    step: int
    """Optimiser steps done."""
    tensors: dict[str, torch.Tensor]
    """Parameters and optimiser state by their key in the checkpoint, small ones in packs."""
    members: dict[str, Member]
    """Where the tensors lie that are in packs."""
    stacks: dict[str, list[Rows]]
    """Rows of the experts' stacks by key."""
    facts: dict[str, Any]
    """What state.json holds."""
    rng: dict[str, Any]
    """State of every random generator of this rank."""

    @property
    def num_bytes(self) -> int:
        """Estimate from above of what this rank writes."""
        tensors = [
            *self.tensors.values(),
            *(rows.values for parts in self.stacks.values() for rows in parts),
        ]
        return (
            BYTES_PER_RANK
            + BYTES_PER_MEMBER * len(self.members)
            + sum(tensor.nbytes + BYTES_PER_TENSOR for tensor in tensors)
        )


class CheckpointWriter:
    """Saves, keeps the newest `keep_last` and the best, and never deletes before the new one is
    complete.

    With `config.asynchronous`, save() copies to the host and returns; one thread writes while
    training goes on. The ranks agree through a process group of their own, so a save and the
    training never wait in each other's collectives.

    Construct on every rank (collective). Every public method but best_loss is collective.

    Attributes:
        saved_step: step of the last checkpoint this writer has completed; None before there is one.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        groups: ParallelGroups,
        resolved_config: str,
        timeout_seconds: float = 1800.0,
    ):
        self.folder = run_dir / "checkpoints"
        self.config = config
        self.groups = groups
        self.resolved_config = resolved_config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group(
            backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds)
        )
        self.saved_step: int | None = None
        self._hashed: dict[Path, dict[str, Any]] = {}
        self._background = Background("checkpoint")

    def save(self, engine: Engine, state: dict[str, Any]) -> Path | None:
        """Write the checkpoint of state["step"], after the one that may still be written; returns
        its folder.

        With `asynchronous` the folder is not there yet: the checkpoint is complete once wait(), or
        the next save, returns. None: it could not be written and `on_error` is "continue".

        Raises:
            CheckpointWriteError: on every rank, when this checkpoint, or the one before, could not
                be written on some.
        """
        self.wait()
        snapshot = self._snapshot(engine, state)
        if self.config.asynchronous:
            self._background.start(lambda: self._write(snapshot))
        elif not self._tolerated(lambda: self._write(snapshot)):
            return None
        return self.folder / name_of(snapshot.step)

    def wait(self) -> bool:
        """Return once no checkpoint is being written. False where the last one could not be, and
        `on_error` is "continue".

        Call it before the process group is left.

        Raises:
            CheckpointWriteError: on every rank, when it could not be written.
        """
        return self._tolerated(self._background.wait)

    def require(self, step: int) -> None:
        """Return once the checkpoint of this step, saved before, is complete.

        Raises:
            CheckpointWriteError: on every rank, when it could not be written, whatever `on_error`
                says.
        """
        self.wait()
        if self.saved_step != step:
            raise CheckpointWriteError(
                self.folder,
                Failure(0, errno.EIO, "the last checkpoint is missing, the reason stands above"),
            )

    def mark_best(self, step: int, val_loss: float, sequences: int | None = None) -> None:
        """Remember the saved checkpoint of this step as the one with the lowest held-out loss, over
        so many sequences.

        Raises:
            CheckpointWriteError: on every rank, when the record, or the checkpoint still being
                written, could not be.
        """
        if self.config.keep_best:
            self.wait()
            self._tolerated(
                lambda: self._on_rank_zero(
                    self.folder / "best.json",
                    lambda: self._mark_best(name_of(step), val_loss, sequences),
                )
            )

    def best_loss(self, sequences: int | None = None) -> float:
        """Held-out loss of the best checkpoint, in nats; infinite before there is one.

        sequences: infinite, too, if it was measured on another number of held-out ones: such losses
            do not compare.
        """
        best = read_best(self.folder)
        if best and sequences is not None and best.get("sequences", sequences) != sequences:
            log.info(
                "the best loss so far, %.4f (%s), is of %s held-out "
                "sequences and does not compare with one of %d",
                best["val_loss"],
                best["checkpoint"],
                best["sequences"],
                sequences,
            )
            return float("inf")
        return float(best["val_loss"]) if best else float("inf")

    # --- on the thread that trains ----------------------------------------------------------------

    def _snapshot(self, engine: Engine, state: dict[str, Any]) -> Snapshot:
        facts = {
            "format": FORMAT,
            **copy.deepcopy(state),
            "world_size": self.world_size,
            "zero_stage": engine.stage,
            "expert_parallel_size": self.groups.expert_size,
            "context_parallel_size": self.groups.context_size,
            "context_gather_size": self.groups.gather_size,
            "tensor_parallel_size": self.groups.tensor_size,
            "pipeline_parallel_size": self.groups.pipeline_size,
            "versions": versions(),
        }
        return Snapshot(state["step"], *self._owned_tensors(engine), facts, rng_state())

    def _owned_tensors(
        self, engine: Engine
    ) -> tuple[dict[str, torch.Tensor], dict[str, Member], dict[str, list[Rows]]]:
        """The share of the state this rank writes: whole tensors, the small ones packed, where
        those lie, and rows of stacks of experts.
        Every parameter is gathered by its group, then dropped by all but one rank: dense parameters
        go to the rank of the stage with the least so far, pieces of the stacks to the one of those
        that hold the same experts.
        """
        engine.prepare_gather()
        expert_ids = expert_ids_of(engine.module)
        load, expert_load = [0] * self.groups.stage_size, [0] * self.groups.expert_data_size
        owned: dict[str, torch.Tensor] = {}
        stacks: dict[str, list[Rows]] = {}
        num_stacks = sum(
            len(engine.state_keys(parameter))
            for name, parameter in engine.named_parameters()
            if name in expert_ids
        )

        for name, parameter in engine.named_parameters():
            # All ranks of a stage count alike, so they agree on the owner without a word.
            ids = expert_ids.get(name)
            if ids is None:
                owner = load.index(min(load))
                load[owner] += engine.parameter_shape(parameter).numel()
            else:
                stacks[f"{name}/{EXPERT_IDS}"] = self._rows_of_ids(ids)

            # Gathered by all, kept by the owner: one parameter at a time is in memory as a whole.
            for state_key in engine.state_keys(parameter):
                full = engine.gather_state(parameter, state_key)
                if ids is not None:
                    stacks[f"{name}/{state_key}"] = self._own_rows(full, num_stacks, expert_load)
                elif owner == self.groups.stage_rank:
                    owned[f"{name}/{state_key}"] = full.detach().to("cpu", copy=True)

        # Buffers are the same on every rank of a stage.
        if self.groups.stage_rank == 0:
            owned.update(
                {
                    f"buffer/{name}": b.detach().to("cpu", copy=True)
                    for name, b in engine.module.named_buffers()
                }
            )
        return *pack(owned, self.rank), stacks

    def _own_rows(self, full: torch.Tensor, num_stacks: int, load: list[int]) -> list[Rows]:
        """What this rank writes of the local experts [L, ...]. load: elements so far of every
        replica; gains these.
        """
        local, rows = len(full), []
        step = rows_per_piece(local, full[0].nbytes, num_stacks, len(load))
        for start in range(0, local, step):
            piece = full[start : start + step]
            owner = load.index(min(load))
            load[owner] += piece.numel()
            if owner == self.groups.expert_data_rank:
                rows.append(
                    Rows(
                        self.groups.expert_rank * local + start,
                        local * self.groups.expert_size,
                        piece.detach().to("cpu", copy=True),
                    )
                )
        return rows

    def _rows_of_ids(self, ids: tuple[int, ...]) -> list[Rows]:
        """Which experts the local rows are, of which the first replica tells."""
        if self.groups.expert_data_rank:
            return []
        return [
            Rows(
                self.groups.expert_rank * len(ids),
                len(ids) * self.groups.expert_size,
                torch.tensor(ids),
            )
        ]

    def _tolerated(self, action: Callable[[], object]) -> bool:
        """Whether the action went well; its failure is raised unless `on_error` is "continue"."""
        try:
            action()
        except CheckpointWriteError as error:
            if self.config.on_error == "stop":
                raise
            log.warning(
                "no checkpoint was saved: %s; training goes on (checkpoint.on_error=continue)",
                error,
            )
            return False
        return True

    # --- on the thread that writes ----------------------------------------------------------------

    def _write(self, snapshot: Snapshot) -> None:
        """Write a complete checkpoint from the snapshot. What is left of one that failed is
        removed.
        """
        name = name_of(snapshot.step)
        scratch, final = self.folder / f".{name}.partial", self.folder / name
        try:
            needed = sum(everyone(self.group, scratch, lambda: snapshot.num_bytes))
            self._on_rank_zero(scratch, lambda: self._make_room(scratch, needed))
            everyone(self.group, scratch, lambda: wait_for_folder(scratch / "weights"))
            self._write_tensors(scratch / "weights", snapshot)
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
            raise OSError(
                errno.ENOSPC,
                f"{needed:,} bytes are needed and {free:,} are "
                "free; make room, or lower checkpoint.keep_last",
                str(self.folder),
            )
        (scratch / "weights").mkdir(parents=True)

    def _write_tensors(self, folder: Path, snapshot: Snapshot) -> None:
        writer = _Writer(folder)
        try:
            dcp.save(
                snapshot.tensors,
                storage_writer=writer,
                planner=StackSavePlanner(snapshot.stacks, snapshot.members),
                process_group=self.group,
            )
            self._hashed = {folder / name: facts for name, facts in writer.hashed.items()}
        except CheckpointException as error:  # the same one on every rank
            rank, (cause, _) = min(error.failures.items())
            raise CheckpointWriteError(folder, describe(rank, cause)) from cause

    def _write_records(self, folder: Path, snapshot: Snapshot) -> None:
        write_json(folder / rng_file(self.rank), snapshot.rng)
        if self.rank == 0:
            write_json(folder / "state.json", snapshot.facts)
            write_text(folder / "config.yaml", self.resolved_config)

    def _write_manifest(self, folder: Path) -> None:
        """Each rank hashes what it wrote and did not hash on the way; rank 0 writes the list, which
        makes the checkpoint complete.

        No rank lists the folder: on a network file system it may not see every new file of others
        at once.
        """
        shares = everyone(
            self.group,
            folder,
            lambda: {
                str(path.relative_to(folder)): self._hashed.get(path) or file_facts(path)
                for path in self._own_files(folder)
            },
        )
        files = {name: facts for share in shares for name, facts in share.items()}
        self._on_rank_zero(
            folder, lambda: write_json(folder / MANIFEST, {"format": FORMAT, "files": files})
        )

    def _own_files(self, folder: Path) -> list[Path]:
        own = [folder / rng_file(self.rank), *sorted((folder / "weights").glob(f"__{self.rank}_*"))]
        if self.rank:
            return own
        return [
            folder / "state.json",
            folder / "config.yaml",
            folder / "weights" / ".metadata",
            *own,
        ]

    def _commit(self, scratch: Path, final: Path) -> None:
        """Make the checkpoint visible: everything is on disk before it gets its name, then `latest`
        names it, then the old ones go.
        """
        sync_folder(scratch / "weights")
        sync_folder(scratch)
        put_in_place(scratch, final)
        try:
            remember_saved(self.folder.parent, final.name)
            point_latest(self.folder, final.name)
            sync_folder(self.folder)
            remove_old(self.folder, self.config.keep_last, self.config.keep_best)
        except OSError as error:
            # the checkpoint itself is complete and found without them
            log.warning("%s is saved, but tidying up after it failed: %s", final, error)

    def _mark_best(self, name: str, val_loss: float, sequences: int | None) -> None:
        if not is_complete(self.folder / name):
            log.warning("%s was not saved, so it is not kept as the best", self.folder / name)
            return
        point_best(self.folder, name, val_loss, sequences)
        sync_folder(self.folder)
        remove_old(self.folder, self.config.keep_last, self.config.keep_best)


class _HashingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.hashed: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as file:
            if "w" not in mode:
                yield file
                return
            with HashedFile(cast(BinaryIO, file)) as hashed:
                yield hashed
            self.hashed[Path(path).name] = hashed.facts()


class _Writer(FileSystemWriter):
    """Puts every file on disk, and reports the operating system's error that torch's serialiser
    hides behind its own.

    Copies nothing ahead: the tensors are on the host, and torch would open a CUDA context on device
    0 from the thread.

    Attributes:
        hashed: file name -> size and SHA-256, of every file written.
    """

    def __init__(self, folder: Path):
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)
        self.fs = _HashingFileSystem()
        self.hashed = self.fs.hashed

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
    raise RuntimeError(
        "rank 0 has made it, but this rank does not see it: "
        "run_dir must be on a file system that all ranks share"
    )


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "deepspeed", "megatron-core")},
    }
