"""From shards to the files of a store: documents in the order of the corpus, those that are held
out apart.

Only one shard is in memory at a time, and for every document its length.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train.data.shards.encode import Shard
from train.data.shards.parts import Parts
from train.data.store import HELD_OUT_BYTES, targets_file
from train.data.tokens.files import IdFile
from train.data.tokens.place import PlaceFiles
from train.data.tokens.read import ReadRange

_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
"""Megatron-core's codes of the types of tokens."""


@dataclass
class Counts:
    """What a part of a store holds."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """Of text in UTF-8."""
    targets: int | None = None
    """Of conversations: tokens that are learnt."""
    unknown_bytes: bool = False
    """Whether nobody knows how many bytes of text some of the tokens stand for."""

    def add(self, shard: Shard, chosen: np.ndarray) -> None:
        self.documents += int(chosen.sum())
        self.tokens += int(shard.lengths[chosen].sum())
        self.bytes += int(shard.text_bytes[chosen].sum())
        if self.targets is not None:
            self.targets += int(shard.is_target[np.repeat(chosen, shard.lengths)].sum())

    def facts(self) -> dict[str, int]:
        """What the manifest says."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        if said.pop("unknown_bytes"):
            said.pop("bytes")
        return said

    @property
    def told(self) -> str:
        """What a line says."""
        size = "" if self.unknown_bytes else f", {self.bytes:,} bytes"
        return f"{self.documents:,} documents, {self.tokens:,} tokens{size}"

    @property
    def share_learnt(self) -> str:
        if self.targets is None:
            return ""
        share = self.targets / max(self.tokens, 1)
        return f", {self.targets:,} of the tokens learnt ({share:.1%})"


class TokenFile:
    """NAME.bin and NAME.idx in megatron-core's indexed format, a sequence for every document."""

    def __init__(self, path: Path, dtype: Any):
        self.path = path
        self.dtype = np.dtype(dtype)
        self._file = path.open("wb")
        self._lengths: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """The next documents: their tokens joined, and how many are whose."""
        self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.append(lengths.astype(np.int32))

    def close(self) -> None:
        """Write the index."""
        self._file.close()
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        with self.path.with_suffix(".idx").open("wb") as index:
            index.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, _CODES[self.dtype]))
            index.write(struct.pack("<QQ", len(lengths), len(lengths) + 1))
            index.write(lengths.data)
            index.write(np.concatenate(([0], ends[:-1])).astype(np.int64)[: len(lengths)].data)
            index.write(np.arange(len(lengths) + 1, dtype=np.int64).data)


class HeldOutBytes:
    """Writes how many bytes of text every held-out token stands for, unless each stands for what it
    spells.
    """

    def __init__(self, path: Path, spelled: np.ndarray):
        self.path = path
        self.spelled = spelled
        self.file = path.open("wb")
        self.needed = False

    def add(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """The next tokens and their bytes, both [tokens]."""
        self.needed = self.needed or not np.array_equal(counts, self.spelled[ids])
        self.file.write(counts.astype(np.uint32).tobytes())

    def close(self) -> None:
        self.file.close()
        if not self.needed:
            self.path.unlink()


class Marks:
    """Writes which tokens of a split are learnt, where only some are."""

    def __init__(self, folder: Path, split: str, needed: bool):
        self.file = (folder / targets_file(split)).open("wb") if needed else None

    def add(self, shard: Shard, chosen: np.ndarray) -> None:
        """
        Args:
            chosen: [tokens of the shard] bool.
        """
        if self.file is not None:
            self.file.write(shard.is_target[chosen].astype(np.uint8).tobytes())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


@dataclass(frozen=True)
class HeldOut:
    """Which documents are held out. By content, so duplicates never stand on both sides of the
    split.
    """

    below: float
    """Those with smaller keys; where there is none, those with the smallest."""
    smallest: int | None = None
    of_validation: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """Keys of the documents of validation sources, sorted: those are not trained on."""

    @classmethod
    def of(
        cls,
        keys: Iterable[np.ndarray],
        fraction: float,
        validation_keys: Iterable[np.ndarray] = (),
    ) -> HeldOut:
        """
        Args:
            keys: of all documents of the training sources, some at a time; validation_keys: of the
                validation sources.

        Raises:
            ValueError: there are fewer than two different documents, so none can be held out.
        """
        below = fraction * 2**64
        of_validation = np.unique(np.concatenate([np.empty(0, np.uint64), *validation_keys]))
        if len(of_validation):
            return cls(below, None, of_validation)

        smallest, largest = 2**64, -1
        for some in keys:
            if not len(some):  # nothing can be learnt from a whole shard of conversations
                continue
            smallest, largest = min(smallest, int(some.min())), max(largest, int(some.max()))
        if smallest >= largest:
            raise ValueError(
                "the data holds fewer than two different documents, so none can be held out; give "
                "more text, or split it finer (sample_by=paragraph for text files)"
            )
        return cls(below, None if smallest < below else smallest)

    def among(self, keys: np.ndarray) -> np.ndarray:
        """[documents] bool."""
        if self.smallest is not None:
            is_smallest: np.ndarray = keys == np.uint64(self.smallest)
            return is_smallest
        # Python's numbers compare exactly; numpy would make floats of keys.
        return np.fromiter((int(key) < self.below for key in keys), dtype=bool, count=len(keys))


@dataclass
class Assembly:
    """The files of a store in the making."""

    folder: Path
    dtype: Any
    spelled: np.ndarray
    """[vocab_size] int32: bytes that each token spells; 0 where nobody knows it of any."""
    held_out: HeldOut
    end_of_document: int
    tokens_spell: bool = True
    """Whether that is exact, whatever stands before a token."""
    chat: bool = False
    """Whether documents are conversations."""
    by_source: list[Counts] = field(default_factory=list)
    """What every source adds to the held-out documents, in the order of the sources."""
    dropped: int = 0
    """Documents of training sources that are validation text too."""

    def __post_init__(self) -> None:
        self.unigrams = np.zeros(len(self.spelled), dtype=np.int64)
        self._content = hashlib.sha256()
        self._validation = TokenFile(self.folder / "validation.bin", self.dtype)
        self._bytes = HeldOutBytes(self.folder / HELD_OUT_BYTES, self.spelled)
        self._marks = Marks(self.folder, "validation", self.chat)
        self.validation = self._counts()

    def add_source(self, source: int, parts: Parts, shards: int) -> Counts:
        """Write train_<source> and what of it is held out; returns the counts of the former."""
        counts, held = self._counts(), self._counts()
        marks = Marks(self.folder, f"train_{source}", self.chat)
        train = TokenFile(self.folder / f"train_{source}.bin", self.dtype)
        for number in range(shards):
            shard = self._without_validation(parts.read(source, number))
            is_held_out = self.held_out.among(shard.keys)
            counts.add(shard, ~is_held_out)

            of_held_out = np.repeat(is_held_out, shard.lengths)
            train.add(shard.tokens[~of_held_out], shard.lengths[~is_held_out])
            marks.add(shard, ~of_held_out)
            self._add_held_out(shard, is_held_out, held)
        train.close()
        marks.close()
        self.by_source.append(held)
        return counts

    def add_validation(self, source: int, parts: Parts, shards: int) -> Counts:
        """All documents of a validation source are held out."""
        held = self._counts()
        for number in range(shards):
            shard = parts.read(source, number)
            self._add_held_out(shard, np.ones(len(shard.lengths), dtype=bool), held)
        self.by_source.append(held)
        return held

    def add_tokens(
        self, source: int, parts: Parts, shards: int, files: list[IdFile]
    ) -> tuple[Counts, list[dict[str, Any]]]:
        """Of a source that is tokens already: what its training documents are and where, and a copy
        of what is held out. Returns their counts, and what the manifest says of the files.
        """
        counts, held = self._counts(), self._counts()
        counts.unknown_bytes = not self.tokens_spell
        placed = PlaceFiles(self.folder, source)
        for number in range(shards):
            read = parts.read_range(source, number)
            is_one = read.lengths > read.has_end
            is_validation = np.isin(read.keys, self.held_out.of_validation)
            self.dropped += int((is_one & is_validation).sum())
            is_one &= ~is_validation
            is_held_out = is_one & self.held_out.among(read.keys)

            trained = is_one & ~is_held_out
            lengths = placed.add(read, trained)
            counts.documents += len(lengths)
            counts.tokens += int(lengths.sum())
            counts.bytes += int(read.text_bytes[trained].sum())
            self._hold_out_tokens(read, is_held_out, files, held)
        self.by_source.append(held)
        return counts, placed.close(files)

    def add_validation_tokens(
        self, source: int, parts: Parts, shards: int, files: list[IdFile]
    ) -> Counts:
        """All documents of a validation source that is tokens already."""
        held = self._counts()
        for number in range(shards):
            read = parts.read_range(source, number)
            self._hold_out_tokens(read, read.lengths > read.has_end, files, held)
        self.by_source.append(held)
        return held

    def _hold_out_tokens(
        self, read: ReadRange, chosen: np.ndarray, files: list[IdFile], held: Counts
    ) -> None:
        """Copy documents of a range; all of the range goes into the hash."""
        self._content.update(read.hashed.tobytes() + chosen.tobytes())
        if not chosen.any():
            return
        ids = files[int(read.of_file[0])].ids()
        documents = []
        for start, length, has_end in zip(
            read.starts[chosen], read.lengths[chosen], read.has_end[chosen], strict=True
        ):
            documents.append(ids[start : start + length].astype(np.int64))
            if not has_end:
                documents.append(np.array([self.end_of_document]))
        tokens = np.concatenate(documents)
        for counts in (held, self.validation):
            counts.unknown_bytes |= not self.tokens_spell
        shard = Shard(
            tokens,
            (read.lengths + ~read.has_end)[chosen],
            read.keys[chosen],
            read.text_bytes[chosen],
            np.ones(int(chosen.sum()), dtype=bool),
            self.spelled[tokens].astype(np.uint32),
        )
        self._add_held_out(shard, shard.is_candidate, held)

    def _without_validation(self, shard: Shard) -> Shard:
        """The documents of a shard that are no validation text."""
        chosen = ~np.isin(shard.keys, self.held_out.of_validation)
        if chosen.all():
            return shard
        self.dropped += int((~chosen).sum())
        of_candidates = np.repeat(chosen[shard.is_candidate], shard.lengths[shard.is_candidate])
        return Shard(
            shard.tokens[np.repeat(chosen, shard.lengths)],
            shard.lengths[chosen],
            shard.keys[chosen],
            shard.text_bytes[chosen],
            shard.is_candidate[chosen],
            shard.token_bytes[of_candidates] if len(shard.token_bytes) else shard.token_bytes,
            shard.is_target[np.repeat(chosen, shard.lengths)] if self.chat else shard.is_target,
            shard.bad,
        )

    def _counts(self) -> Counts:
        return Counts(targets=0 if self.chat else None)

    def _add_held_out(self, shard: Shard, is_held_out: np.ndarray, held: Counts) -> None:
        """What of the shard is held out goes into the files, and all of it into the hash."""
        self._content.update(_stream(shard, is_held_out))
        if not is_held_out.any():
            return
        for counts in (held, self.validation):
            counts.add(shard, is_held_out)
        of_held_out = np.repeat(is_held_out, shard.lengths)

        # Entropy and bytes are those of the held-out text, which losses are compared with.
        tokens = shard.tokens[of_held_out].astype(np.int64)
        learnt = tokens[shard.is_target[of_held_out]] if self.chat else tokens
        self.unigrams += np.bincount(learnt, minlength=len(self.unigrams))
        self._validation.add(tokens, shard.lengths[is_held_out])

        self._marks.add(shard, of_held_out)
        if self.chat:
            return

        # bytes are there for the candidates, which are some more
        assert not np.any(is_held_out & ~shard.is_candidate)
        lengths = shard.lengths[shard.is_candidate]
        of_them = np.repeat(is_held_out[shard.is_candidate], lengths)
        self._bytes.add(tokens, shard.token_bytes[of_them])

    def close(self) -> str:
        """Finish the files; returns the hash of all tokens in the order of the corpus."""
        self._validation.close()
        self._bytes.close()
        self._marks.close()
        return self._content.hexdigest()


def _stream(shard: Shard, is_held_out: np.ndarray) -> Any:
    """What is hashed: for every document a byte, whether it is held out, and its ids as int64; of a
    conversation also which of them are learnt.
    """
    if len(shard.is_target):
        ends = np.cumsum(shard.lengths)[:-1]
        ids = np.split(shard.tokens.astype("<i8"), ends)
        marks = np.split(shard.is_target, ends)
        return b"".join(
            bytes([bool(held)]) + one.tobytes() + mark.tobytes()
            for held, one, mark in zip(is_held_out, ids, marks, strict=True)
        )
    starts = 8 * (np.cumsum(shard.lengths) - shard.lengths) + np.arange(len(shard.lengths))
    stream = np.empty(8 * len(shard.tokens) + len(starts), dtype=np.uint8)
    is_token = np.ones(len(stream), dtype=bool)
    is_token[starts] = False
    stream[starts] = is_held_out
    stream[is_token] = shard.tokens.astype("<i8").view(np.uint8)
    return stream.data
