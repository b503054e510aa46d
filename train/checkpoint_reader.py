"""Tensors out of a checkpoint into an engine or a plain model, under any layout.

Nothing read is executed: tensors are loaded as tensors, and the one pickled index file through an unpickler that knows a
handful of records.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from model.experts import Experts
from model.transformer import Transformer
from train.checkpoint_folder import read_state
from train.engine import STATE_KEYS, Engine
from train.manifest import CheckpointError, require_owned

LOAD_CHUNK_BYTES = 2**29
OPTIONAL_BUFFER = ".snapshot_weight"


# --- keys ------------------------------------------------------------------------------------------------------------

def expert_ids_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter name -> global ids of the local experts stacked in it."""
    return {f"{name}.{key}": module.global_ids for name, module in model.named_modules() if isinstance(module, Experts)
            for key, _ in module.named_parameters(recurse=False)}


def _keys(name: str, expert_ids: dict[str, tuple[int, ...]]) -> list[str]:
    """Checkpoint names of a parameter: itself, or one per global expert it stacks."""
    return [f"{name}.{expert}" for expert in expert_ids[name]] if name in expert_ids else [name]


# --- into an engine, into a model ------------------------------------------------------------------------------------

def load_engine(engine: Engine, checkpoint: Path, step: int) -> None:
    """Restore master weights, optimiser moments and buffers under the engine's own layout.

    Raises:
        CheckpointError: the checkpoint cannot be read, is not ours, or belongs to another model.
    """
    expert_ids = expert_ids_of(engine.module)
    reader = _Reader(checkpoint)
    shapes = {name: tuple(engine.parameter_shape(parameter)) for name, parameter in engine.named_parameters()}
    reader.require_model(shapes, expert_ids)
    engine.prepare_scatter(step)
    for chunk in _chunks(list(engine.named_parameters()), engine):
        want: dict[str, torch.Tensor] = {}
        for name, _ in chunk:
            shape = _shape_of_one(shapes, name, expert_ids)
            want.update({f"{key}/{state}": torch.empty(shape) for key in _keys(name, expert_ids) for state in STATE_KEYS})
        reader.read(want)
        for name, parameter in chunk:
            for state in STATE_KEYS:
                engine.scatter_state(parameter, state, _assemble(want, name, expert_ids, state))
    engine.finish_scatter()
    _load_buffers(engine.module, reader)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Restore a plain model, outside any engine, from the fp32 master weights, at the step it was saved after: a layer
    that was still dense then is dense now.

    Raises:
        CheckpointError: the checkpoint cannot be read, is not ours, or belongs to another model.
    """
    expert_ids = expert_ids_of(model)
    reader = _Reader(checkpoint)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    reader.require_model(shapes, expert_ids)
    for name, parameter in model.named_parameters():
        shape = _shape_of_one(shapes, name, expert_ids)
        want = {f"{key}/fp32": torch.empty(shape) for key in _keys(name, expert_ids)}
        reader.read(want)
        with torch.no_grad():
            parameter.copy_(_assemble(want, name, expert_ids, "fp32"))
    _load_buffers(model, reader)
    if isinstance(model, Transformer):
        model.set_step(read_state(checkpoint)["step"])


def _shape_of_one(shapes: dict[str, tuple[int, ...]], name: str, expert_ids: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of a parameter in the checkpoint: of one expert where it stacks several."""
    return shapes[name][1:] if name in expert_ids else shapes[name]


def _assemble(values: dict[str, torch.Tensor], name: str, expert_ids: dict[str, tuple[int, ...]],
              state: str) -> torch.Tensor:
    parts = [values[f"{key}/{state}"] for key in _keys(name, expert_ids)]
    return torch.stack(parts) if name in expert_ids else parts[0]


def _load_buffers(model: nn.Module, reader: _Reader) -> None:
    """A snapshot of the router's weight is there only if F4 was on: without one it stays empty, for the next to fill."""
    buffers = {name: buffer for name, buffer in model.named_buffers()
               if not name.endswith(OPTIONAL_BUFFER) or f"buffer/{name}" in reader.shapes}
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


# --- reading without executing ---------------------------------------------------------------------------------------

class _Unpickler(pickle.Unpickler):
    """Knows the plain records of torch's checkpoint index and nothing else.

    By exact name: protocol 4 resolves dotted ones, so that "os.system" can be had from any module that imports os.
    """

    _KNOWN = frozenset({
        *(("torch.distributed.checkpoint.metadata", name) for name in (
            "Metadata", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
            "_MEM_FORMAT_ENCODING")),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"),
        ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")})

    @classmethod
    def records(cls) -> list[Any]:
        """The classes and functions themselves, those of this Python version."""
        modules = {module: sys.modules[module] for module, _ in cls._KNOWN if module in sys.modules}
        return [getattr(modules[module], name) for module, name in cls._KNOWN if hasattr(modules.get(module), name)]

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in self._KNOWN or is_dtype:
            return super().find_class(module, name)
        raise CheckpointError(f"the checkpoint's index names {f'{module}.{name}'[:80]!r}, which no checkpoint of ours "
                              "contains; refusing to load it")


@contextmanager
def _unchanged(records: list[Any]) -> Iterator[None]:
    """Undo what a pickle has done to the classes it names: its BUILD sets attributes of whatever it is handed.

    Raises:
        CheckpointError: something was changed.
    """
    before = [dict(vars(record)) for record in records]
    defaults = [getattr(record, "__defaults__", None) for record in records]
    try:
        yield
    finally:
        changed = []
        for record, was, default in zip(records, before, defaults, strict=True):
            now = dict(vars(record))
            for name in {*was, *now}:
                if name not in was:
                    delattr(record, name)
                elif now.get(name, record) is not was[name]:
                    setattr(record, name, was[name])
                else:
                    continue
                changed.append(f"{record.__name__}.{name}")
            if getattr(record, "__defaults__", None) is not default:
                record.__defaults__ = default
                changed.append(f"{record.__name__}.__defaults__")
        if changed:
            raise CheckpointError(f"the checkpoint's index changes {', '.join(sorted(changed))[:80]}, which no checkpoint "
                                  "of ours does; refusing to load it")


def _require_inside(metadata: Any) -> None:
    """An index may name files of its own folder only: those are what the manifest vouches for.

    Raises:
        CheckpointError: it names another.
    """
    for info in (getattr(metadata, "storage_data", None) or {}).values():
        name = getattr(info, "relative_path", None)
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise CheckpointError(f"the checkpoint's index points to {str(name)[:80]!r}, outside of its folder; refusing to "
                                  "load it")


class _SafeFileSystemReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file, _unchanged(_Unpickler.records()):
            metadata = _Unpickler(file).load()
        _require_inside(metadata)
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Reader:
    """Reads named tensors of one checkpoint; each rank on its own.

    Raises:
        CheckpointError: the folder is not ours, or its index cannot be read.
    """

    def __init__(self, checkpoint: Path):
        require_owned(checkpoint)
        self.checkpoint = checkpoint
        with self._explained():
            known = _SafeFileSystemReader(checkpoint / "weights").read_metadata().state_dict_metadata
            self.shapes: dict[str, tuple[int, ...]] = {key: tuple(known[key].size) for key in known}

    def require_model(self, shapes: dict[str, tuple[int, ...]], expert_ids: dict[str, tuple[int, ...]]) -> None:
        """Compare the whole model before anything is loaded. It may use another attention, of fewer parameters.

        Args:
            shapes: of all parameters of the model, local experts stacked; expert_ids: see expert_ids_of.

        Raises:
            CheckpointError: naming the first parameter that differs, with both shapes.
        """
        ours = {key: _shape_of_one(shapes, name, expert_ids) for name in shapes for key in _keys(name, expert_ids)}
        for key, shape in ours.items():
            theirs = self.shapes.get(f"{key}/fp32")
            if theirs != shape:
                raise self._of_another_model(key, theirs, shape)
        blocks = {name.partition(".attention.")[0] for name in shapes if ".attention." in name}
        for key in (key.removesuffix("/fp32") for key in self.shapes if key.endswith("/fp32")):
            block, is_attention, _ = key.partition(".attention.")
            stack, _, expert = key.rpartition(".")
            is_another_ranks_expert = stack in expert_ids and expert.isdigit()
            if key not in ours and not is_another_ranks_expert and not (is_attention and block in blocks):
                raise self._of_another_model(key, self.shapes[f"{key}/fp32"], None)

    def read(self, want: dict[str, torch.Tensor]) -> None:
        """Fill the tensors in place.

        Raises:
            CheckpointError: a key is missing or has another shape: the checkpoint belongs to another model; or it is
                damaged.
        """
        for key, tensor in want.items():
            if self.shapes.get(key) != tuple(tensor.shape):
                raise self._of_another_model(key, self.shapes.get(key), tuple(tensor.shape))
        with warnings.catch_warnings(), self._explained():
            # "assuming the intent is to load in a single process": it is
            warnings.filterwarnings("ignore", category=UserWarning)
            dcp.load(want, storage_reader=_SafeFileSystemReader(self.checkpoint / "weights"), no_dist=True)

    def _of_another_model(self, key: str, theirs: tuple[int, ...] | None, ours: tuple[int, ...] | None) -> CheckpointError:
        has = f"has no {key}" if theirs is None else f"has {key} of shape {theirs}"
        needs = "has no such parameter" if ours is None else f"needs shape {ours}"
        return CheckpointError(f"{self.checkpoint} belongs to another model: it {has}, this model {needs}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever torch or pickle meet in a damaged file becomes one line."""
        try:
            yield
        except CheckpointError:
            raise
        except CheckpointException as error:
            cause = next((cause for cause, _ in error.failures.values()), error)
            if isinstance(cause, CheckpointError):
                raise cause from error
            raise self._damaged(cause) from error
        except Exception as error:
            raise self._damaged(error) from error

    def _damaged(self, cause: BaseException) -> CheckpointError:
        lines = str(cause).strip().splitlines() or ["no message"]
        return CheckpointError(f"{self.checkpoint}/weights cannot be read ({type(cause).__name__}: {lines[0][:200]}); use "
                               "another checkpoint")
