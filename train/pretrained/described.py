"""What a folder of published weights holds, from its small files and headers alone. Imports no
torch: `launch.plan` and every refusal ask this.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.families.names import TABLE_THERE, Parts, differences, parts_of, respelled
from model.families.reading import FamilyError, Reading, read
from train.pretrained.shards import (
    FP4,
    FP8,
    MXFP4,
    POWERS,
    PretrainedError,
    ShardedReader,
    read_json,
)

PRETRAINED = "pretrained"
"""Folder of a run that keeps the small files of the weights it began with."""
KEPT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Those files: an export gives them on as they are, and a resumed run reads its tokenizer there."""
READ_AS = {"F64", "F32", "F16", "BF16"}
"""Dtypes whose numbers are read."""
TABLES_AS = {"I32", "I64"}
"""Likewise, of tables of token ids."""


@dataclass(frozen=True)
class Described:
    """A folder whose tensors are those that its config.json means."""

    folder: Path
    reading: Reading
    parts: Parts
    """Of every parameter, and of the buffers that the family has."""
    shards: ShardedReader


def reading_of(folder: Path) -> Reading:
    """What the folder's config.json says.

    Raises:
        PretrainedError: there is none, or it cannot be expressed, with every reason.
    """
    path = folder / "config.json"
    try:
        return read(read_json(path))
    except FamilyError as error:
        raise PretrainedError(f"{path}: {error}") from None


def describe(folder: Path) -> Described:
    """Read the headers and hold them against config.json, in both directions.

    Raises:
        PretrainedError: config.json cannot be expressed, a file is missing or damaged, or the
            tensors are not those that config.json means.
    """
    reading = reading_of(folder)
    parts = parts_of(reading)
    shards = ShardedReader(folder)
    if reading.is_mxfp4:
        shards.unpack_mxfp4()
    shards.respell(lambda name: respelled(name, reading.family))
    if reading.has_fp4:
        shards.unpack_fp4()
    if found := differences(shards.shapes, reading, parts):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise PretrainedError(f"{folder}: {found[0]}{more}")
    shards.fp8_block, shards.fp8_scales = reading.fp8_block, reading.fp8_scales
    quantised = {FP8} if reading.fp8_block is not None else set()
    for name, dtype in shards.dtypes.items():
        if name.endswith(TABLE_THERE) and dtype not in TABLES_AS:
            raise PretrainedError(f"{folder}: {name} is a table of {dtype}, not of whole numbers")
    dtypes = {d for name, d in shards.dtypes.items() if not name.endswith(TABLE_THERE)}
    quantised |= {POWERS, FP4} if reading.fp8_block is not None else set()
    if others := sorted(dtypes - READ_AS - quantised - {MXFP4}):
        raise PretrainedError(
            f"{folder} holds tensors of dtype {others[0]}; only {', '.join(sorted(READ_AS))} are "
            "read: give a folder with dequantised weights"
        )
    for name, dtype in shards.dtypes.items():
        if dtype == FP8:
            _require_scales(shards, name)
    return Described(folder, reading, parts, shards)


def _require_scales(shards: ShardedReader, name: str) -> None:
    """
    Raises:
        PretrainedError: the scales of an fp8 weight are missing, or not one for each block.
    """
    assert shards.fp8_block is not None
    blocks = tuple(
        -(-size // step) for size, step in zip(shards.shapes[name], shards.fp8_block, strict=False)
    )
    scales = name + shards.fp8_scales
    found = shards.shapes.get(scales)
    if found != blocks:
        has = "is missing" if found is None else f"has shape {list(found)}"
        raise PretrainedError(
            f"{shards.folder}: {scales} {has}; {name} needs a scale for each block, {list(blocks)}"
        )


def end_of_text(folder: Path) -> str | None:
    """The token that ends a text, of the folder's tokenizer; None where no file says."""
    if (folder / "tokenizer_config.json").is_file():
        token = read_json(folder / "tokenizer_config.json").get("eos_token")
        if isinstance(token, dict):  # written with its flags
            token = token.get("content")
        if isinstance(token, str):
            return token

    number: Any = None
    for name in ("generation_config.json", "config.json"):
        if number is None and (folder / name).is_file():
            number = read_json(folder / name).get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    if number is None or not (folder / "tokenizer.json").is_file():
        return None
    added = read_json(folder / "tokenizer.json").get("added_tokens") or []
    return next(
        (str(t["content"]) for t in added if isinstance(t, dict) and t.get("id") == number), None
    )
