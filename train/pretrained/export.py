"""A run's checkpoint as a folder that transformers and vLLM load unchanged: written tensor by
tensor, under another name until it is whole.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.families.deepseek_v4 import as_read
from model.families.names import (
    BIAS,
    TABLE,
    Place,
    further_copies,
    further_parts,
    on_disk,
    parts_of,
    places,
)
from model.families.reading import FamilyError, Reading, Settings
from model.families.writing import express
from model.routers.config import TopKConfig
from train.checkpoint.reader import MergedReader
from train.config.run import RunConfig
from train.files.durable import new_folder, write_text
from train.files.strict_json import dumps
from train.pretrained.compressed import NOTE, dtypes_of, in_fp8, quantise, with_scales
from train.pretrained.described import KEPT, PRETRAINED
from train.pretrained.shards import PretrainedError, read_json, write_shards

CHAT_TEMPLATE = "chat_template.jinja"
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
"""Of fp8 what is no linear layer."""
FINE = (
    *("streams.weight", "streams.bias", "streams.scale"),
    *(".sinks", ".slot_bias"),
)
"""Endings of our names of what DeepSeek-V4's files hold in fp32."""


@dataclass(frozen=True)
class Export:
    """What is to be written, decided before a byte is."""

    config: Settings
    """config.json, without dtype and token ids."""
    reading: Reading
    notes: tuple[str, ...]
    """What the folder does not say, in sentences."""
    fp8: tuple[str, ...] = ()
    """Names on disk of the weights that become 8-bit floats."""


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a run, as files."""

    folder: Path
    """Holds tokenizer.json, and what the Hub keeps beside it."""
    is_published: bool
    """Whether all of it came from a folder of published weights, to be given on as it is."""
    end_of_text: str
    chat_template: Path | None
    """The template that a run on conversations used, where it keeps one."""


def tokenizer_of(run: RunConfig, run_dir: Path) -> Tokenizer:
    """Where the files of a run's tokenizer are: those that it began with, those beside the
    tokenizer that its config names, or the one that the run has made.
    """
    end, path = run.data.tokenizer.end_of_document, run.data.tokenizer.path
    kept = run_dir / PRETRAINED
    template: Path | None = run_dir / "data" / CHAT_TEMPLATE
    if template is not None and not template.is_file():
        template = None
    came_with_weights = {run.init.path, f"{run.init.run}/data", str(kept)}
    if path in came_with_weights and (kept / "tokenizer.json").is_file():
        return Tokenizer(kept, True, end, template)
    if path is not None and run.init.run is None:
        named = Path(path).expanduser()
        folder = named if named.is_dir() else named.parent
        if (folder / "tokenizer_config.json").is_file() and (folder / "tokenizer.json").is_file():
            return Tokenizer(folder, True, end, template)
    return Tokenizer(run_dir / "data", False, end, template)


def plan_export(run: RunConfig, dtype: str = "bf16") -> Export:
    """Whether and as what a run can be exported, from its settings alone.

    Raises:
        FamilyError: no published family computes it, with every reason and the way out.
    """
    notes, problems = [], []
    if run.attention.name == "sparse":
        notes.append(
            "sparse attention has no place in config.json: the folder holds the dense model with "
            "the same weights, which attends to everything"
        )
    if run.attention.name == "indexed":
        problems.append(
            f"attention=indexed (rule={run.attention.arguments['rule']}): no published family has "
            "an index over these projections, and config.json would describe dense attention"
        )
    if run.attention.name == "compressed" and run.model.num_residual_streams == 1:
        problems.append(
            "attention=compressed: the published family that has it, DeepSeek-V4, has several "
            "residual streams, and model.num_residual_streams is 1"
        )
    router: Settings = {}
    if run.model.num_experts:
        if isinstance(run.router, TopKConfig):
            router = dataclasses.asdict(run.router)
        else:
            problems.append(
                f"router={run.router.name}: how many experts a token visits varies, which no "
                "config.json can say. python -m launch.evaluate run=RUN router.top_k=2 measures "
                "what fixed top-k would cost; with the same setting this command writes it"
            )
    if problems:
        raise FamilyError(problems)

    attention: Settings = {"name": "dense"}
    # What muP multiplies by in the forward pass, as the constants that a family may have.
    shape = dataclasses.asdict(run.model) | {
        "head_dim": run.model.attention_head_dim,
        "attention_multiplier": run.model.attention_scale,
        "residual_multiplier": run.model.residual_scale,
        "logits_divisor": run.model.whole_logits_divisor,
    }
    if run.attention.name in ("mla", "windowed"):
        attention = {"name": run.attention.name, **run.attention.arguments}
    if run.attention.name == "compressed":
        attention = as_read({"name": "compressed", **run.attention.arguments}, shape)
    if run.attention.name == "mla":
        shape["head_dim"] = None
    if shape["rope_scaling"] is not None:
        shape["rope_scaling"] = {
            key: value
            for key, value in shape["rope_scaling"].items()
            if value is not None and (key, value) != ("truncate", True)
        }
    config, reading = express(shape, router, attention)
    if run.model.num_mtp_layers > reading.num_further_layers:
        notes.append(
            f"{run.model.num_mtp_layers} layers that predict further tokens are left out, which "
            f"{reading.family.model_type} has no place for"
        )
    fp8: list[str] = []
    if dtype == "fp8":
        fp8, config["quantization_config"] = in_fp8(reading)
        notes.append(NOTE)
    return Export(config, reading, tuple(notes), tuple(fp8))


def export(
    plan: Export,
    reader: MergedReader,
    tokenizer: Tokenizer,
    to: Path,
    dtype: str,
    max_shard_bytes: int,
    verify: Callable[[Path], dict[str, Any]],
) -> list[str]:
    """Write the folder. Returns the names of its files.

    Args:
        reader: of a checkpoint, which is read tensor by tensor.
        verify: looks at the whole folder while it still has another name, and returns what it has
            found, for loadstone.json; what it raises ends the export, and nothing is left.

    Raises:
        PretrainedError: the state of a router cannot be expressed.
    """
    checkpoint = reader.checkpoint
    _require_no_bias(plan.reading, reader, checkpoint)
    with new_folder(to) as scratch:
        files = _write_weights(plan.reading, reader, scratch, dtype, max_shard_bytes, plan.fp8)
        ids = write_tokenizer(tokenizer, plan.reading.model["max_seq_len"], scratch)
        config = plan.config | {
            "dtype": str(DTYPES[dtype]).removeprefix("torch."),
            **ids,
        }
        if not (scratch / "generation_config.json").is_file():
            generation = {**ids, "do_sample": True}
            write_text(scratch / "generation_config.json", dumps(generation, indent=2) + "\n")
        # Last, since nothing loads a folder without it.
        write_text(scratch / "config.json", dumps(config, indent=2) + "\n")
        found = verify(scratch)
        facts = {"checkpoint": str(checkpoint), "dtype": dtype, "notes": plan.notes, **found}
        write_text(scratch / "loadstone.json", dumps(facts, indent=2) + "\n")
    return files


def _require_no_bias(reading: Reading, reader: MergedReader, checkpoint: Path) -> None:
    """A balancing run has moved a selection bias that most families have no place for."""
    if reading.family.selection_bias is not None:
        return
    for key in (key for key in reader.shapes if key.endswith(f".router.{BIAS}")):
        bias = torch.empty(reader.shapes[key])
        reader.read({key: bias})
        if (largest := float(bias.abs().max())) > 0:
            raise PretrainedError(
                f"{checkpoint}: {key.removeprefix('buffer/')} reaches {largest:.3g}, and "
                f"{reading.family.model_type} has no selection bias; train with "
                "router=sigmoid_top_k, whose families have one, or without balance.bias_update"
            )


def _write_weights(
    reading: Reading,
    reader: MergedReader,
    folder: Path,
    dtype: str,
    max_shard_bytes: int,
    fp8: Sequence[str] = (),
) -> list[str]:
    parts = dict(parts_of(reading))
    copies: dict[str, str] = {}
    for number in range(reading.num_further_layers):
        parts |= further_parts(reading, number)
        copies |= further_copies(reading, number)
    where, shapes = places(parts), on_disk(parts)
    where |= {name: where[original] for name, original in copies.items()}
    shapes |= {name: shapes[original] for name, original in copies.items()}
    dtypes = {name: DTYPES[dtype] for name in shapes}
    for key, several in parts.items():
        # The selection bias decides between experts that are nearly equal: it stays fp32.
        if key.startswith("buffer/"):
            kind = torch.int64 if key.endswith(TABLE) else torch.float32
            dtypes |= {part.name: kind for part in several}
        elif reading.family.attention == "compressed" and key.endswith(FINE):
            dtypes |= {part.name: torch.float32 for part in several}

    dtypes_of_fp8 = dtypes_of(fp8)
    shapes, dtypes = with_scales(shapes, fp8), dtypes | dtypes_of_fp8

    # Gate and up of an expert are one tensor of ours, and they follow each other.
    last: tuple[str, torch.Tensor] | None = None

    def rows(place: Place) -> torch.Tensor:
        nonlocal last
        stored = place.key if place.key.startswith("buffer/") else f"{place.key}/fp32"
        if last is None or last[0] != stored:
            kind = torch.int32 if stored.endswith(TABLE) else torch.float32
            last = (stored, torch.empty(reader.shapes[stored], dtype=kind))
            reader.read({stored: last[1]})
        value = last[1][place.first_row : place.first_row + place.num_rows]
        if place.order is not None:
            ordered = torch.empty_like(value)
            ordered[list(place.order)] = value
            value = ordered
        if place.columns is not None:
            value = value.view(-1, place.columns)
        return value.T if place.is_transposed else value

    # A weight is read once, and its scales are asked for next.
    scales: torch.Tensor | None = None

    def tensor(name: str) -> torch.Tensor:
        nonlocal scales
        if name not in where:
            assert scales is not None
            return scales
        if name in dtypes_of_fp8:
            try:
                small, scales = quantise(rows(where[name][0]))
            except ValueError as error:
                raise PretrainedError(
                    f"{name} {error}: no 8-bit floats can be made of it"
                ) from None
            return small
        several = where[name]
        if len(several) == 1 and tuple(shapes[name]) == tuple(rows(several[0]).shape):
            return rows(several[0])
        return torch.stack([rows(place).to(dtypes[name]) for place in several])

    return write_shards(folder, shapes, dtypes, max_shard_bytes, tensor)


def write_tokenizer(tokenizer: Tokenizer, max_seq_len: int, folder: Path) -> dict[str, Any]:
    """Copy the tokenizer's files, byte by byte where they came from a folder; returns the ids of
    its special tokens, as config.json has them.
    """
    for name in KEPT if tokenizer.is_published else ("tokenizer.json",):
        if name != "config.json" and (tokenizer.folder / name).is_file():
            shutil.copyfile(tokenizer.folder / name, folder / name)
    used, there = tokenizer.chat_template, folder / CHAT_TEMPLATE
    if used is not None and not (there.is_file() and used.read_bytes() == there.read_bytes()):
        shutil.copyfile(used, there)
    if not (folder / "tokenizer_config.json").is_file():
        settings: Mapping[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.end_of_text,
            "model_max_length": max_seq_len,
            "clean_up_tokenization_spaces": False,
        }
        write_text(folder / "tokenizer_config.json", dumps(settings, indent=2) + "\n")

    # What the source said of them holds on: a chat model may end at more tokens than one.
    source = tokenizer.folder / "config.json"
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if tokenizer.is_published and source.is_file():
        published = read_json(source)
        return {name: published.get(name) for name in names}
    tokens = read_json(folder / "tokenizer.json").get("added_tokens") or []
    number = next((t["id"] for t in tokens if t.get("content") == tokenizer.end_of_text), None)
    return {name: number if name == "eos_token_id" else None for name in names}
