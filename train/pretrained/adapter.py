"""The adapters of a run as a folder that peft loads onto the published weights that the run began
with.

peft names a projection by the module of transformers, and has an A and a B for each. Experts are
stacked there: A is [E * r, in] with row e * r + i, and B is [out, r * E] with column i * E + e. Of
a module's two stacks gate_up is wrapped first, so its tensors are those of `base_layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.families.names import Part, parts_of
from model.families.reading import Reading
from train.checkpoint.reader import CheckpointReader
from train.config.lora import ranks_of
from train.config.run import RunConfig
from train.files.durable import new_folder, write_text
from train.files.strict_json import dumps
from train.pretrained.export import DTYPES, Tokenizer, write_tokenizer
from train.pretrained.shards import PretrainedError, write_shards

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ROOT = "base_model.model."
"""What peft puts before every name."""


@dataclass(frozen=True)
class Wrapped:
    """A module or parameter of transformers that gets an adapter."""

    target: str
    """As target_modules or target_parameters name it."""
    is_parameter: bool
    rank: int


@dataclass(frozen=True)
class AdapterPlan:
    """What is to be written, decided before a byte is."""

    config: dict[str, Any]
    """adapter_config.json."""
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[CheckpointReader, str], torch.Tensor]
    """The tensor of a name out of a checkpoint."""


def plan_adapter(run: RunConfig, reading: Reading) -> AdapterPlan:
    """Whether and as what a run's adapters can be written.

    Args:
        run: with its lora settings; reading: of the family that the run is exported as.

    Raises:
        PretrainedError: there are none, or the weights below them are not published ones.
    """
    lora = run.lora
    if not lora.rank:
        raise PretrainedError(
            "adapter=true: the run trains no adapters (lora.rank is 0); leave it out, and the "
            "whole model is written"
        )
    if lora.also_train:
        raise PretrainedError(
            f"adapter=true: lora.also_train {list(lora.also_train)} trained weights themselves, "
            "which no adapter holds; leave it out, and the adapters are added to the weights"
        )
    if run.init.upcycle.num_experts:
        raise PretrainedError(
            "adapter=true: the run's experts were made of a dense model's MLPs, which is no folder "
            "that peft could load; leave it out, and the adapters are added to the weights"
        )
    parts = parts_of(reading)
    tensors: dict[str, Callable[[CheckpointReader], torch.Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    wrapped: list[Wrapped] = []
    ranks = ranks_of(lora, run.model, run.attention.arguments)
    for name, (projection, rank) in ranks.items():
        if projection.num_experts:
            module, stack = _stack_there(name, parts[f"{name}.0"][0], reading)
            own = (
                ""
                if stack != "gate_up_proj" or name.replace("gate_up", "down") not in ranks
                else ("base_layer.")
            )
            a, b = f"{ROOT}{module}.{own}lora_A.weight", f"{ROOT}{module}.{own}lora_B.weight"
            number = projection.num_experts
            shapes |= {
                a: (number * rank, projection.inputs),
                b: (projection.outputs, rank * number),
            }
            order = parts[f"{name}.0"][0].order
            tensors |= _of_stack(name, number, order, a, b)
            wrapped.append(Wrapped(f"{module}.{stack}", True, rank))
            continue
        row = 0
        for part in parts[f"{name}.weight"]:
            module = part.name.removesuffix(".weight")
            a, b = f"{ROOT}{module}.lora_A.weight", f"{ROOT}{module}.lora_B.weight"
            shapes |= {a: (rank, projection.inputs), b: (part.shape[0], rank)}
            tensors |= _of_layer(name, part, row, a, b)
            row += part.shape[0]
            # Of a mixture's dense and shared MLPs peft would take module names for those of the
            # single experts that transformers 4 had.
            if reading.family.is_moe and ".mlp" in name:
                wrapped.append(Wrapped(f"{module}.weight", True, rank))
            else:
                wrapped.append(Wrapped(module, False, rank))

    config = _config(run, wrapped)
    return AdapterPlan(config, shapes, lambda reader, name: tensors[name](reader))


def _stack_there(name: str, part: Part, reading: Reading) -> tuple[str, str]:
    """Module and parameter of transformers that hold a stack of experts: in memory most families
    stack what their files have one by one.
    """
    family = reading.family
    layer = part.name.split(".mlp.")[0].split(f".{family.mlp}.")[0]
    mlp = family.mlp if family.stacked is not None else "mlp"
    return f"{layer}.{mlp}.experts", f"{name.rpartition('.')[2]}_proj"


Tensors = dict[str, Callable[[CheckpointReader], torch.Tensor]]


def _stored(reader: CheckpointReader, key: str) -> torch.Tensor:
    value = torch.empty(reader.shapes[f"{key}/fp32"])
    reader.read({f"{key}/fp32": value})
    return value


def _on_disk(rows: torch.Tensor, order: tuple[int, ...] | None) -> torch.Tensor:
    """Rows as the family has them: those of B are rows of the weight."""
    if order is None:
        return rows
    ordered = torch.empty_like(rows)
    ordered[list(order)] = rows
    return ordered


def _of_layer(name: str, part: Part, first_row: int, a: str, b: str) -> Tensors:
    last = first_row + part.shape[0]
    return {
        a: lambda reader: _stored(reader, f"{name}.lora_a"),
        b: lambda reader: _on_disk(_stored(reader, f"{name}.lora_b")[first_row:last], part.order),
    }


def _of_stack(
    name: str, num_experts: int, order: tuple[int, ...] | None, a: str, b: str
) -> Tensors:
    module, _, last = name.rpartition(".")

    def experts(reader: CheckpointReader, letter: str) -> list[torch.Tensor]:
        stem = f"{module}.lora_{last}_{letter}"
        return [_stored(reader, f"{stem}.{expert}") for expert in range(num_experts)]

    return {
        a: lambda reader: torch.cat(experts(reader, "a")),
        b: lambda reader: torch.stack(
            [_on_disk(rows, order) for rows in experts(reader, "b")], -1
        ).flatten(1),
    }


def _config(run: RunConfig, wrapped: list[Wrapped]) -> dict[str, Any]:
    """adapter_config.json, with short names for what every layer has."""
    lora = run.lora
    modules = [w for w in wrapped if not w.is_parameter]
    parameters = [w for w in wrapped if w.is_parameter]
    ranks = {w.target: w.rank for w in wrapped if w.rank != lora.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": run.init.path,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": _short([w.target for w in modules], run.model.num_layers),
        "target_parameters": [w.target for w in parameters] or None,
        "rank_pattern": ranks,
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }


def _short(targets: list[str], num_layers: int) -> list[str]:
    """q_proj instead of model.layers.0.self_attn.q_proj and all others, where all are meant."""
    by_end: dict[str, list[str]] = {}
    for target in targets:
        by_end.setdefault(target.rpartition(".")[2], []).append(target)
    found: list[str] = []
    for end, names in by_end.items():
        everywhere = len(names) == num_layers and ".self_attn." in names[0]
        found += [end] if everywhere else names
    return found


def export_adapter(
    plan: AdapterPlan,
    checkpoint: Path,
    tokenizer: Tokenizer,
    to: Path,
    dtype: str,
    verify: Callable[[Path], Mapping[str, Any]],
    max_seq_len: int,
) -> list[str]:
    """Write the folder, under another name until it is whole. Returns the names of its files.

    Args:
        verify: as train.pretrained.export.export.
    """
    reader = CheckpointReader(checkpoint)
    with new_folder(to) as scratch:
        dtypes = dict.fromkeys(plan.shapes, DTYPES[dtype])
        read = plan.read
        (file,) = write_shards(scratch, plan.shapes, dtypes, 2**62, lambda name: read(reader, name))
        (scratch / file).rename(scratch / WEIGHTS)
        write_tokenizer(tokenizer, max_seq_len, scratch)
        write_text(scratch / CONFIG, dumps(plan.config, indent=2) + "\n")
        facts = {"checkpoint": str(checkpoint), "dtype": dtype, **verify(scratch)}
        write_text(scratch / "loadstone.json", dumps(facts, indent=2) + "\n")
    return [WEIGHTS]
