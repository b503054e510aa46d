"""Files of token ids, divided into documents: megatron-core's pairs of .idx and .bin, and .npy.

    NAME.idx, NAME.bin   lengths and places of documents, and their ids one after another
    NAME.npy             [documents, tokens], a row for a document; or [tokens], which ends of
                         documents divide: those of NAME.ends.npy, [documents] places after the last
                         id of each, or else the ids that end documents

Nothing is copied and nothing unpickled: ids are mapped, and heads are held against the files'
sizes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.config.data import SourceConfig
from train.data.damage import INDEX, MAGIC

LOOK_IDS = 2**24
"""Ids of a stream that are searched for ends together."""
_TYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Megatron-core's codes of integers; 6 and 7 are floats."""


@dataclass(frozen=True)
class IdFile:
    """Ids in a file, and which of them are a document each."""

    path: str
    """Where the ids are."""
    dtype: np.dtype[Any]
    begin: int
    """Bytes before the first id."""
    count: int
    """Ids in the file."""
    bounds: np.ndarray
    """[documents + 1] int64: the first id of each, and the end of the last."""

    def ids(self) -> np.ndarray:
        """[count] of dtype, mapped."""
        if not self.count:
            return np.empty(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.begin, (self.count,))


def id_files(source: SourceConfig, files: list[str], end_of_document: int) -> Iterator[IdFile]:
    """Every file of a source, up to as many documents as the source may have.

    Args:
        files: see sources.checked_files.

    Raises:
        ValueError: a file is not what its name says; the message names it.
    """
    left = source.max_documents
    for file in files:
        try:
            found = _megatron(file) if source.path == "megatron" else _npy(file, end_of_document)
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
        if left is not None:
            if not left:
                return
            found = _first(found, left)
            left -= len(found.bounds) - 1
        yield found


def parts_of(file: str) -> list[str]:
    """The files that one of `files_of` stands for: their size and time tell the content."""
    path = Path(file)
    if path.suffix == ".idx":
        beside = [path.with_suffix(".bin")]
    else:
        beside = [_ends_of(path)]
    return [file, *(str(other) for other in beside if other.is_file())]


def is_ends(file: str) -> bool:
    """Whether a .npy file holds the ends of documents instead of ids."""
    return file.endswith(".ends.npy")


def _ends_of(path: Path) -> Path:
    return path.with_suffix(".ends.npy")


def _first(found: IdFile, documents: int) -> IdFile:
    """The file as if it ended after so many documents."""
    bounds = found.bounds[: documents + 1]
    return IdFile(found.path, found.dtype, found.begin, int(bounds[-1]), bounds)


# --- Megatron's -----------------------------------------------------------------------------------


def _megatron(index: str) -> IdFile:
    with open(index, "rb") as file:
        head = file.read(INDEX.size)
        if len(head) < INDEX.size or not head.startswith(MAGIC):
            raise ValueError(f"{index} is no index of a store of Megatron's (.idx)")
        _, version, code, num_sequences, num_bounds = INDEX.unpack(head)
        if version != 1 or code not in _TYPES:
            raise ValueError(
                f"{index} has version {version} and tokens of type {code}; version 1 and whole "
                f"numbers are read (types {', '.join(map(str, _TYPES))})"
            )
        needed = INDEX.size + 12 * num_sequences + 8 * num_bounds
        size = os.fstat(file.fileno()).st_size
        if size == needed + num_sequences:
            raise ValueError(f"{index} says that its sequences are of several kinds, not only text")
        if size != needed or num_bounds < 1:
            raise ValueError(f"{index} has {size:,} bytes instead of {needed:,}: it is cut short")
        lengths = np.fromfile(file, "<i4", num_sequences).astype(np.int64)
        places = np.fromfile(file, "<i8", num_sequences)
        documents = np.fromfile(file, "<i8", num_bounds)

    dtype = np.dtype(_TYPES[code])
    tokens = str(Path(index).with_suffix(".bin"))
    if not os.path.isfile(tokens):
        raise ValueError(f"{tokens} is missing; it holds the tokens that {index} divides")
    return _divided(index, tokens, dtype, lengths, places, documents)


def _divided(
    index: str,
    tokens: str,
    dtype: np.dtype[Any],
    lengths: np.ndarray,
    places: np.ndarray,
    documents: np.ndarray,
) -> IdFile:
    """
    Args:
        lengths, places: of every sequence, in ids and in bytes; documents: the first sequence of
            each, and the number of all.
    """
    ends = np.concatenate(([0], np.cumsum(lengths)))
    count, rest = divmod(os.path.getsize(tokens), dtype.itemsize)
    if rest or count != ends[-1] or np.any(lengths < 0):
        raise ValueError(
            f"{tokens} has {os.path.getsize(tokens):,} bytes, but {index} divides {ends[-1]:,} "
            f"tokens of {dtype.itemsize} bytes"
        )
    if not np.array_equal(places, ends[:-1] * dtype.itemsize):
        raise ValueError(f"{index} does not have its sequences one after another")
    # A store without sequences has one bound, 0.
    if documents[0] or documents[-1] != len(lengths) or np.any(np.diff(documents) < 0):
        raise ValueError(f"{index} does not divide its sequences into documents")
    return IdFile(tokens, dtype, 0, count, ends[documents])


# --- arrays ---------------------------------------------------------------------------------------


def _npy(path: str, end_of_document: int) -> IdFile:
    array = _array(path)
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else ", by columns"
        raise ValueError(
            f"{path} holds {array.dtype} of shape {list(array.shape)}{order}; ids are whole "
            "numbers, [tokens] or [documents, tokens]"
        )
    ends = _ends_of(Path(path))
    if ends.is_file():
        bounds = _given_bounds(array, str(ends))
    elif array.ndim == 2:
        bounds = np.arange(len(array) + 1, dtype=np.int64) * array.shape[1]
    else:
        bounds = _bounds(array, end_of_document)
    begin = array.offset if isinstance(array, np.memmap) else 0
    return IdFile(path, array.dtype, begin, array.size, bounds)


def _array(path: str) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no array of numbers (.npy): {reason}") from error


def _given_bounds(array: np.ndarray, path: str) -> np.ndarray:
    ends = _array(path)
    is_whole = ends.ndim == 1 and ends.dtype.kind in "iu" and array.ndim == 1
    if is_whole:
        bounds: np.ndarray = np.concatenate(([0], ends)).astype(np.int64)
        if bounds[-1] == len(array) and np.all(np.diff(bounds) >= 0):
            return bounds
    raise ValueError(
        f"{path} holds no ends of documents: they grow up to {array.size:,}, the number of ids in "
        "an array of one dimension"
    )


def _bounds(ids: np.ndarray, end_of_document: int) -> np.ndarray:
    """Documents of a stream: each ends with the id that says so; the last may lack it."""
    ends = [
        first + 1 + np.flatnonzero(ids[first : first + LOOK_IDS] == end_of_document)
        for first in range(0, len(ids), LOOK_IDS)
    ]
    bounds = np.concatenate([[0], *ends]).astype(np.int64)
    return bounds if bounds[-1] == len(ids) else np.append(bounds, len(ids))
