"""Reading token stores: which tokens are training sample i, and which are held-out row i.

Training order is a pure function of (store, seed, seq_len, mixture, i): every epoch of a source is
shuffled by megatron-core's GPTDataset with its own seed, and sources are blended as mixture.py
says. So a run can be continued, extended or split over other ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from train.config.data import DataConfig, no_tokenizer
from train.data.damage import (
    MANIFEST,
    Numbers,
    Tokens,
    cached_folder,
    check_file,
    check_split,
    damaged,
    plain_arrays,
    read_manifest,
)
from train.data.mixture import Blend, Mixture
from train.data.tokenizer import tokenizers_errors
from train.data.tokens.place import PlacedDocuments

HELD_OUT_BYTES = "validation_bytes.bin"
"""Present where held-out tokens do not stand for what they spell."""
CHAT_TEMPLATE = "chat_template.jinja"
"""Present in stores of conversations."""
CHUNK_TOKENS = 2**20
"""Tokens of a split that are looked at together."""


def targets_file(split: str) -> str:
    """The file that says which tokens of a split are learnt, in stores of conversations."""
    return f"{split}_targets.bin"


@dataclass(frozen=True)
class Document:
    """A document as it is stored."""

    text: str
    """What tells it from others: its text, or a conversation's messages."""
    ids: np.ndarray
    """[tokens] int64."""
    num_bytes: int
    """Bytes of its text."""
    is_target: np.ndarray | None = None
    """[tokens] bool: whether a token is learnt; None: all but the first are."""
    bytes_of_tokens: Callable[[], np.ndarray] | None = None
    """Bytes of text that each token stands for; None where nobody asks for bits per byte."""


class TokenStore:
    """A prepared folder (train/data/prepare.py), or the part of it that a run keeps in RUN/data.

    Opening reads the manifest; every other file is verified where it is opened for reading.

    Raises:
        ValueError: from every method, when a file is damaged; names the file, what is wrong and the
            fix.
    """

    def __init__(self, path: Path):
        self.path = path
        self.manifest = read_manifest(path)
        self.vocab_size: int = self.manifest["vocab_size"]
        self.end_of_document: int = self.manifest["end_of_document"]
        self.unigram_entropy: float = self.manifest["unigram_entropy"]
        self.holds_conversations = "chat" in self.manifest

    @property
    def has_tokenizer(self) -> bool:
        """Not where all sources were tokens already, and no tokenizer was given."""
        files = self.manifest.get("files")
        return files is None or "tokenizer.json" in files

    def tokenizer(self) -> Any:
        if not self.has_tokenizer:
            raise ValueError(no_tokenizer(str(self.path)))
        from tokenizers import Tokenizer

        path = check_file(self.path, "tokenizer.json", self.manifest)
        try:
            with tokenizers_errors("the library says"):
                return Tokenizer.from_file(str(path))
        except ValueError as error:
            raise damaged(path, f"cannot be read ({error})") from error

    def token_bytes(self) -> np.ndarray:
        """[vocab_size] int32: bytes of text each token spells."""
        path = check_file(self.path, "token_bytes.npy", self.manifest)
        try:
            lengths: np.ndarray = np.load(path, allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise damaged(path, f"cannot be read ({error})") from error
        if lengths.shape != (self.vocab_size,) or lengths.dtype != np.int32:
            raise damaged(
                path,
                f"holds {lengths.dtype} of shape {lengths.shape} "
                f"instead of int32 of ({self.vocab_size},)",
            )
        return lengths

    def held_out_bytes(self, tokens: Tokens) -> Callable[[slice], np.ndarray] | None:
        """A function from a part of the held-out tokens to the bytes of text that each of these
        stands for.

        None where that is not known: an earlier version made the store, and the tokens do not spell
        the text they stand for.

        Args:
            tokens: all held-out tokens.
        """
        facts = self.manifest["validation"]
        if HELD_OUT_BYTES in self.manifest.get("files", {}) and "bytes" in facts:
            path = check_file(self.path, HELD_OUT_BYTES, self.manifest)
            if path.stat().st_size != 4 * len(tokens):
                raise damaged(
                    path,
                    f"has {path.stat().st_size} bytes instead of "
                    f"{4 * len(tokens)} for {len(tokens)} tokens",
                )
            counts = Numbers(path, np.uint32, self.manifest)
            return lambda part: counts[part]

        if not self.has_tokenizer or "bytes" not in facts:
            return None

        # Stores of an earlier version lack the file: if the tokens spell as many bytes as the text
        # had, each stands for what it spells.
        spelled = self.token_bytes()
        total = sum(
            int(spelled[tokens[i : i + CHUNK_TOKENS]].sum())
            for i in range(0, len(tokens), CHUNK_TOKENS)
        )
        if total != facts["bytes"]:
            return None
        return lambda part: spelled[tokens[part]]


class _SourceSamples:
    """One source: sample j is sample j % per_epoch of the shuffled epoch j // per_epoch."""

    def __init__(
        self,
        store: TokenStore,
        source: int,
        seq_len: int,
        seed: int,
        run_data: Path | None,
        name: str | None,
    ):
        self.run_data = run_data
        self.store, self.prefix = store, str(store.path / f"train_{source}")
        self.seq_len = seq_len
        self.seed = seed
        self.source = source
        facts = store.manifest["sources"][source]
        tokens = facts["tokens"]
        self._placed = self._tokens = None
        if "files" in facts:
            self._placed = PlacedDocuments(store.path, source, store.manifest)
        else:
            dtype = check_split(store.path, f"train_{source}", tokens, store.manifest)
            self._tokens = Tokens(store.path / f"train_{source}.bin", dtype, store.manifest)
        self.per_epoch = (tokens - 1) // seq_len
        if self.per_epoch < 1:
            raise ValueError(
                f"data source {name or source} has {tokens} training tokens, fewer than "
                f"train.seq_len {seq_len} + 1; give more text or lower train.seq_len"
            )
        self._epochs: dict[int, Any] = {}

    def open_epoch(self, epoch: int) -> None:
        """Collective: rank 0 writes the epoch's index, the others map it."""
        if epoch in self._epochs:
            return
        seed = (self.seed + 7919 * epoch + 104729 * self.source) % 2**32
        name = f"{seed}-{self.seq_len}-{self.source}-{epoch}"
        if dist.is_initialized() and dist.get_world_size() > 1:
            from train.rank.runtime import from_rank_zero

            cache = from_rank_zero(lambda: self._index(seed, name))
        else:
            cache = self._index(seed, name)
        self._epochs[epoch] = self._build(seed, cache)

    def _index(self, seed: int, name: str) -> Path:
        """The folder with the index of an epoch: in the store, or in the run where the store cannot
        be written.

        Raises:
            ValueError: neither can be.
        """
        problems = []
        for place in filter(None, (self.store.path, self.run_data)):
            cache = place / "index_cache" / name
            try:
                cached_folder(cache, lambda folder: self._build(seed, folder))
            except OSError as error:
                problems.append(f"{place} ({error.strerror or error})")
            else:
                return cache
        raise ValueError(
            f"the order of the samples cannot be written to {' or to '.join(problems)}; make room "
            f"there or give write permission, or copy {self.store.path} into a folder that can be "
            "written and set data.cache_dir to it"
        )

    def close_epochs_before(self, epoch: int) -> None:
        self._epochs = {e: d for e, d in self._epochs.items() if e >= epoch}

    def _build(self, seed: int, cache: Path) -> Any:
        """The epoch that the seed shuffles. Its index is read from the folder, or written there."""
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

        store = self.store

        class _Tokenizer:  # the facts GPTDataset asks a tokenizer for
            vocab_size = store.vocab_size
            eod = store.end_of_document
            pad = -1
            unique_identifiers = {"store": store.manifest["fingerprint"]}  # noqa: RUF012

        # Megatron blends and splits inside its builder, which is bypassed: one store, one split,
        # one epoch.
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=self.seq_len,
            blend=([self.prefix], None),
            split="1,0,0",
            path_to_cache=str(cache),
            tokenizer=_Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )

        # What megatron-core has cached may be a pickle: looked at before it is read.
        plain_arrays(cache)
        indexed: Any = self._placed
        if indexed is None:
            indexed = IndexedDataset(self.prefix)
            indexed.bin_reader = self._tokens
        return GPTDataset(
            indexed, self.prefix, np.arange(len(indexed), dtype=np.int32), None, Split.train, config
        )

    def tokens(self, index: int) -> np.ndarray:
        """[seq_len + 1] int64."""
        epoch, within = divmod(index, self.per_epoch)
        text: np.ndarray
        text, _ = self._epochs[epoch]._query_document_sample_shuffle_indices(within)
        return text


MAX_LOCATED = 1 << 22
"""Samples of a mixture that are told apart by source at the start of a run: 40 MB of tables."""


class TrainingSamples:
    """All sources, blended. Sample i is [seq_len + 1] token ids.

    Args:
        run_data: RUN/data, which all ranks share: gets the order of the samples where the store is
            read-only.
        names: of the sources, in messages; (): their numbers.
    """

    def __init__(
        self,
        store: TokenStore,
        weights: tuple[float, ...],
        seq_len: int,
        seed: int,
        run_data: Path | None = None,
        names: Sequence[str] = (),
    ):
        found = len(store.manifest["sources"])
        if found != len(weights):
            raise damaged(store.path / MANIFEST, f"lists {found} sources instead of {len(weights)}")
        for name in store.manifest.get("files", ()):
            check_file(store.path, name, store.manifest)
        self.store, self.seq_len = store, seq_len
        self.sources = [
            _SourceSamples(store, i, seq_len, seed, run_data, names[i] if names else None)
            for i in range(len(weights))
        ]
        self.begin_blend(weights)

    def begin_blend(self, weights: tuple[float, ...]) -> None:
        """Blend as many sources, with these shares of the samples."""
        self._blend = Blend(Mixture(((0, weights),), (None,) * len(weights)))

    def mix(self, config: DataConfig) -> None:
        """Blend the sources as the settings of the data say."""
        tokens = [source["tokens"] for source in self.store.manifest["sources"]]
        limits = tuple(
            None if source.max_epochs is None else self.samples_in(i, source.max_epochs)
            for i, source in enumerate(config.sources)
        )
        self._blend = Blend(Mixture.of(config, tokens, limits, self.seq_len))

    def samples_in(self, source: int, epochs: float) -> int:
        """Samples of so many passes over a source."""
        return int(epochs * self.sources[source].per_epoch)

    def epochs(self, count: int) -> list[float]:
        """Passes over each source that the first `count` samples are; nothing where there are so
        many of a mixture that it would take long to say.
        """
        if count > MAX_LOCATED and not self._blend.mixture.is_one_source:
            return []
        counts = self._blend.counts(count)
        return [number / self.samples_in(i, 1) for i, number in enumerate(counts)]

    def require(self, count: int) -> None:
        """
        Raises:
            ValueError: the mixture has fewer samples.
        """
        self._locate(count - 1)

    def _locate(self, index: int) -> tuple[int, int]:
        return self._blend.locate(index)

    def open(self, start: int, stop: int) -> None:
        """Make samples start..stop-1 readable. Collective: every rank calls it with the same
        range.
        """
        needed = set()
        for index in range(start, stop):
            source, within = self._locate(index)
            needed.add((source, within // self.sources[source].per_epoch))
        for source in {source for source, _ in needed}:
            self.sources[source].close_epochs_before(
                min(epoch for s, epoch in needed if s == source)
            )
        for source, epoch in sorted(needed):
            self.sources[source].open_epoch(epoch)

    def close(self) -> None:
        """Nothing more is read."""

    def source_of(self, index: int) -> int:
        """The source that sample `index` comes from."""
        return self._locate(index)[0]

    def tokens(self, index: int) -> np.ndarray:
        source, within = self._locate(index)
        return self.sources[source].tokens(within)

    def row(self, index: int) -> Any:
        """What train.data.loader.pack makes a row of a batch of: of text, the tokens."""
        return self.tokens(index)


class ValidationRows:
    """The held-out documents, one after another, cut into rows. The last row is padded.

    Row i covers tokens i*seq_len .. (i+1)*seq_len, so every token but the first of the split is
    predicted once.

    Args:
        source: only what this source holds out, by its number among data.sources and
            data.validation.sources; see by_source.
    """

    def __init__(self, store: TokenStore, seq_len: int, source: int | None = None):
        self.store, self.tokens_path = store, store.path / "validation.bin"
        held_out = store.manifest.get("validation")
        if held_out is None:
            raise damaged(store.path / MANIFEST, "says nothing of held-out documents")
        self.num_tokens: int = held_out["tokens"]
        self.seq_len = seq_len
        dtype = check_split(store.path, "validation", self.num_tokens, store.manifest)
        self._tokens = Tokens(self.tokens_path, dtype, store.manifest)
        self._begin, self._end = 0, self.num_tokens
        if source is not None:
            sizes = [counts["tokens"] for counts in held_out["sources"]]
            self.num_tokens = sizes[source]
            self._begin = sum(sizes[:source])
            self._end = self._begin + self.num_tokens

    @functools.cached_property
    def by_source(self) -> dict[int, ValidationRows]:
        """Rows of every source that holds out some tokens to predict. Empty where there is only
        one, or the store is of a version that did not tell them apart.
        """
        facts = self.store.manifest["validation"].get("sources", ())
        sizes = [counts["tokens"] for counts in facts]
        rows = {
            i: ValidationRows(self.store, self.seq_len, i)
            for i, size in enumerate(sizes)
            if size > 1
        }
        return rows if len(rows) > 1 else {}

    def __len__(self) -> int:
        return max(0, -(-(self.num_tokens - 1) // self.seq_len))

    def tokens(self, row: int) -> np.ndarray:
        """[up to seq_len + 1] int64."""
        return np.asarray(self._tokens[self._slice(row)], dtype=np.int64)

    def row(self, row: int) -> Any:
        """What train.data.loader.pack makes a row of a batch of: of text, the tokens."""
        return self.tokens(row)

    def num_bytes(self, row: int) -> np.ndarray | None:
        """[up to seq_len + 1] int64: bytes of text that each of tokens(row) stands for; None:
        bytes_problem says why.
        """
        if self._bytes is None:
            return None
        return np.asarray(self._bytes(self._slice(row)), dtype=np.int64)

    @property
    def bytes_problem(self) -> str | None:
        """Why there are no bits per byte of this split."""
        if self._bytes is not None or not self.num_tokens:
            return None
        facts = self.store.manifest["validation"]
        if "files" in self.store.manifest and "bytes" not in facts:
            return (
                "bits_per_byte is left out: held-out text that came as tokens is known by its "
                "tokens alone, "
                + (
                    "and a token of this tokenizer does not always stand for the same bytes"
                    if self.store.has_tokenizer
                    else "and there is no tokenizer"
                )
            )
        return (
            f"bits_per_byte is left out: the store {self.store.path} is of an earlier version and "
            "does not say how many bytes its held-out tokens stand for; delete it, and it is made "
            "again when the run is resumed or evaluated"
        )

    @functools.cached_property
    def _bytes(self) -> Callable[[slice], np.ndarray] | None:
        return self.store.held_out_bytes(self._tokens) if self.num_tokens else None

    def _slice(self, row: int) -> slice:
        start = self._begin + row * self.seq_len
        return slice(start, min(start + self.seq_len + 1, self._end))
