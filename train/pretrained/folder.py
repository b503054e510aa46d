"""A folder of published weights, by the names of our parameters: into a plain model, or into an
engine under any layout.

Each rank reads the dense parameters and its own experts, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from model.families.names import BIAS, TABLE, further_parts, on_disk
from model.lora import is_adapter
from model.moe.experts import expert_ids_of
from model.parallel.family import own_part, whole_shape
from model.routers.hashed import table_problems
from train.engine.deepspeed import Engine
from train.engine.frozen import write_frozen
from train.pretrained.described import describe
from train.pretrained.shards import PretrainedError

ExpertIds = Mapping[str, tuple[int, ...]]


class PretrainedFolder:
    """Weights by the names of our parameters.

    Attributes:
        reading: the shape of the model, in our words.

    Raises:
        PretrainedError: as `describe`; only headers have been read then.
    """

    def __init__(self, folder: Path):
        described = describe(folder)
        self.folder, self.reading = folder, described.reading
        self._parts, self._shards = dict(described.parts), described.shards
        self._further: set[str] = set()

    @property
    def bytes_read(self) -> int:
        return self._shards.bytes_read

    @property
    def num_bytes(self) -> int:
        """Of all tensors of the folder."""
        return self._shards.num_bytes

    def __str__(self) -> str:
        return f"{self.folder} ({self.reading.family.model_type})"

    def fill_model(self, model: nn.Module) -> None:
        """Set the parameters of a plain model, and the routers' selection bias where the family has
        one. Beside the model, one tensor of the files is in memory.
        """
        expert_ids = expert_ids_of(model)
        shapes = {name: tuple(whole_shape(p)) for name, p in model.named_parameters()}
        self._add_further(shapes)
        self._require_model(shapes, expert_ids)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if self._is_new(name):
                    continue
                if parameter.shape == shapes[name]:
                    self._fill_parameter(name, parameter, expert_ids)
                    continue
                # Cut, or shared out already.
                whole = parameter.new_empty(shapes[name])
                self._fill_parameter(name, whole, expert_ids)
                write_frozen(parameter, own_part(parameter, whole))
                del whole
        self._require_tied(model)
        self._fill_buffers(model)

    def fill_masters(self, engine: Engine) -> None:
        """Set the fp32 master weights of what the files hold in more digits than bf16 has: an
        engine that computes in bf16 has rounded them. Collective.
        """
        expert_ids = expert_ids_of(engine.module)
        finer = {
            name
            for name, _ in engine.named_parameters()
            if not self._is_new(name) and not self._is_bf16(name, expert_ids)
        }
        if not finer:
            return
        engine.prepare_scatter(0)
        for name, parameter in engine.named_parameters():
            if name in finer:
                value = torch.empty(engine.parameter_shape(parameter))
                self._fill_parameter(name, value, expert_ids)
                engine.scatter_state(parameter, "fp32", value)
        engine.finish_scatter()

    def _is_bf16(self, name: str, expert_ids: ExpertIds) -> bool:
        """Whether bf16 has every digit of a parameter in the files. Looked at by its first expert:
        all ranks must answer alike.
        """
        key = f"{name}.0" if name in expert_ids else name
        return all(self._shards.dtypes[part.name] == "BF16" for part in self._parts[key])

    def _require_model(self, shapes: Mapping[str, tuple[int, ...]], expert_ids: ExpertIds) -> None:
        for name, shape in shapes.items():
            if self._is_new(name):
                continue
            keys = [f"{name}.{e}" for e in expert_ids[name]] if name in expert_ids else [name]
            theirs = [self._shape(key) for key in keys]
            ours = shape[1:] if name in expert_ids else shape
            if any(their != ours for their in theirs):
                raise PretrainedError(
                    f"{self.folder} is another model: it has {keys[0]} of shape {theirs[0]}, this "
                    f"run needs {list(ours)}"
                )

    def _is_new(self, name: str) -> bool:
        """What only another attention has (gates and sinks of sparse attention), adapters, and
        layers that predict further tokens where the folder has none, start as in a new run; all
        else is that of config.json.
        """
        if is_adapter(name):
            return True
        if name.startswith("mtp."):
            return ".".join(name.split(".")[:2]) not in self._further
        return ".attention." in name and name not in self._parts

    def _add_further(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Parts of those modules of multi-token prediction that the model has and the folder, too.

        Raises:
            PretrainedError: a module of the folder lacks a tensor, or has it in another shape.
        """
        for module in sorted(
            {".".join(name.split(".")[:2]) for name in shapes if name[:4] == "mtp."}
        ):
            parts = further_parts(self.reading, int(module.split(".")[1]))
            there = self._shards.shapes
            first = parts[f"{module}.embedding_norm.weight"][0].name
            if first not in there:
                continue
            for name, shape in on_disk(parts).items():
                if there.get(name) != shape:
                    raise PretrainedError(
                        f"{self.folder}: {name} has shape {there.get(name)}, where config.json "
                        f"means {shape}; set model.num_mtp_layers=0 to begin without it"
                    )
            self._further.add(module)
            self._parts |= parts

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a parameter that is no stack; None: the folder has none."""
        return self._shape(name)

    def read(self, name: str) -> torch.Tensor:
        """A parameter that is no stack, in the dtype of its first part."""
        shape, first = self._shape(name), self._parts[name][0]
        assert shape is not None, name
        value = torch.empty(shape, dtype=self._shards.tensor(first.name, first.index).dtype)
        self._fill(name, value)
        return value

    def _shape(self, key: str) -> tuple[int, ...] | None:
        if key not in self._parts:
            return None
        first = self._parts[key][0].shape
        return (sum(part.shape[0] for part in self._parts[key]), *first[1:])

    def _fill_parameter(self, name: str, value: torch.Tensor, expert_ids: ExpertIds) -> None:
        """Fill a parameter in place, experts stacked [L, ...]."""
        if name in expert_ids:
            for row, expert in enumerate(expert_ids[name]):
                self._fill(f"{name}.{expert}", value[row])
        else:
            self._fill(name, value)

    def _fill(self, key: str, value: torch.Tensor) -> None:
        row = 0
        for part in self._parts[key]:
            stored = self._shards.tensor(part.name, part.index)
            if part.is_transposed:
                stored = stored.T
            if part.order is not None:
                stored = stored[list(part.order)]
            if part.columns is not None:
                stored = stored.flatten()
            value[row : row + part.shape[0]].copy_(stored)
            row += part.shape[0]

    def _require_tied(self, model: nn.Module) -> None:
        """A head in the files of a model whose head is its embedding must be equal to it: in some
        fine-tuned models it is not.
        """
        if not self.reading.model["tie_embeddings"] or "lm_head.weight" not in self._shards.shapes:
            return
        embedding = self.read("embedding.weight")
        if not torch.equal(self._shards.tensor("lm_head.weight").to(embedding.dtype), embedding):
            raise PretrainedError(
                f"{self.folder}: config.json says tie_word_embeddings, but lm_head.weight differs "
                "from model.embed_tokens.weight; set tie_word_embeddings to false in it if the "
                "head was trained"
            )

    def _fill_buffers(self, model: nn.Module) -> None:
        """The selection bias stays fp32 whatever the weights are stored in: near 7, as in published
        models, bf16 would leave a handful of values. Tables of token ids are whole numbers.

        Raises:
            PretrainedError: a table names an expert that there is not, or one twice.
        """
        for name, buffer in model.named_buffers():
            ends = (f".router.{BIAS}", f".router.{TABLE}")
            if not name.endswith(ends) or f"buffer/{name}" not in self._parts:
                continue
            (part,) = self._parts[f"buffer/{name}"]
            value = self._shards.tensor(part.name)
            if name.endswith(TABLE):
                for problem in table_problems(value, self.reading.model["num_experts"]):
                    raise PretrainedError(f"{self.folder}: {part.name} {problem}")
            buffer.copy_(value.to(buffer.dtype))
