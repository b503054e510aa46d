"""Reading stores of conversations: which conversations are training sample i, and which held-out
row i.

The order is a pure function of (store, seed, seq_len, too_long, weights, i), as that of text: every
epoch of a source is shuffled with its own seed and packed; sources are blended as those of text.
All ranks work it out by themselves, and nothing of it is written.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from train.config.data import DataConfig, labels
from train.data.chat.packing import pack_epoch
from train.data.damage import MANIFEST, Numbers, Tokens, check_file, check_split, damaged
from train.data.store import TokenStore, TrainingSamples, ValidationRows, targets_file

TooLong = Literal["refuse", "cut"]


@dataclass(frozen=True)
class Conversations:
    """The conversations of a row, one after another. Of each the last token is only a target."""

    seq_len: int
    ids: tuple[np.ndarray, ...]
    """Of each [tokens] int64."""
    is_target: tuple[np.ndarray, ...]
    """Of each [tokens] bool."""

    @property
    def starts(self) -> np.ndarray:
        """[conversations] int64: where each begins in the row."""
        lengths = [len(ids) - 1 for ids in self.ids]
        return np.cumsum([0, *lengths])[: len(lengths)]

    def inputs(self, filler: int) -> np.ndarray:
        """[seq_len] int64: what the model reads, filled up."""
        row = np.full(self.seq_len, filler, dtype=np.int64)
        for start, ids in zip(self.starts, self.ids, strict=True):
            row[start : start + len(ids) - 1] = ids[:-1]
        return row


class _Split:
    """The conversations of one split of a store, as they are cut for a length of rows."""

    def __init__(
        self,
        store: TokenStore,
        split: str,
        tokens: int,
        seq_len: int,
        too_long: TooLong,
        about: str,
    ):
        self.seq_len = seq_len
        dtype = check_split(store.path, split, tokens, store.manifest)
        self._tokens = Tokens(store.path / f"{split}.bin", dtype, store.manifest)
        marks = check_file(store.path, targets_file(split), store.manifest)
        if marks.stat().st_size != tokens:
            raise damaged(marks, f"has {marks.stat().st_size} bytes instead of {tokens}")
        self._marks = Numbers(marks, np.uint8, store.manifest)

        stored = _stored_lengths(store, split)
        self.begins = np.concatenate(([0], np.cumsum(stored)))[: len(stored)]
        too_many = stored - 1 > seq_len
        if too_long == "refuse" and too_many.any():
            raise ValueError(
                f"{int(too_many.sum()):,} of {len(stored):,} conversations of {about} do not fit "
                f"train.seq_len {seq_len}: the longest, number {int(stored.argmax())}, needs "
                f"{int(stored.max()) - 1}; raise train.seq_len, or set data.too_long=cut"
            )
        self.stored = np.minimum(stored, seq_len + 1)
        self.num_cut = int(too_many.sum())

        # Of a cut one nothing may be left to learn.
        self.num_left_out = 0
        for i in np.flatnonzero(too_many):
            if not self.is_target(int(i)).any():
                self.stored[i] = 1
                self.num_left_out += 1
        if not (self.lengths > 0).any():
            raise ValueError(
                f"no conversation of {about} has a token to learn within train.seq_len "
                f"{seq_len}; raise train.seq_len"
            )

    @property
    def lengths(self) -> np.ndarray:
        """[conversations] int64: places that each takes in a row; 0: it is left out."""
        lengths: np.ndarray = self.stored - 1
        return lengths

    def _part(self, i: int) -> slice:
        return slice(int(self.begins[i]), int(self.begins[i] + self.stored[i]))

    def ids(self, i: int) -> np.ndarray:
        return np.asarray(self._tokens[self._part(i)], dtype=np.int64)

    def is_target(self, i: int) -> np.ndarray:
        return np.asarray(self._marks[self._part(i)], dtype=bool)

    def row(self, which: np.ndarray) -> Conversations:
        return Conversations(
            self.seq_len,
            tuple(self.ids(int(i)) for i in which),
            tuple(self.is_target(int(i)) for i in which),
        )


def _stored_lengths(store: TokenStore, split: str) -> np.ndarray:
    """[conversations] int64: their tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    # A copy: megatron-core's own is unmapped with the data set.
    index = IndexedDataset(str(store.path / split))
    return np.array(index.sequence_lengths, dtype=np.int64)


class _SourceRows:
    """One source: its rows, epoch after epoch. Epochs differ in how many they have."""

    def __init__(
        self,
        store: TokenStore,
        source: int,
        seq_len: int,
        seed: int,
        too_long: TooLong,
        name: str | None,
    ):
        facts = store.manifest["sources"][source]
        self.about = f"source {name or facts.get('path', source)}"
        self.split = _Split(
            store, f"train_{source}", facts["tokens"], seq_len, too_long, self.about
        )
        self.seed, self.source = seed, source
        self._begins = [0]
        self._epoch = functools.lru_cache(maxsize=2)(self._packed)

    def _packed(self, epoch: int) -> list[np.ndarray]:
        # The generator whose stream numpy has promised never to change: an order outlives versions.
        generator = np.random.RandomState((self.seed + 7919 * epoch + 104729 * self.source) % 2**32)
        return pack_epoch(self.split.lengths, self.split.seq_len, generator)

    def rows_of_epoch(self, epoch: int) -> int:
        return len(self._epoch(epoch))

    def conversations(self, index: int) -> Conversations:
        """Row `index`, counted over all epochs."""
        while self._begins[-1] <= index:
            self._begins.append(self._begins[-1] + self.rows_of_epoch(len(self._begins) - 1))
        epoch = int(np.searchsorted(self._begins, index, side="right")) - 1
        return self.split.row(self._epoch(epoch)[index - self._begins[epoch]])


class ChatSamples(TrainingSamples):
    """All sources, blended by weight. Sample i is a row of conversations.

    Args:
        names: of the sources, in messages; (): their kinds of files.
    """

    def __init__(
        self,
        store: TokenStore,
        weights: tuple[float, ...],
        seq_len: int,
        seed: int,
        too_long: TooLong,
        names: Sequence[str] = (),
    ):
        found = len(store.manifest["sources"])
        if found != len(weights):
            raise damaged(store.path / MANIFEST, f"lists {found} sources instead of {len(weights)}")
        self.store, self.seq_len = store, seq_len
        self.rows = [
            _SourceRows(store, i, seq_len, seed, too_long, names[i] if names else None)
            for i in range(found)
        ]
        self.begin_blend(weights)

    def samples_in(self, source: int, epochs: float) -> int:
        whole = int(epochs)
        rows = [self.rows[source].rows_of_epoch(epoch) for epoch in range(whole + 1)]
        return sum(rows[:whole]) + int((epochs - whole) * rows[whole])

    def open(self, start: int, stop: int) -> None:
        """Nothing: rows are worked out where they are read."""

    def row(self, index: int) -> Conversations:
        source, within = self._locate(index)
        return self.rows[source].conversations(within)

    def tokens(self, index: int) -> np.ndarray:
        """[seq_len] int64: what the model reads."""
        return self.row(index).inputs(self.store.end_of_document)

    def description(self) -> list[str]:
        """How the conversations fill the rows of an epoch, and what became of those too long."""
        lines = []
        for rows in self.rows:
            split = rows.split
            number, places = rows.rows_of_epoch(0), int(split.lengths.sum())
            cut = ""
            if split.num_cut:
                cut = (
                    f"; {split.num_cut:,} cut to train.seq_len, of which {split.num_left_out:,} "
                    "left out, for nothing to learn was left"
                )
            kept = int((split.lengths > 0).sum())
            lines.append(
                f"{rows.about}: {kept:,} conversations in {number:,} rows an epoch, "
                f"{places / (number * split.seq_len):.1%} full{cut}"
            )
        return lines


def samples_of(
    store: TokenStore, data: DataConfig, seq_len: int, seed: int, run_data: Path | None = None
) -> TrainingSamples:
    """The training rows of a store, of conversations or of text, before they are mixed.

    Args:
        run_data: as of TrainingSamples.
    """
    weights = tuple(source.weight for source in data.sources)
    if store.holds_conversations:
        return ChatSamples(store, weights, seq_len, seed, data.too_long, labels(data.sources))
    return TrainingSamples(store, weights, seq_len, seed, run_data, labels(data.sources))


class ChatValidationRows(ValidationRows):
    """The held-out conversations, packed in their own order."""

    def __init__(self, store: TokenStore, seq_len: int, too_long: TooLong):
        held_out = store.manifest.get("validation")
        if held_out is None:
            raise damaged(store.path / MANIFEST, "says nothing of held-out documents")
        self.num_tokens: int = held_out["tokens"]
        self.seq_len, self.filler = seq_len, store.end_of_document
        self._rows: list[np.ndarray] = []
        if self.num_tokens:
            self._split = _Split(
                store, "validation", self.num_tokens, seq_len, too_long, "those held out"
            )
            self._rows = pack_epoch(self._split.lengths, seq_len, None)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def by_source(self) -> dict[int, ValidationRows]:
        """Nothing: conversations of several sources share rows."""
        return {}

    def row(self, row: int) -> Conversations:
        return self._split.row(self._rows[row])

    def tokens(self, row: int) -> np.ndarray:
        """[tokens] int64: all of a row, without filler."""
        return np.concatenate(self.row(row).ids)

    def num_bytes(self, row: int) -> None:
        """None: bytes_problem says why."""

    @property
    def bytes_problem(self) -> str | None:
        return (
            "bits_per_byte is left out: it compares models on text, and of conversations only the "
            "answers are predicted"
        )
