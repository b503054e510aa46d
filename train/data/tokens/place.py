"""Tokens that stay where they are: what a store keeps of a source of them, and training on it.

    train_<i>_starts.bin   int64, of every training document its first id, in its file
    train_<i>_lengths.bin  int32, its tokens, with the one that ends it
    train_<i>_facts.bin    int32, twice the number of its file, and 1 more where that end is missing
    train_<i>_<k>.crc      checksums of the pieces of file k

The manifest says where the files are. What is held out is copied, as of any source.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from train.data.damage import Numbers, Tokens, check_file
from train.data.tokens.files import IdFile
from train.data.tokens.read import ReadRange


class PlaceFiles:
    """Writes what a store keeps of a source."""

    def __init__(self, folder: Path, source: int):
        self.folder, self.source = folder, source
        self._files = {
            name: (folder / f"train_{source}_{name}.bin").open("wb")
            for name in ("starts", "lengths", "facts")
        }
        self._pieces: dict[int, list[np.ndarray]] = {}

    def add(self, read: ReadRange, chosen: np.ndarray) -> np.ndarray:
        """The next documents, those of them that are trained on; returns their lengths.

        Args:
            chosen: [documents of the range] bool.
        """
        file = int(read.of_file[0])
        lengths: np.ndarray = (read.lengths + ~read.has_end)[chosen]
        facts = 2 * file + ~read.has_end[chosen]
        for name, numbers in (
            ("starts", read.starts[chosen].astype("<i8")),
            ("lengths", lengths.astype("<i4")),
            ("facts", facts.astype("<i4")),
        ):
            self._files[name].write(numbers.tobytes())
        self._pieces.setdefault(file, []).append(read.pieces)
        return lengths

    def close(self, files: Iterable[IdFile]) -> list[dict[str, Any]]:
        """Finish; returns what the manifest says of the files."""
        for file in self._files.values():
            file.close()
        said = []
        for number, found in enumerate(files):
            pieces = np.concatenate([np.empty(0, "<u4"), *self._pieces.get(number, [])])
            pieces.astype("<u4").tofile(self.folder / f"train_{self.source}_{number}.crc")
            said.append(
                {
                    "path": os.path.abspath(found.path),
                    "dtype": found.dtype.str,
                    "begin": found.begin,
                    "bytes": found.count * found.dtype.itemsize,
                }
            )
        return said


class ForeignTokens(Tokens):
    """Ids of a file that is not the store's own."""

    def _error(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path} {what}: it was changed after {self.store} was prepared from it; put it "
            "back, or begin a new run with it as it is"
        )

    def __init__(self, store: Path, table: str, file: dict[str, Any], manifest: dict[str, Any]):
        """
        Args:
            table: name of the file of its checksums; file: what the manifest says of it.

        Raises:
            ValueError: it is gone, or shorter than it was.
        """
        self.store = store
        path, begin, size = Path(file["path"]), file["begin"], file["bytes"]
        found = path.stat().st_size if path.is_file() else None
        if found is None or found < begin + size:
            what = "is gone" if found is None else f"has {found} bytes instead of {begin + size}"
            raise ValueError(
                f"{path} {what}; the store {store} trains on its tokens in place: put it back, or "
                "delete the store and prepare again"
            )
        super().__init__(path, np.dtype(file["dtype"]), manifest, store / table, begin, size)


class PlacedDocuments:
    """The training documents of a source of tokens, in the words of megatron-core's IndexedDataset.

    Raises:
        ValueError: when a file is damaged or was changed.
    """

    def __init__(self, store: Path, source: int, manifest: dict[str, Any]):
        self.path_prefix = str(store / f"train_{source}")
        self.end_of_document: int = manifest["end_of_document"]

        def numbers(name: str, dtype: str) -> np.ndarray:
            path = check_file(store, f"train_{source}_{name}.bin", manifest)
            return Numbers(path, dtype, manifest)[:]

        self.sequence_lengths: np.ndarray = numbers("lengths", "<i4").astype(np.int32, copy=False)
        """[documents] int32: tokens of each, with the one that ends it."""
        self._starts, self._facts = numbers("starts", "<i8"), numbers("facts", "<i4")
        self._files = [
            ForeignTokens(store, f"train_{source}_{i}.crc", file, manifest)
            for i, file in enumerate(manifest["sources"][source]["files"])
        ]

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """[length] int64: tokens of a document from one on."""
        file, lacks_end = divmod(int(self._facts[document]), 2)
        whole = int(self.sequence_lengths[document])
        stop = whole if length is None else min(offset + int(length), whole)

        first, stored = int(self._starts[document]), whole - lacks_end
        ids = self._files[file][first + offset : first + min(stop, stored)].astype(np.int64)
        return np.append(ids, self.end_of_document) if stop > stored else ids
