"""Whether the files of a token store are what prepare.py wrote, as far as that can be told without
reading all tokens.

The manifest carries a checksum of itself, the size of every file, and the SHA-256 of those up to
SMALL_BYTES, which are hashed whenever they are opened. A larger file of tokens has a table beside
it, NAME.bin.crc: one CRC-32 for every PIECE_BYTES, compared the first time a process reads the
piece, so that opening terabytes costs nothing and no token is used unverified. Stores made before
have neither: their files are compared with their counts, their ids with the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from train.files import durable
from train.files import manifest as folders
from train.files.scratch import make_folder
from train.files.strict_json import dumps

SMALL_BYTES = 2**24
"""Files up to this size are hashed whenever they are opened."""
PIECE_BYTES = 2**16
"""What is verified at a time. A row of a sample reads a piece for each of its documents."""
MANIFEST = folders.MANIFEST
FORMAT = 1
INDEX = struct.Struct("<9sQBQQ")
"""Head of a .idx file: magic, version, code of the token type, sequences, documents."""
MAGIC = b"MMIDIDX\0\0"
_TOKEN_TYPES: dict[int, np.dtype[Any]] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
"""Megatron-core's codes of the types that prepare.py uses."""


def damaged(path: Path, what: str) -> ValueError:
    """The error to raise about a file of a store."""
    return ValueError(
        f"{path} {' '.join(what.split())}; delete the folder {path.parent}: it is made again when "
        "the data are prepared, and a run's data folder when the run is resumed"
    )


# --- the manifest ---------------------------------------------------------------------------------


def seal(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The manifest with facts about the files in the folder and its own checksum."""
    for path in sorted(folder.glob("*.bin")):
        if path.stat().st_size > SMALL_BYTES:
            _write_table(path)
    files = {path.name: _facts(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    sealed = {**manifest, "files": files}
    return {**sealed, "checksum": _checksum(sealed)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: it cannot be read, is damaged, or a later version wrote it.
    """
    path = folder / MANIFEST
    if path.exists():
        folders.require_owned(folder)
    try:
        manifest = json.loads(path.read_bytes())
        checksum = _checksum(manifest) if isinstance(manifest, dict) else None
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, "is no JSON") from error
    if not isinstance(manifest, dict):
        raise damaged(path, f"holds a {type(manifest).__name__} instead of an object")
    if ("checksum" in manifest) != ("files" in manifest) or manifest.get(
        "checksum", checksum
    ) != checksum:
        raise damaged(path, "has another checksum")
    wrong = _wrong_key(manifest)
    if wrong is not None:
        raise damaged(path, f"has no valid {wrong!r}")
    return manifest


def _checksum(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(dumps(rest, sort_keys=True).encode()).hexdigest()


def _wrong_key(manifest: dict[str, Any]) -> str | None:
    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**62

    def has_tokens(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and is_count(value.get("tokens"))
            and is_count(value.get("documents", 0))
        )

    sources, files = manifest.get("sources"), manifest.get("files", {})
    valid = {
        "format": manifest.get("format", FORMAT) == FORMAT,
        "fingerprint": isinstance(manifest.get("fingerprint"), str),
        "content": isinstance(manifest.get("content"), str),
        "vocab_size": is_count(manifest.get("vocab_size")),
        "end_of_document": is_count(manifest.get("end_of_document")),
        "unigram_entropy": type(manifest.get("unigram_entropy")) in (int, float),
        "sources": isinstance(sources, list) and bool(sources) and all(map(has_tokens, sources)),
        "validation": "validation" not in manifest or has_tokens(manifest["validation"]),
        "files": isinstance(files, dict)
        and all(isinstance(f, dict) and is_count(f.get("size")) for f in files.values()),
    }

    found = next((key for key, is_valid in valid.items() if not is_valid), None)
    if found is None and manifest["end_of_document"] >= manifest["vocab_size"]:
        return "end_of_document"
    return found


# --- files ----------------------------------------------------------------------------------------


def _facts(path: Path) -> dict[str, Any]:
    """Size in bytes, and SHA-256 unless the file is large."""
    size = path.stat().st_size
    return (
        folders.file_facts(path) if size <= SMALL_BYTES or path.suffix == ".crc" else {"size": size}
    )


def check_file(folder: Path, name: str, manifest: dict[str, Any]) -> Path:
    """The path of a file of the store.

    Raises:
        ValueError: it is missing, or is not the file that the manifest lists.
    """
    path = folder / name
    if not path.is_file():
        raise damaged(path, "is missing")
    folders.require_owned(path)
    listed = manifest.get("files", {}).get(name)
    if listed is None:
        if "files" in manifest:
            raise damaged(path, f"is not listed in {MANIFEST}")
        return path
    try:
        found = _facts(path)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from error
    if found["size"] != listed["size"]:
        raise damaged(path, f"has {found['size']} bytes instead of {listed['size']}")
    if "sha256" in found and found != listed:
        raise damaged(path, "has another checksum")
    return path


def check_split(
    folder: Path, name: str, num_tokens: int, manifest: dict[str, Any]
) -> np.dtype[Any]:
    """Type of the tokens in NAME.bin, which NAME.idx divides into documents.

    Raises:
        ValueError: a file is missing or damaged, or the two do not hold `num_tokens` tokens.
    """
    index, tokens = (check_file(folder, f"{name}.{kind}", manifest) for kind in ("idx", "bin"))
    try:
        with index.open("rb") as file:
            head = file.read(INDEX.size)
        sizes = index.stat().st_size, tokens.stat().st_size
    except OSError as error:
        raise damaged(index, f"cannot be read ({error.strerror})") from error

    if len(head) < INDEX.size:
        raise damaged(index, f"has {len(head)} bytes, fewer than its head of {INDEX.size}")

    # megatron-core trusts these numbers, so they are held against the files' sizes first.
    magic, version, code, num_sequences, num_documents = INDEX.unpack(head)
    if magic != MAGIC or version != 1 or code not in _TOKEN_TYPES:
        raise damaged(index, "is no index of tokens")

    # length, place; first sequence of each document
    needed = INDEX.size + 12 * num_sequences + 8 * num_documents
    if sizes[0] != needed:
        raise damaged(index, f"has {sizes[0]} bytes instead of {needed}")

    dtype = _TOKEN_TYPES[code]
    if manifest.get("token_dtype", dtype.name) != dtype.name:
        raise damaged(index, f"is of {dtype.name} tokens instead of {manifest['token_dtype']}")
    if sizes[1] != num_tokens * dtype.itemsize:
        expected = num_tokens * dtype.itemsize
        raise damaged(tokens, f"has {sizes[1]} bytes instead of {expected} for {num_tokens} tokens")

    return dtype


# --- large files ----------------------------------------------------------------------------------


def _write_table(path: Path) -> None:
    """NAME.bin.crc: [pieces] little-endian uint32."""
    with path.open("rb") as file:
        pieces = [zlib.crc32(piece) for piece in iter(lambda: file.read(PIECE_BYTES), b"")]
    np.array(pieces, dtype="<u4").tofile(path.with_name(path.name + ".crc"))


class Numbers:
    """The numbers of a .bin file, each verified before it is used. Reads like megatron-core's bin
    readers.

    Args:
        path: an existing NAME.bin of the size it should have; dtype: of its numbers.
        table: the checksums of its pieces; None: NAME.bin.crc, where the manifest lists it.
        begin, size: bytes before the numbers, and of all of them; None: to the end.

    Raises:
        ValueError: from reading, when the bytes are not those that were written.
    """

    def __init__(
        self,
        path: Path,
        dtype: Any,
        manifest: dict[str, Any],
        table: Path | None = None,
        begin: int = 0,
        size: int | None = None,
    ):
        self.path, self._dtype = path, np.dtype(dtype)
        size = path.stat().st_size - begin if size is None else size
        self._bytes = (
            np.memmap(path, np.uint8, "r", begin, (size,)) if size else np.empty(0, np.uint8)
        )
        self._table = None
        table = path.with_name(path.name + ".crc") if table is None else table
        if table.name in manifest.get("files", {}):
            self._table = np.fromfile(check_file(table.parent, table.name, manifest), dtype="<u4")
            if len(self._table) != -(-len(self._bytes) // PIECE_BYTES):
                raise damaged(
                    table, f"holds {len(self._table)} checksums for {len(self._bytes)} bytes"
                )
            self._verified = np.zeros(len(self._table), dtype=bool)

    def read(self, dtype: Any, count: int, offset: int) -> np.ndarray:
        """[count] numbers of `dtype` that stand `offset` bytes from the start."""
        stop = offset + count * np.dtype(dtype).itemsize
        self._verify(offset, stop)
        return self._bytes[offset:stop].view(dtype)

    def __len__(self) -> int:
        return len(self._bytes) // int(self._dtype.itemsize)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Numbers start..stop-1 of the file, fewer at its end."""
        start, stop, _ = part.indices(len(self))
        return self.read(self._dtype, max(0, stop - start), start * self._dtype.itemsize)

    def _error(self, what: str) -> ValueError:
        return damaged(self.path, what)

    def _verify(self, start: int, stop: int) -> None:
        if self._table is None:
            return
        pieces = np.arange(start // PIECE_BYTES, -(-stop // PIECE_BYTES))
        for piece in pieces[~self._verified[pieces]]:
            first = int(piece) * PIECE_BYTES
            if zlib.crc32(self._bytes[first : first + PIECE_BYTES].tobytes()) != self._table[piece]:
                raise self._error(
                    f"has another checksum between bytes {first} and {first + PIECE_BYTES}"
                )
            self._verified[piece] = True


class Tokens(Numbers):
    """Numbers that are ids of a vocabulary.

    Raises:
        ValueError: from reading, also when an id is beyond the vocabulary.
    """

    def __init__(
        self,
        path: Path,
        dtype: Any,
        manifest: dict[str, Any],
        table: Path | None = None,
        begin: int = 0,
        size: int | None = None,
    ):
        super().__init__(path, dtype, manifest, table, begin, size)
        self.vocab_size: int = manifest["vocab_size"]

    def read(self, dtype: Any, count: int, offset: int) -> np.ndarray:
        ids = super().read(dtype, count, offset)
        if count and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise self._error(
                f"holds a token id outside of the vocabulary of {self.vocab_size}, near byte "
                f"{offset}"
            )
        return ids


# --- what is made again by itself -----------------------------------------------------------------


def cached_folder(folder: Path, build: Callable[[Path], object]) -> None:
    """Make a folder by `build` unless it is there and every file in it is what was built. It is
    whole or absent at any time.

    Raises:
        OSError: it has to be made, and its place cannot be written.

    The checksums matter: what megatron-core caches it reads back as pickles. So a folder that
    others own or can write is made again, and plain_arrays() looks into the files before
    megatron-core does.
    """

    def is_whole() -> bool:
        try:
            folders.require_owned(folder)
            files = folders.read_manifest(folder)
            return {p.name for p in folder.iterdir()} == {*files, folders.MANIFEST} and not (
                folders.size_damage(folder, files) or folders.content_damage(folder, files)
            )
        except (OSError, folders.CheckpointError):
            return False

    def fill(scratch: Path) -> None:
        build(scratch)
        files = {path.name: folders.file_facts(path) for path in sorted(scratch.iterdir())}
        durable.write_json(scratch / folders.MANIFEST, {"files": files})

    if not is_whole():
        make_folder(folder, fill, is_whole)


def plain_arrays(folder: Path) -> None:
    """See that every .npy file in a folder is an array of numbers, which executes nothing when it
    is read.

    Raises:
        ValueError: one is something else, such as a pickle.
    """
    for path in sorted(folder.glob("*.npy")):
        try:
            np.load(path, allow_pickle=False, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise damaged(path, "is no plain array of numbers") from error
