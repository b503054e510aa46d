"""Checkpoints that any layout can read: one key per parameter and per global expert, in torch's distributed format.

    checkpoints/step-00000100/
        weights/          torch.distributed.checkpoint files: "<parameter>[.<global expert>]/<fp32|exp_avg|exp_avg_sq>"
                          and "buffer/<name>"
        state.json        step, consumed samples and tokens, layout, versions, W&B id, last held-out loss
        rng-<rank>.json   random states of every rank
        config.yaml       the resolved config
        manifest.json     size and SHA-256 of every file above; written last
    checkpoints/latest    name of the newest complete checkpoint

A checkpoint is written into a hidden folder and renamed when whole. Each parameter is gathered on its own and kept by
one rank only, so no rank ever holds the full model. Nothing read from a checkpoint is executed: tensors are loaded
as tensors, and the one pickled index file through an unpickler that knows a handful of classes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import pickle
import platform
import random
import shutil
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from model.experts import Experts
from model.parallel import ParallelGroups
from train.config import CheckpointConfig
from train.engine import STATE_KEYS, Engine

log = logging.getLogger("loadstone")
FORMAT = 1
LOAD_CHUNK_BYTES = 2**29


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete or does not belong to this model; the message says which and why."""


# --- keys ------------------------------------------------------------------------------------------------------------

def _expert_ids(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter name -> global ids of the local experts stacked in it."""
    return {f"{name}.{key}": module.global_ids for name, module in model.named_modules() if isinstance(module, Experts)
            for key, _ in module.named_parameters(recurse=False)}


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _keys(name: str, expert_ids: dict[str, tuple[int, ...]]) -> list[str]:
    """Checkpoint names of a parameter: itself, or one per global expert it stacks."""
    return [f"{name}.{expert}" for expert in expert_ids[name]] if name in expert_ids else [name]


# --- writing ---------------------------------------------------------------------------------------------------------

class CheckpointWriter:
    """Saves, keeps the newest `keep_last` and the best, and never deletes before the new one is complete."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, groups: ParallelGroups, resolved_config: str):
        self.folder = run_dir / "checkpoints"
        self.config, self.groups, self.resolved_config = config, groups, resolved_config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def save(self, engine: Engine, state: dict[str, Any]) -> Path:
        """Write the checkpoint of state["step"]. Collective; returns its folder on every rank."""
        name = _name(state["step"])
        scratch, final = self.folder / f".{name}.partial", self.folder / name
        if self.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            (scratch / "weights").mkdir(parents=True)
        dist.barrier()
        dcp.save(self._owned_tensors(engine),
                 storage_writer=FileSystemWriter(scratch / "weights", sync_files=True))
        _write_json(scratch / f"rng-{self.rank:05d}.json", rng_state())
        if self.rank == 0:
            facts = {"format": FORMAT, **state, "world_size": self.world_size, "zero_stage": engine.stage,
                     "expert_parallel_size": self.groups.expert_size, "versions": versions()}
            _write_json(scratch / "state.json", facts)
            (scratch / "config.yaml").write_text(self.resolved_config)
        dist.barrier()
        self._write_manifest(scratch)
        if self.rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            scratch.rename(final)
            _sync(self.folder)
            _write_text(self.folder / "latest", name)
            self._remove_old(name)
        dist.barrier()
        return final

    def _owned_tensors(self, engine: Engine) -> dict[str, torch.Tensor]:
        """The share of the state this rank writes. Every parameter is gathered by its group, then dropped by all but
        one rank: dense parameters go to the rank with the least so far, experts round-robin over their replicas."""
        engine.prepare_gather()
        expert_ids = _expert_ids(engine.module)
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

    def _write_manifest(self, folder: Path) -> None:
        """Each rank hashes a share of the files; rank 0 writes the list, which makes the checkpoint complete.

        Rank 0's listing counts for all: on a network file system others may not see every new file at once.
        """
        files: list[Any] = [None]
        if self.rank == 0:
            files = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())]
        dist.broadcast_object_list(files, src=0)
        own = {name: _facts(folder / name) for name in files[0][self.rank::self.world_size]}
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, own)
        if self.rank == 0:
            _write_json(folder / "manifest.json", {"files": {k: v for part in everyone for k, v in part.items()}})

    def mark_best(self, step: int, val_loss: float) -> None:
        """Remember the saved checkpoint of this step as the one with the lowest held-out loss."""
        if self.rank == 0 and self.config.keep_best:
            _write_json(self.folder / "best.json", {"checkpoint": _name(step), "val_loss": val_loss})
            self._remove_old(_name(step))

    def best_loss(self) -> float:
        best = _read_best(self.folder)
        return float(best["val_loss"]) if best else float("inf")

    def _remove_old(self, newest: str) -> None:
        names = sorted(p.name for p in self.folder.glob("step-*") if (p / "manifest.json").is_file())
        keep = {newest, *names[-self.config.keep_last:]}
        best = _read_best(self.folder)
        if self.config.keep_best and best:
            keep.add(best["checkpoint"])
        for name in names:
            if name not in keep:
                shutil.rmtree(self.folder / name, ignore_errors=True)


# --- finding and verifying -------------------------------------------------------------------------------------------

def _read_best(folder: Path) -> dict[str, Any] | None:
    """{"checkpoint": name, "val_loss": loss} of the best checkpoint, or None before there is one."""
    path = folder / "best.json"
    return json.loads(path.read_text()) if path.is_file() else None


def find_checkpoint(run_dir: Path, prefer: str = "latest") -> Path:
    """The newest complete and undamaged checkpoint of a run; damaged ones are named in the log and passed over.

    prefer: "latest" or "best".

    Raises:
        CheckpointError: there is none.
    """
    folder = run_dir / "checkpoints"
    names = sorted((p.name for p in folder.glob("step-*") if p.is_dir()), reverse=True)
    best = _read_best(folder)
    if prefer == "best" and best:
        names = [best["checkpoint"], *(n for n in names if n != best["checkpoint"])]
    for name in names:
        found = damage(folder / name)
        if found is None:
            return folder / name
        log.warning("checkpoint %s is damaged (%s); trying the one before", folder / name, found)
    raise CheckpointError(f"no usable checkpoint under {folder}; is {run_dir} a run directory of launch.train?")


def set_newer_aside(checkpoint: Path) -> None:
    """Hide the checkpoints after the one a run goes on from (damaged ones), so that retention does not count them."""
    for path in sorted(checkpoint.parent.glob("step-*")):
        if path.name > checkpoint.name:
            hidden = path.with_name(f".passed-over-{path.name}")
            shutil.rmtree(hidden, ignore_errors=True)
            path.rename(hidden)
            log.warning("%s was passed over and is now %s", path.name, hidden)
    best = _read_best(checkpoint.parent)
    if best and not (checkpoint.parent / best["checkpoint"]).is_dir():
        (checkpoint.parent / "best.json").unlink()


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file matches the manifest."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"manifest.json: {type(error).__name__}"
    for name, facts in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {facts['size']}"
        if _facts(path)["sha256"] != facts["sha256"]:
            return f"{name} has another checksum"
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / "state.json").read_text())
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{checkpoint} has format {state.get('format')}; this version reads format {FORMAT}")
    return state


# --- reading ---------------------------------------------------------------------------------------------------------

def load_engine(engine: Engine, checkpoint: Path, step: int) -> None:
    """Restore master weights, optimiser moments and buffers under the engine's own layout."""
    expert_ids = _expert_ids(engine.module)
    engine.prepare_scatter(step)
    reader = _Reader(checkpoint)
    for chunk in _chunks(list(engine.named_parameters()), engine):
        want: dict[str, torch.Tensor] = {}
        for name, parameter in chunk:
            shape = engine.parameter_shape(parameter)
            shape = shape[1:] if name in expert_ids else shape
            want.update({f"{key}/{state}": torch.empty(shape) for key in _keys(name, expert_ids) for state in STATE_KEYS})
        reader.read(want)
        for name, parameter in chunk:
            for state in STATE_KEYS:
                engine.scatter_state(parameter, state, _assemble(want, name, expert_ids, state))
    engine.finish_scatter()
    _load_buffers(engine.module, reader)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Restore a plain model, outside any engine, from the fp32 master weights."""
    expert_ids = _expert_ids(model)
    reader = _Reader(checkpoint)
    for name, parameter in model.named_parameters():
        shape = parameter.shape[1:] if name in expert_ids else parameter.shape
        want = {f"{key}/fp32": torch.empty(shape) for key in _keys(name, expert_ids)}
        reader.read(want)
        with torch.no_grad():
            parameter.copy_(_assemble(want, name, expert_ids, "fp32"))
    _load_buffers(model, reader)


def _assemble(values: dict[str, torch.Tensor], name: str, expert_ids: dict[str, tuple[int, ...]],
              state: str) -> torch.Tensor:
    parts = [values[f"{key}/{state}"] for key in _keys(name, expert_ids)]
    return torch.stack(parts) if name in expert_ids else parts[0]


def _load_buffers(model: nn.Module, reader: _Reader) -> None:
    buffers = dict(model.named_buffers())
    want = {f"buffer/{name}": torch.empty(b.shape, dtype=b.dtype) for name, b in buffers.items()}
    reader.read(want)
    for name, buffer in buffers.items():
        buffer.copy_(want[f"buffer/{name}"])


def _chunks(parameters: list[tuple[str, nn.Parameter]], engine: Engine) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Parameters in groups whose state stays under LOAD_CHUNK_BYTES on the host."""
    chunk: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in parameters:
        chunk.append((name, parameter))
        size += 4 * len(STATE_KEYS) * engine.parameter_shape(parameter).numel()
        if size >= LOAD_CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Unpickler(pickle.Unpickler):
    """Knows the plain records of torch's checkpoint index and nothing else."""

    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = frozenset({("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
                        ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("builtins", "set"),
                        ("torch.storage", "TypedStorage")})

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module in self._MODULES or (module, name) in self._NAMES or is_dtype:
            return super().find_class(module, name)
        raise CheckpointError(f"the checkpoint's index names {module}.{name}, which no checkpoint of ours contains; "
                              "refusing to load it")


class _SafeFileSystemReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Reader:
    """Reads named tensors of one checkpoint; each rank on its own."""

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self.known = _SafeFileSystemReader(checkpoint / "weights").read_metadata().state_dict_metadata

    def read(self, want: dict[str, torch.Tensor]) -> None:
        """Fill the tensors in place.

        Raises:
            CheckpointError: a key is missing or has another shape: the checkpoint belongs to another model.
        """
        for key, tensor in want.items():
            if key not in self.known:
                raise CheckpointError(f"{self.checkpoint} has no {key}: it belongs to a model of another shape")
            size = tuple(self.known[key].size)
            if size != tuple(tensor.shape):
                raise CheckpointError(f"{self.checkpoint}: {key} has shape {size}, the model needs {tuple(tensor.shape)}")
        with warnings.catch_warnings():  # "assuming the intent is to load in a single process": it is
            warnings.filterwarnings("ignore", category=UserWarning)
            dcp.load(want, storage_reader=_SafeFileSystemReader(self.checkpoint / "weights"), no_dist=True)


# --- random states ---------------------------------------------------------------------------------------------------

def rng_state() -> dict[str, Any]:
    """Python's, numpy's and torch's generators of this process as plain data."""
    python = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    state = {"python": [python[0], list(python[1]), python[2]],
             "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
             "torch": _encode(torch.get_rng_state())}
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def restore_rng(checkpoint: Path, rank: int, world_size: int, saved_world_size: int) -> bool:
    """Continue this rank's random streams; False (streams stay as seeded) when the number of ranks changed."""
    path = checkpoint / f"rng-{rank:05d}.json"
    if world_size != saved_world_size or not path.is_file():
        return False
    state = json.loads(path.read_text())
    version_, internal, gauss = state["python"]
    random.setstate((version_, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_decode(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_decode(state["cuda"]))
    return True


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


# --- files -----------------------------------------------------------------------------------------------------------

def versions() -> dict[str, str]:
    return {"python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed", "megatron-core")}}


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_json(path: Path, data: Any) -> None:
    _write_text(path, json.dumps(data, indent=1))


def _write_text(path: Path, text: str) -> None:
    """Replace a file atomically and durably."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
