"""Tensors out of a checkpoint into an engine or a plain model, under any layout.

Nothing read is executed: tensors are loaded as tensors, and the one pickled index file through an
unpickler that knows a handful of records.
"""

from __future__ import annotations

import logging
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from model.lora import adapter_names, is_adapter
from model.moe.experts import expert_ids_of
from model.parallel.family import own_part, whole_shape
from model.transformer import Transformer
from train.checkpoint.expert_stacks import EXPERT_IDS, StackLoadPlanner, Wanted, row_of_expert
from train.checkpoint.folder import read_state
from train.checkpoint.packs import members_of
from train.engine.average import AVERAGE
from train.engine.deepspeed import MUON_STATE_KEYS, STATE_KEYS, Engine
from train.engine.frozen import write_frozen
from train.files.manifest import CheckpointError, require_owned

log = logging.getLogger("loadstone")
LOAD_CHUNK_BYTES = 2**29
PACKS_HELD_BYTES = 2**28
OPTIONAL_BUFFERS = (".snapshot_weight", ".hash_table")
MOMENTS = (*STATE_KEYS[1:], *MUON_STATE_KEYS[1:])
"""States that an optimizer has made."""
LORA_ALPHA = "lora_alpha"
"""Key of state.json: adapters count alpha / rank times."""


# --- keys -----------------------------------------------------------------------------------------


def _keys(name: str, expert_ids: dict[str, tuple[int, ...]]) -> list[str]:
    """Checkpoint names of a parameter: itself, or one per global expert it stacks."""
    return [f"{name}.{expert}" for expert in expert_ids[name]] if name in expert_ids else [name]


# --- into an engine, into a model -----------------------------------------------------------------


def load_engine(engine: Engine, checkpoint: Path, step: int) -> None:
    """Restore master weights, optimiser moments and buffers under the engine's own layout.
    Collective.

    Raises:
        CheckpointError: the checkpoint cannot be read, is not ours, or belongs to another model.
    """
    fill_engine(engine, checkpoint, step)
    engine.finish_scatter()


def fill_engine(engine: Engine, checkpoint: Path, step: int, before: int = 0) -> None:
    """Do the part of load_engine before its ranks need each other. Nothing here is collective, and
    what is done can be done again from another checkpoint. `engine.finish_scatter` must follow.

    Args:
        step, before: updates, as Engine.prepare_scatter.

    Raises:
        CheckpointError: the checkpoint cannot be read, is not ours, or belongs to another model.
    """
    expert_ids = expert_ids_of(engine.module)
    reader = CheckpointReader(checkpoint)
    shapes = {
        name: tuple(engine.parameter_shape(parameter))
        for name, parameter in engine.named_parameters()
    }

    # The whole model is compared before any weight is touched: a refusal leaves the engine as it
    # was.
    reader.require_model(*_whole(engine.module, shapes, expert_ids))

    engine.prepare_scatter(step, before)
    begun = 0
    for chunk, states in _read_states(engine, reader, expert_ids):
        for name, parameter in chunk:
            for state in engine.state_keys(parameter):
                # A run that kept no average so far begins it with its weights.
                held = state if f"{name}/{state}" in states else "fp32"
                begun += held != state
                engine.scatter_state(parameter, state, states[f"{name}/{held}"])
    if begun:
        log.info("%s has no moving average of the weights: it begins with them", checkpoint)

    _load_buffers(engine.module, reader)


def _read_states(
    engine: Engine, reader: CheckpointReader, expert_ids: dict[str, tuple[int, ...]]
) -> Iterator[tuple[list[tuple[str, nn.Parameter]], dict[str, torch.Tensor]]]:
    """Some parameters at a time, with "<parameter>/<state>" of every state that the engine keeps of
    them and, of averages, the checkpoint has. In pieces, since a whole model's masters and moments
    need not fit the host twice.
    """
    for chunk in _chunks(list(engine.named_parameters()), engine):
        want = {
            f"{name}/{state}": torch.empty(tuple(engine.parameter_shape(parameter)))
            for name, parameter in chunk
            for state in engine.state_keys(parameter)
            if state != AVERAGE or reader.has_state(name, AVERAGE, expert_ids)
        }
        reader.read_parameters(want, expert_ids)
        yield chunk, want


def _whole(
    model: nn.Module, shapes: dict[str, tuple[int, ...]], expert_ids: dict[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes and expert ids of the whole model, of which this may be one stage: what a checkpoint
    has of the others is not another model's.
    """
    if not isinstance(model, Transformer) or model.part.is_whole:
        return shapes, expert_ids
    whole = model.whole()
    every = {name: tuple(whole_shape(p)) for name, p in whole.named_parameters()}
    return every | shapes, expert_ids_of(whole) | expert_ids


def load_weights(model: nn.Module, source: Path | CheckpointReader) -> None:
    """Restore a plain model, outside any engine, from the fp32 master weights, adapters added, at
    the step it was saved after: a layer that was still dense then is dense now.

    Args:
        source: a checkpoint, or a reader of one that reads its weights otherwise
            (train/trained/averages.py).

    Raises:
        CheckpointError: the checkpoint cannot be read, is not ours, or belongs to another model.
    """
    reader = load_parameters(model, source)
    _load_buffers(model, reader)
    if isinstance(model, Transformer):
        model.set_step(read_state(reader.checkpoint)["step"])


def without_index(names: Iterable[str], reader: CheckpointReader) -> frozenset[str]:
    """Those of a model's parameters that an index of attention has and the checkpoint does not:
    weights of a dense model, whose index starts anew. One of another shape is another model's.
    """
    return frozenset(
        name
        for name in names
        if ".attention.indexer." in name and f"{name}/fp32" not in reader.stored
    )


def load_parameters(
    model: nn.Module, source: Path | CheckpointReader, converts: bool = False
) -> CheckpointReader:
    """Restore the parameters alone of a plain model, but for adapters, which start anew; returns
    the reader, for what else there is. source: as load_weights; converts: so does an index that the
    checkpoint does not have.

    Raises:
        CheckpointError: as load_weights.
    """
    expert_ids = expert_ids_of(model)
    reader = MergedReader(source) if isinstance(source, Path) else source
    parameters = [(name, p) for name, p in model.named_parameters() if not is_adapter(name)]
    shapes = {name: tuple(whole_shape(parameter)) for name, parameter in parameters}
    every, whole_ids = _whole(model, shapes, expert_ids)
    anew = without_index(every, reader) if converts else frozenset()
    reader.require_model({n: s for n, s in every.items() if n not in anew}, whole_ids)
    parameters = [(name, p) for name, p in parameters if name not in anew]
    for name, parameter in parameters:
        want = torch.empty(shapes[name])
        reader.read_parameters({f"{name}/fp32": want}, expert_ids)
        write_frozen(parameter, own_part(parameter, want))
    return reader


def load_router_buffers(model: nn.Module, checkpoint: Path) -> None:
    """Restore the buffers of a plain model: what routers hold beside their weights.

    Raises:
        CheckpointError: as load_weights.
    """
    _load_buffers(model, CheckpointReader(checkpoint))


def load_tables(model: nn.Module, checkpoint: Path) -> None:
    """Likewise the tables alone by which layers route whose weights were learned under them."""
    _load_buffers(model, CheckpointReader(checkpoint), OPTIONAL_BUFFERS[1])


def fill_masters(engine: Engine, checkpoint: Path) -> None:
    """Set the master weights of an engine that has taken no step, and leave all else, adapters and
    an index that the checkpoint does not have, too. Collective.

    Raises:
        CheckpointError: as load_engine.
    """
    expert_ids = expert_ids_of(engine.module)
    reader = MergedReader(checkpoint)
    anew = without_index((name for name, _ in engine.named_parameters()), reader)
    engine.prepare_scatter(0)
    for name, parameter in engine.named_parameters():
        if is_adapter(name) or name in anew:
            continue
        want = torch.empty(engine.parameter_shape(parameter))
        reader.read_parameters({f"{name}/fp32": want}, expert_ids)
        engine.scatter_state(parameter, "fp32", want)
    engine.finish_scatter()


def fill_moments(engine: Engine, checkpoint: Path, updates: int) -> None:
    """Set the master weights and the optimiser's moments of an engine that has taken no step
    (init.moments), and leave buffers and moving averages. Collective.

    Args:
        updates: that the checkpoint's moments have behind them.

    Raises:
        CheckpointError: on every rank, naming parameters that only one of the two has moments of.
    """
    expert_ids = expert_ids_of(engine.module)
    reader = CheckpointReader(checkpoint)

    # A stage of a pipeline sees its own parameters alone: what one has found, all say.
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _without_moments(engine, reader, expert_ids))
    if problem := next((problem for problem in found if problem is not None), None):
        raise CheckpointError(f"init.moments: {checkpoint} {problem}; drop init.moments")

    engine.prepare_scatter(0, updates)
    for chunk, states in _read_states(engine, reader, expert_ids):
        for name, parameter in chunk:
            for state in engine.state_keys(parameter):
                if state != AVERAGE:
                    engine.scatter_state(parameter, state, states[f"{name}/{state}"])
    engine.finish_scatter()


def _without_moments(
    engine: Engine, reader: CheckpointReader, expert_ids: dict[str, tuple[int, ...]]
) -> str | None:
    """Why the optimiser of a checkpoint cannot go on in an engine; None: it can."""
    if not any(key.endswith(f"/{state}") for key in reader.stored for state in MOMENTS):
        return "holds no moments of an optimiser"

    new: list[str] = []
    moved: list[str] = []
    still: list[str] = []
    for name, parameter in engine.named_parameters():
        if not reader.has_state(name, "fp32", expert_ids):
            new.append(name)
        elif any(
            state != AVERAGE and not reader.has_state(name, state, expert_ids)
            for state in engine.state_keys(parameter)
        ):
            has_others = any(reader.has_state(name, state, expert_ids) for state in MOMENTS)
            (moved if has_others else still).append(name)

    shapes = {n: tuple(engine.parameter_shape(p)) for n, p in engine.named_parameters()}
    every, ids = _whole(engine.module, shapes, expert_ids)
    gone = [name for name in reader.names(ids) if name not in every]
    for names, what in (
        (new, "has no"),
        (gone, "has parameters that this run does not have:"),
        (moved, "has moments of another optimizer for"),
        (still, "has no moments, since they were frozen there, of"),
    ):
        if names:
            return f"{what} {_listed(names)}"
    return None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _shape_of_one(
    shapes: dict[str, tuple[int, ...]], name: str, expert_ids: dict[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """Shape of a parameter in the checkpoint: of one expert where it stacks several."""
    return shapes[name][1:] if name in expert_ids else shapes[name]


def _load_buffers(model: nn.Module, reader: CheckpointReader, ending: str = "") -> None:
    """Fill the model's buffers. A snapshot of the router's weight is there only if spikes were
    watched for; without one the buffer stays empty, for the next snapshot to fill. Tables of layers
    that route by token id stay as they were drawn where the weights are of a run without them.
    """
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith(ending)
        if not name.endswith(OPTIONAL_BUFFERS) or f"buffer/{name}" in reader.stored
    }
    want = {f"buffer/{name}": torch.empty(b.shape, dtype=b.dtype) for name, b in buffers.items()}
    reader.read(want)
    for name, buffer in buffers.items():
        buffer.copy_(want[f"buffer/{name}"])


def _chunks(
    parameters: list[tuple[str, nn.Parameter]], engine: Engine
) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Parameters in groups whose state stays under LOAD_CHUNK_BYTES on the host."""
    chunk: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in parameters:
        chunk.append((name, parameter))
        size += (
            4
            * (len(STATE_KEYS) + (engine.average is not None))
            * engine.parameter_shape(parameter).numel()
        )
        if size >= LOAD_CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


# --- reading without executing --------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    """Knows the plain records of torch's checkpoint index and nothing else.

    By exact name: protocol 4 resolves dotted ones, so that "os.system" can be had from any module
    that imports os.
    """

    _KNOWN = frozenset(
        {
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "Metadata",
                    "StorageMeta",
                    "TensorStorageMetadata",
                    "TensorProperties",
                    "ChunkStorageMetadata",
                    "MetadataIndex",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
        }
    )

    @classmethod
    def records(cls) -> list[Any]:
        """The classes and functions themselves, those of this Python version."""
        modules = {module: sys.modules[module] for module, _ in cls._KNOWN if module in sys.modules}
        return [
            getattr(modules[module], name)
            for module, name in cls._KNOWN
            if hasattr(modules.get(module), name)
        ]

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in self._KNOWN or is_dtype:
            return super().find_class(module, name)
        raise CheckpointError(
            f"the checkpoint's index names {f'{module}.{name}'[:80]!r}, which no checkpoint of "
            "ours contains; refusing to load it"
        )


@contextmanager
def _unchanged(records: list[Any]) -> Iterator[None]:
    """Undo what a pickle has done to the classes it names: its BUILD sets attributes of whatever it
    is handed.

    Raises:
        CheckpointError: something was changed.
    """
    before = [dict(vars(record)) for record in records]
    defaults = [getattr(record, "__defaults__", None) for record in records]

    try:
        yield
    finally:
        # Even a pickle that then fails may have changed a class first: looked at in any case.
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
            raise CheckpointError(
                f"the checkpoint's index changes {', '.join(sorted(changed))[:80]}, which no "
                "checkpoint of ours does; refusing to load it"
            )


def _require_inside(metadata: Any) -> None:
    """An index may name files of its own folder only: those are what the manifest vouches for.

    Raises:
        CheckpointError: it names another.
    """
    for info in (getattr(metadata, "storage_data", None) or {}).values():
        name = getattr(info, "relative_path", None)
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise CheckpointError(
                f"the checkpoint's index points to {str(name)[:80]!r}, "
                "outside of its folder; refusing to load it"
            )


class _SafeFileSystemReader(FileSystemReader):
    """Reads the index once, however many loads it serves."""

    _known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._known is not None:
            return self._known
        with open(Path(self.path) / ".metadata", "rb") as file, _unchanged(_Unpickler.records()):
            metadata: Metadata = _Unpickler(file).load()
        _require_inside(metadata)
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        cast(StorageMeta, metadata.storage_meta).load_id = self.load_id
        self._known = metadata
        return metadata


class CheckpointReader:
    """A reader of named tensors of one checkpoint. Each rank has its own.

    Experts are asked for by global id ("<parameter>.<global expert>/<state>"), whether they are
    stored one by one, as before the stacks, or stacked.

    So are small tensors, whether they have an entry each or lie in packs.

    Attributes:
        stored: shape of every tensor as it is stored, those in packs by their own names.
        num_entries: of the index.

    Raises:
        CheckpointError: the folder is not ours, or its index cannot be read.
    """

    def __init__(self, checkpoint: Path):
        require_owned(checkpoint)
        self.checkpoint = checkpoint
        self._storage = _SafeFileSystemReader(checkpoint / "weights")
        with self._explained():
            metadata = self._storage.read_metadata()
            self._entries = {
                key: cast(TensorStorageMetadata, entry)
                for key, entry in metadata.state_dict_metadata.items()
            }
            self.num_entries = len(self._entries)
            self._members = members_of(metadata)
            self._packs: dict[str, torch.Tensor] = {}
            packed = {member.pack for member in self._members.values()}
            self.stored: dict[str, tuple[int, ...]] = {
                **{key: tuple(e.size) for key, e in self._entries.items() if key not in packed},
                **{key: member.shape for key, member in self._members.items()},
            }
            self._rows = self._read_rows()

    def _read_rows(self) -> dict[str, torch.Tensor]:
        """Stacked parameter -> the row of each expert [num_experts] int64."""
        suffix = f"/{EXPERT_IDS}"
        ids = {
            key.removesuffix(suffix): torch.empty(shape, dtype=torch.int64)
            for key, shape in self.stored.items()
            if key.endswith(suffix)
        }
        if ids:
            everything = {name: torch.arange(shape.numel()) for name, shape in ids.items()}
            self._load({}, {f"{name}{suffix}": [(everything[name], ids[name])] for name in ids})
        return {name: row_of_expert(experts) for name, experts in ids.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of everything that can be asked for, expert by expert."""
        found: dict[str, tuple[int, ...]] = {}
        for key, shape in self._shown().items():
            name, _, state = key.rpartition("/")
            if name not in self._rows:
                found[key] = shape
            elif state != EXPERT_IDS:
                found.update(
                    {
                        f"{name}.{expert}/{state}": shape[1:]
                        for expert in range(len(self._rows[name]))
                    }
                )
        return found

    def _shown(self) -> dict[str, tuple[int, ...]]:
        """What of `stored` belongs to the model that is read."""
        return self.stored

    def require_model(
        self, shapes: dict[str, tuple[int, ...]], expert_ids: dict[str, tuple[int, ...]]
    ) -> None:
        """Compare the whole model before anything is loaded. It may use another attention, of fewer
        parameters.

        Args:
            shapes: of all parameters of the model, local experts stacked; expert_ids: see
                expert_ids_of.

        Raises:
            CheckpointError: naming the first parameter that differs, with both shapes.
        """
        ours: dict[str, tuple[int, ...]] = {}
        for name in shapes:
            # all rows are alike, so that two stand for all
            stacked = name in expert_ids and name in self._rows
            keys = (
                [f"{name}.{expert}" for expert in (min(expert_ids[name]), max(expert_ids[name]))]
                if stacked
                else _keys(name, expert_ids)
            )
            ours.update(dict.fromkeys(keys, _shape_of_one(shapes, name, expert_ids)))

        for key, shape in ours.items():
            theirs = self._shape(f"{key}/fp32")
            if theirs != shape:
                raise self._of_another_model(key, theirs, shape)

        # What the checkpoint has beyond the model may be another rank's expert or an attention's
        # own parameters; anything else is part of another model.
        blocks = {name.partition(".attention.")[0] for name in shapes if ".attention." in name}
        for key in (key.removesuffix("/fp32") for key in self._shown() if key.endswith("/fp32")):
            block, is_attention, _ = key.partition(".attention.")
            stack, _, expert = key.rpartition(".")
            is_known = key in expert_ids if key in self._rows else key in ours
            is_another_ranks_expert = stack in expert_ids and expert.isdigit()
            if (
                not is_known
                and not is_another_ranks_expert
                and not (is_attention and block in blocks)
            ):
                first = f"{key}.0" if key in self._rows else key
                raise self._of_another_model(first, self._shape(f"{first}/fp32"), None)

    def read(self, want: dict[str, torch.Tensor]) -> None:
        """Fill the tensors in place.

        Raises:
            CheckpointError: a key is missing or has another shape: the checkpoint belongs to
                another model; or it is damaged.
        """
        plain: dict[str, torch.Tensor] = {}
        stacks: dict[str, Wanted] = {}
        for key, tensor in want.items():
            if self._shape(key) != tuple(tensor.shape):
                raise self._of_another_model(key, self._shape(key), tuple(tensor.shape))
            place = self._place(key)
            if place is None:
                plain[key] = tensor
            else:
                stacks.setdefault(place[0], []).append(
                    (torch.tensor([place[1]]), tensor.unsqueeze(0))
                )
        self._fill(plain, stacks)

    def read_parameters(
        self, want: dict[str, torch.Tensor], expert_ids: dict[str, tuple[int, ...]]
    ) -> None:
        """Fill "<parameter>/<state>" in place, the local experts stacked [L, ...] as `expert_ids`
        names them.

        Raises:
            CheckpointError: as `read`.
        """
        plain: dict[str, torch.Tensor] = {}
        stacks: dict[str, Wanted] = {}
        for key, tensor in want.items():
            # Checkpoints of earlier versions hold every expert under a key of its own.
            name, _, state = key.rpartition("/")
            if name in expert_ids and name in self._rows:
                first = f"{name}.{expert_ids[name][0]}/{state}"
                if self._shape(first) != tuple(tensor.shape[1:]):
                    raise self._of_another_model(first, self._shape(first), tuple(tensor.shape[1:]))
                stacks[key] = [(self._rows[name][list(expert_ids[name])], tensor)]
            elif name in expert_ids:
                plain.update(
                    {
                        f"{name}.{expert}/{state}": tensor[i]
                        for i, expert in enumerate(expert_ids[name])
                    }
                )
            else:
                plain[key] = tensor

        for key, tensor in plain.items():
            if self.stored.get(key) != tuple(tensor.shape):
                raise self._of_another_model(key, self.stored.get(key), tuple(tensor.shape))
        self._fill(plain, stacks)

    def has_state(self, name: str, state: str, expert_ids: dict[str, tuple[int, ...]]) -> bool:
        """Whether a parameter was saved with this state: a moment of an optimizer, or a moving
        average (train/engine/average.py).
        """
        return self._shape(f"{_keys(name, expert_ids)[0]}/{state}") is not None

    def names(self, expert_ids: dict[str, tuple[int, ...]]) -> list[str]:
        """Every parameter that was saved, a stack of experts by its own name, whether they were
        saved in it or one by one.

        Args:
            expert_ids: of stacks that there may be.
        """
        found: dict[str, None] = {}
        for key in self._shown():
            name, _, state = key.rpartition("/")
            stack, _, expert = name.rpartition(".")
            if state == "fp32":
                found[stack if stack in expert_ids and expert.isdigit() else name] = None
        return list(found)

    def _place(self, key: str) -> tuple[str, int] | None:
        """Stack and row of an expert's key. None where it is stored under its own key, or not at
        all.
        """
        parameter, _, state = key.rpartition("/")
        name, _, expert = parameter.rpartition(".")
        rows = self._rows.get(name)
        if (
            rows is None
            or not expert.isdecimal()
            or int(expert) >= len(rows)
            or f"{name}/{state}" not in self.stored
        ):
            return None
        return f"{name}/{state}", int(rows[int(expert)])

    def _shape(self, key: str) -> tuple[int, ...] | None:
        """Shape of what can be asked for by this key, or None where there is no such thing."""
        place = self._place(key)
        return self.stored.get(key) if place is None else self.stored[place[0]][1:]

    def _fill(self, plain: dict[str, torch.Tensor], stacks: dict[str, Wanted]) -> None:
        with self._explained():
            self._load(plain, stacks)

    def _load(self, plain: dict[str, torch.Tensor], stacks: dict[str, Wanted]) -> None:
        packed: dict[str, list[str]] = {}
        for key in plain:
            if key in self._members:
                packed.setdefault(self._members[key].pack, []).append(key)
        for name, keys in packed.items():
            flat = self._pack(name)
            for key in keys:
                plain[key].copy_(self._members[key].of(flat))
        self._load_entries(
            {key: tensor for key, tensor in plain.items() if key not in self._members}, stacks
        )

    def _pack(self, name: str) -> torch.Tensor:
        """A pack [numel]. The last ones stay, up to PACKS_HELD_BYTES, as its tensors are asked for
        one after another.
        """
        flat = self._packs.pop(name, None)
        if flat is None:
            entry = self._entries[name]
            flat = torch.empty(entry.size, dtype=entry.properties.dtype)
            self._load_entries({name: flat}, {})
        self._packs[name] = flat
        while sum(held.nbytes for held in self._packs.values()) > max(
            PACKS_HELD_BYTES, flat.nbytes
        ):
            del self._packs[next(iter(self._packs))]
        return flat

    def _load_entries(self, plain: dict[str, torch.Tensor], stacks: dict[str, Wanted]) -> None:
        with warnings.catch_warnings():
            # "assuming the intent is to load in a single process": it is
            warnings.filterwarnings("ignore", category=UserWarning)
            if plain:
                dcp.load(plain, storage_reader=self._storage, no_dist=True)
            if stacks:
                dcp.load(
                    {}, storage_reader=self._storage, planner=StackLoadPlanner(stacks), no_dist=True
                )

    def _of_another_model(
        self, key: str, theirs: tuple[int, ...] | None, ours: tuple[int, ...] | None
    ) -> CheckpointError:
        has = f"has no {key}" if theirs is None else f"has {key} of shape {theirs}"
        needs = "has no such parameter" if ours is None else f"needs shape {ours}"
        return CheckpointError(
            f"{self.checkpoint} belongs to another model: it {has}, this model {needs}"
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Tell in one line whatever torch or pickle meet in a damaged file."""
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
        return CheckpointError(
            f"{self.checkpoint}/weights cannot be read ({type(cause).__name__}: "
            f"{lines[0][:200]}); use another checkpoint"
        )


class MergedReader(CheckpointReader):
    """Reads the weights of a run that trains adapters as those of a plain model: each with its
    adapter added, in fp32. A checkpoint without adapters is read as it is.
    """

    def __init__(self, checkpoint: Path):
        super().__init__(checkpoint)
        self._alpha = 0.0
        if self.has_adapters:
            self._alpha = float(read_state(checkpoint)[LORA_ALPHA])

    @property
    def has_adapters(self) -> bool:
        return any(map(self._is_of_adapter, self.stored))

    @staticmethod
    def _is_of_adapter(key: str) -> bool:
        return is_adapter(key.rpartition("/")[0])

    def _shown(self) -> dict[str, tuple[int, ...]]:
        return {key: shape for key, shape in self.stored.items() if not self._is_of_adapter(key)}

    def read(self, want: dict[str, torch.Tensor]) -> None:
        super().read(want)
        for key, tensor in want.items():
            self._add(key, tensor, super().read)

    def read_parameters(
        self, want: dict[str, torch.Tensor], expert_ids: dict[str, tuple[int, ...]]
    ) -> None:
        super().read_parameters(want, expert_ids)
        for key, tensor in want.items():
            name = key.rpartition("/")[0]
            ids = dict.fromkeys(adapter_names(name), expert_ids[name]) if name in expert_ids else {}
            self._add(key, tensor, partial(super().read_parameters, expert_ids=ids))

    def _add(
        self,
        key: str,
        weight: torch.Tensor,
        read: Callable[[dict[str, torch.Tensor]], None],
    ) -> None:
        """Add the adapter of a weight [out, in], or of experts' [L, out, in], if it has one. read:
        fills A and B.
        """
        name, _, state = key.rpartition("/")
        first, second = (f"{adapter}/{state}" for adapter in adapter_names(name))
        shape = self._shape(first) if state == "fp32" else None
        if shape is None:
            return
        rank = shape[-2]
        lead = weight.shape[:-2]
        a = torch.empty(*lead, rank, weight.shape[-1])
        b = torch.empty(*lead, weight.shape[-2], rank)
        read({first: a, second: b})
        weight += (self._alpha / rank) * (b @ a)
