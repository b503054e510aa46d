"""Folders of safetensors files: what they hold, single tensors out of them, and new ones written
while one tensor at a time is in memory.

The format: 8 bytes little-endian, the length of the header; the header, JSON: name -> dtype, shape,
data_offsets; the data. Since shapes are known before any number is read, a header can be written
first and the numbers after it. Nothing that is read is executed.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.families.reading import BLOCK_SCALES
from train.files.strict_json import dumps

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MXFP4_ENDS = ("_blocks", "_scales")
"""Endings of the names of an MXFP4 weight's two tensors."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""OWNER/NAME of a model; or a folder in a folder."""
MAX_OPEN = 4
"""Files that are held open: a big model has hundreds."""
MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
FP8 = "F8_E4M3"
MXFP4 = "MXFP4"
"""A name of ours: files hold its blocks and scales as bytes."""
FP4 = "FP4"
"""A name of ours: files hold pairs of numbers as signed bytes, and scales as powers of two."""
FETCH_AGAIN = "an interrupted download? Fetch it into the folder again"
LFS_POINTER = b"version https://git-lfs"
"""Begins what `git clone` leaves in the place of a large file."""
POWERS = "F8_E8M0"
"""Of scales that are powers of two."""
BLOCK = 32
"""Numbers of MXFP4 that share a scale."""
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, FP8: 1, MXFP4: 0.5 + 1 / BLOCK, FP4: 0.5}
"""Bytes of a number, of the dtypes that are read."""


class PretrainedError(ValueError):
    """A folder of published weights that cannot be used; the message names it and the mend."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a folder.

    Raises:
        PretrainedError: there is none.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        about = f"{path} does not exist; "
        if HUB_NAME.fullmatch(str(path.parent)) and not path.parent.parent.exists():
            about += f"nothing is downloaded here: hf download {path.parent} --local-dir DIR; "
        raise PretrainedError(
            f"{about}give a folder as the Hub has it: config.json, *.safetensors and the "
            "tokenizer's files"
        ) from None
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        at = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise PretrainedError(f"{path} is no JSON{at}: {FETCH_AGAIN}") from None
    if not isinstance(value, dict):
        raise PretrainedError(f"{path} holds no JSON object")
    return value


class ShardedReader:
    """Tensors of a folder by name, whole or one entry of their first axis.

    Attributes:
        shapes: of every tensor, from the headers alone; bytes_read: of tensors so far.
        fp8_block: rows and columns of an fp8 weight that share a scale, where there are such;
            fp8_scales: ending of the scales' names.

    Raises:
        PretrainedError: a file is missing or damaged, or the index and the files do not agree.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.bytes_read = 0
        self.fp8_block: tuple[int, int] | None = None
        self.fp8_scales = BLOCK_SCALES
        self._open: dict[str, Any] = {}
        self._name_in_file: dict[str, str] = {}
        self._file_of = self._files()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in sorted(set(self._file_of.values())):
            self._read_header(file)
        lost = sorted(self._file_of.keys() - self.shapes.keys())
        if lost:
            raise PretrainedError(f"{folder}: {INDEX} names {lost[0]}, which no file holds")

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return int(
            sum(
                math.prod(shape) * WIDTHS.get(self.dtypes[name], 1)
                for name, shape in self.shapes.items()
            )
        )

    def _files(self) -> dict[str, str]:
        """Tensor -> file."""
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / SINGLE).is_file():
                raise PretrainedError(
                    f"{self.folder} holds neither {INDEX} nor {SINGLE}; weights are read from "
                    "safetensors files only"
                )
            return dict.fromkeys(self._header(SINGLE), SINGLE)

        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in names.values()
        ):
            raise PretrainedError(f"{index} holds no weight_map of tensors to files beside it")
        for file in sorted(set(names.values())):
            if not (self.folder / file).is_file():
                raise PretrainedError(f"{index} names {file}, which is not there: {FETCH_AGAIN}")
        return names

    def _read_header(self, file: str) -> None:
        for name, facts in self._header(file).items():
            if self._file_of.get(name) != file:
                continue  # the index leaves it out, or has it from another file
            self.shapes[name] = tuple(facts["shape"])
            self.dtypes[name] = str(facts["dtype"])

    def _header(self, file: str) -> dict[str, Any]:
        path = self.folder / file
        try:
            size = path.stat().st_size
            with path.open("rb") as opened:
                start = opened.read(len(LFS_POINTER))
                if start == LFS_POINTER:
                    raise PretrainedError(
                        f"{path} is a pointer of Git LFS, and not the file: run git lfs pull in "
                        f"{self.folder}"
                    )
                (length,) = struct.unpack("<Q", start[:8])
                if length > min(MAX_HEADER, size - 8):
                    raise ValueError("its header would be longer than the file")
                opened.seek(8)
                header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            end = max((facts["data_offsets"][1] for facts in header.values()), default=0)
            for facts in header.values():
                if not all(isinstance(n, int) and n >= 0 for n in facts["shape"]):
                    raise ValueError("a shape in its header is none")
        except PretrainedError:
            raise
        except OSError as error:
            raise PretrainedError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, struct.error):
            raise PretrainedError(f"{path} is no safetensors file: {FETCH_AGAIN}") from None
        if size != 8 + length + end:
            raise PretrainedError(
                f"{path} has {size:,} bytes, and its header means {8 + length + end:,}: "
                f"{FETCH_AGAIN}"
            )
        assert isinstance(header, dict)
        return header

    def tensor(self, name: str, index: int | None = None) -> torch.Tensor:
        """A tensor as it is stored, or one entry of its first axis; an fp8 weight as the fp32
        numbers that it stands for.
        """
        if self.dtypes[name] == MXFP4:
            blocks, scales = (self._stored(f"{name}{end}", index) for end in MXFP4_ENDS)
            return _from_mxfp4(blocks, scales)
        if self.dtypes[name] == FP4:
            return self._from_pairs(name)
        value = self._stored(name, index)
        if self.dtypes[name] == FP8:
            return self._dequantised(value, self.tensor(name + self.fp8_scales))
        return value

    def _stored(self, name: str, index: int | None) -> torch.Tensor:
        stored = self._file(self._file_of[name]).get_slice(self._name_in_file.get(name, name))
        value: torch.Tensor = stored[:] if index is None else stored[index]
        self.bytes_read += value.nbytes
        return value

    def respell(self, spelling: Callable[[str], str]) -> None:
        """Call tensors by other names than the files do.

        Raises:
            PretrainedError: two would have the same name.
        """
        for name in list(self.shapes):
            other = spelling(name)
            if other == name:
                continue
            if other in self.shapes:
                raise PretrainedError(f"{self.folder} holds both {name} and {other}, one for both")
            self._name_in_file[other] = self._name_in_file.pop(name, name)
            self.shapes[other] = self.shapes.pop(name)
            self.dtypes[other] = self.dtypes.pop(name)
            self._file_of[other] = self._file_of.pop(name)

    def unpack_mxfp4(self) -> None:
        """Give stacks that are stored as blocks [E, R, C / 32, 16] and scales [E, R, C / 32] the
        name and shape of the stack [E, C, R] that they stand for.

        Raises:
            PretrainedError: blocks and scales are not of each other.
        """
        first, second = MXFP4_ENDS
        for name in [name.removesuffix(first) for name in self.shapes if name.endswith(first)]:
            blocks, scales = self.shapes[name + first], self.shapes.get(name + second)
            if len(blocks) != 4 or blocks[3] != BLOCK // 2 or scales != blocks[:3]:
                raise PretrainedError(
                    f"{self.folder}: {name + first} of shape {list(blocks)} and {name + second} of "
                    f"{None if scales is None else list(scales)} are no MXFP4 weight"
                )
            for end in MXFP4_ENDS:
                del self.shapes[name + end], self.dtypes[name + end]
            self.shapes[name] = (blocks[0], blocks[2] * BLOCK, blocks[1])
            self.dtypes[name] = MXFP4

    def unpack_fp4(self) -> None:
        """Give matrices that are stored as pairs of numbers [R, C / 2], with scales [R, C / 32]
        beside them, the shape [R, C] that they stand for.

        Raises:
            PretrainedError: pairs and scales are not of each other.
        """
        for name in [name for name, dtype in self.dtypes.items() if dtype == "I8"]:
            pairs, of_scales = self.shapes[name], name + BLOCK_SCALES
            scales = self.shapes.get(of_scales)
            is_of_powers = self.dtypes.get(of_scales) == POWERS
            if len(pairs) != 2 or scales != (pairs[0], 2 * pairs[1] / BLOCK) or not is_of_powers:
                raise PretrainedError(
                    f"{self.folder}: {name} of shape {list(pairs)} needs scales of {POWERS}, one "
                    f"for each {BLOCK // 2} of its columns, and {of_scales} is "
                    + ("missing" if scales is None else f"{list(scales)}")
                )
            self.shapes[name], self.dtypes[name] = (pairs[0], 2 * pairs[1]), FP4

    def _from_pairs(self, name: str) -> torch.Tensor:
        """A matrix of unpack_fp4, as fp32."""
        import torch

        pairs = self._stored(name, None).view(torch.uint8)
        scales = self._stored(name + BLOCK_SCALES, None).view(torch.uint8)
        return _from_mxfp4(pairs.unflatten(-1, (-1, BLOCK // 2)), scales).T

    def _file(self, file: str) -> Any:
        """A file, opened. The last few stay open: the parts of an expert may stand in two."""
        from safetensors import safe_open

        opened = self._open.pop(file, None)
        if opened is None:
            opened = safe_open(self.folder / file, framework="pt")
        self._open[file] = opened
        while len(self._open) > MAX_OPEN:
            del self._open[next(iter(self._open))]
        return opened

    def _dequantised(self, value: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """fp8 [R, C] times the scale of each block, in fp32."""
        assert self.fp8_block is not None  # describe has looked
        rows, columns = self.fp8_block
        each = scales.float().repeat_interleave(rows, 0)[: value.shape[0]]
        each = each.repeat_interleave(min(columns, value.shape[1]), 1)[:, : value.shape[1]]
        return each.mul_(value.float())


def _from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Bytes [..., R, G, 16], two numbers of 1 sign, 2 exponent and 1 mantissa bit in each, the
    lower half first, times 2 ** (scale - 127) with scales [..., R, G]: fp32 [..., 32 G, R] (OCP
    Microscaling Formats 1.0, sections 5.3 and 6.3; turned round as gpt-oss's models hold it).
    """
    import torch

    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = torch.tensor([*positive, *(-value for value in positive)])
    numbers = torch.stack((values[(blocks & 15).long()], values[(blocks >> 4).long()]), -1)
    exponents = scales.to(torch.int32) - 127
    scaled = torch.ldexp(numbers.flatten(-2), exponents.unsqueeze(-1))
    return scaled.flatten(-2).transpose(-1, -2)


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    max_bytes: int,
    read: Callable[[str], torch.Tensor],
) -> list[str]:
    """Write tensors as safetensors files of at most max_bytes each (a larger tensor gets a file of
    its own), and the index where there are several. Returns the names of the files.

    Args:
        read: gives the tensor of a name; called once for each, in the order of `shapes`.
    """
    shards = list(_shards(shapes, dtypes, max_bytes))
    file_of: dict[str, str] = {}
    files = []
    for number, names in enumerate(shards, 1):
        file = (
            SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        files.append(file)
        file_of.update(dict.fromkeys(names, file))
        with (folder / file).open("wb") as opened:
            opened.write(_header_of(names, shapes, dtypes))
            for name in names:
                value = read(name).to(dtypes[name]).contiguous()
                assert tuple(value.shape) == shapes[name], (name, value.shape, shapes[name])
                opened.write(_bytes(value))
            opened.flush()
            os.fsync(opened.fileno())
    if len(shards) > 1:
        total = sum(_size(name, shapes, dtypes) for name in shapes)
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / INDEX).write_text(dumps(index, indent=2) + "\n")
        files.append(INDEX)
    return files


def _bytes(value: torch.Tensor) -> memoryview:
    import torch

    return value.cpu().flatten().view(torch.uint8).numpy().data


def _size(
    name: str, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
) -> int:
    return math.prod(shapes[name]) * dtypes[name].itemsize


def _shards(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], max_bytes: int
) -> Iterable[list[str]]:
    names: list[str] = []
    filled = 0
    for name in shapes:
        size = _size(name, shapes, dtypes)
        if names and filled + size > max_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _header_of(
    names: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
) -> bytes:
    import torch

    kinds = {
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.float8_e4m3fn: FP8,
        torch.int64: "I64",
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + _size(name, shapes, dtypes)
        header[name] = {
            "dtype": kinds[dtypes[name]],
            "shape": list(shapes[name]),
            "data_offsets": [start, end],
        }
        start = end
    text = dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
