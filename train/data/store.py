"""Reading token stores: which tokens are training sample i, and which are held-out row i.

Training order is a pure function of (store, seed, seq_len, weights, i): every epoch of a source is shuffled by
megatron-core's GPTDataset with its own seed, and sources are blended by megatron-core's error-minimising sequence,
whose beginning does not depend on its length. So a run can be continued, extended or split over other ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

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

HELD_OUT_BYTES = "validation_bytes.bin"
"""Present where held-out tokens do not stand for what they spell."""
CHUNK_TOKENS = 2**20
"""Tokens of a split that are looked at together."""

class TokenStore:
    """A prepared folder (train/data/prepare.py), or the part of it that a run keeps in RUN/data.

    Opening reads the manifest; every other file is verified where it is opened for reading.

    Raises:
        ValueError: from every method, when a file is damaged; names the file, what is wrong and the fix.
    """

    def __init__(self, path: Path):
        self.path = path
        self.manifest = read_manifest(path)
        self.vocab_size: int = self.manifest["vocab_size"]
        self.end_of_document: int = self.manifest["end_of_document"]
        self.unigram_entropy: float = self.manifest["unigram_entropy"]

    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        path = check_file(self.path, "tokenizer.json", self.manifest)
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise damaged(path, f"cannot be read ({error})") from error

    def token_bytes(self) -> np.ndarray:
        """[vocab_size] int32: bytes of text each token spells."""
        path = check_file(self.path, "token_bytes.npy", self.manifest)
        try:
            lengths = np.load(path, allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise damaged(path, f"cannot be read ({error})") from error
        if lengths.shape != (self.vocab_size,) or lengths.dtype != np.int32:
            raise damaged(path, f"holds {lengths.dtype} of shape {lengths.shape} instead of int32 of ({self.vocab_size},)")
        return lengths

    def held_out_bytes(self, tokens: Tokens) -> Callable[[slice], np.ndarray] | None:
        """A function from a part of the held-out tokens to the bytes of text that each of these stands for.

        None: not known, since an earlier version made the store and the tokens do not spell the text they stand for.

        Args:
            tokens: all held-out tokens.
        """
        if HELD_OUT_BYTES in self.manifest.get("files", {}):
            path = check_file(self.path, HELD_OUT_BYTES, self.manifest)
            if path.stat().st_size != 4 * len(tokens):
                raise damaged(path, f"has {path.stat().st_size} bytes instead of {4 * len(tokens)} for {len(tokens)} tokens")
            counts = Numbers(path, np.uint32, self.manifest)
            return lambda part: counts[part]
        spelled = self.token_bytes()
        total = sum(int(spelled[tokens[i:i + CHUNK_TOKENS]].sum()) for i in range(0, len(tokens), CHUNK_TOKENS))
        return (lambda part: spelled[tokens[part]]) if total == self.manifest["validation"].get("bytes") else None


class _SourceSamples:
    """One source: sample j is sample j % per_epoch of the shuffled epoch j // per_epoch."""

    def __init__(self, store: TokenStore, source: int, seq_len: int, seed: int):
        self.store, self.prefix = store, str(store.path / f"train_{source}")
        self.seq_len, self.seed, self.source = seq_len, seed, source
        tokens = store.manifest["sources"][source]["tokens"]
        dtype = check_split(store.path, f"train_{source}", tokens, store.manifest)
        self._tokens = Tokens(store.path / f"train_{source}.bin", dtype, store.manifest)
        self.per_epoch = (tokens - 1) // seq_len
        if self.per_epoch < 1:
            raise ValueError(f"data source {source} has {tokens} training tokens, fewer than train.seq_len {seq_len} + 1; "
                             "give more text or lower train.seq_len")
        self._epochs: dict[int, Any] = {}

    def open_epoch(self, epoch: int) -> None:
        """Collective: rank 0 writes the epoch's index, the others map it."""
        if epoch in self._epochs:
            return
        seed = (self.seed + 7919 * epoch + 104729 * self.source) % 2**32
        cache = self.store.path / "index_cache" / f"{seed}-{self.seq_len}-{self.source}-{epoch}"
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        if not distributed or dist.get_rank() == 0:
            cached_folder(cache, lambda folder: self._build(seed, folder))
        if distributed:
            dist.barrier()
        self._epochs[epoch] = self._build(seed, cache)

    def close_epochs_before(self, epoch: int) -> None:
        self._epochs = {e: d for e, d in self._epochs.items() if e >= epoch}

    def _build(self, seed: int, cache: Path) -> Any:
        """The epoch that the seed shuffles; its index is read from the folder, or written there."""
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

        store = self.store

        class _Tokenizer:  # the facts GPTDataset asks a tokenizer for
            vocab_size, eod, pad = store.vocab_size, store.end_of_document, -1
            unique_identifiers = {"store": store.manifest["fingerprint"]}  # noqa: RUF012

        # Megatron blends and splits inside its builder, which is bypassed: one store, one split, one epoch.
        config = GPTDatasetConfig(
            random_seed=seed, sequence_length=self.seq_len, blend=([self.prefix], None), split="1,0,0",
            path_to_cache=str(cache), tokenizer=_Tokenizer(), reset_position_ids=False, reset_attention_mask=False,
            eod_mask_loss=False, create_attention_mask=False)
        plain_arrays(cache)
        indexed = IndexedDataset(self.prefix)
        indexed.bin_reader = self._tokens
        return GPTDataset(indexed, self.prefix, np.arange(len(indexed), dtype=np.int32), None, Split.train, config)

    def tokens(self, index: int) -> np.ndarray:
        """[seq_len + 1] int64."""
        epoch, within = divmod(index, self.per_epoch)
        text, _ = self._epochs[epoch]._query_document_sample_shuffle_indices(within)
        return text


class TrainingSamples:
    """All sources, blended by weight. Sample i is [seq_len + 1] token ids."""

    def __init__(self, store: TokenStore, weights: tuple[float, ...], seq_len: int, seed: int):
        found = len(store.manifest["sources"])
        if found != len(weights):
            raise damaged(store.path / MANIFEST, f"lists {found} sources instead of {len(weights)}")
        for name in store.manifest.get("files", ()):
            check_file(store.path, name, store.manifest)
        self.sources = [_SourceSamples(store, i, seq_len, seed) for i in range(len(weights))]
        self.weights = np.array(weights, dtype=np.float64) / sum(weights)
        self._source_of = np.empty(0, dtype=np.int16)
        self._index_in_source = np.empty(0, dtype=np.int64)

    def _locate(self, index: int) -> tuple[int, int]:
        if len(self.sources) == 1:
            return 0, index
        if index >= len(self._source_of):
            from megatron.core.datasets import helpers_cpp

            size = max(1024, 2 * (index + 1))
            self._source_of = np.zeros(size, dtype=np.int16)
            self._index_in_source = np.zeros(size, dtype=np.int64)
            helpers_cpp.build_blending_indices(self._source_of, self._index_in_source, self.weights.tolist(),
                                               len(self.sources), size, False)
        return int(self._source_of[index]), int(self._index_in_source[index])

    def open(self, start: int, stop: int) -> None:
        """Make samples start..stop-1 readable. Collective: every rank calls it with the same range."""
        needed = set()
        for index in range(start, stop):
            source, within = self._locate(index)
            needed.add((source, within // self.sources[source].per_epoch))
        for source in {source for source, _ in needed}:
            self.sources[source].close_epochs_before(min(epoch for s, epoch in needed if s == source))
        for source, epoch in sorted(needed):
            self.sources[source].open_epoch(epoch)

    def source_of(self, index: int) -> int:
        """The source that sample `index` comes from."""
        return self._locate(index)[0]

    def tokens(self, index: int) -> np.ndarray:
        source, within = self._locate(index)
        return self.sources[source].tokens(within)


class ValidationRows:
    """The held-out documents, one after another, cut into rows; the last row is padded.

    Row i covers tokens i*seq_len .. (i+1)*seq_len, so every token but the first of the split is predicted once.
    """

    def __init__(self, store: TokenStore, seq_len: int):
        self.store, self.tokens_path = store, store.path / "validation.bin"
        held_out = store.manifest.get("validation")
        if held_out is None:
            raise damaged(store.path / MANIFEST, "says nothing of held-out documents")
        self.num_tokens: int = held_out["tokens"]
        self.seq_len = seq_len
        dtype = check_split(store.path, "validation", self.num_tokens, store.manifest)
        self._tokens = Tokens(self.tokens_path, dtype, store.manifest)

    def __len__(self) -> int:
        return max(0, -(-(self.num_tokens - 1) // self.seq_len))

    def tokens(self, row: int) -> np.ndarray:
        """[up to seq_len + 1] int64."""
        return np.asarray(self._tokens[self._slice(row)], dtype=np.int64)

    def num_bytes(self, row: int) -> np.ndarray | None:
        """[up to seq_len + 1] int64: bytes of text that each of tokens(row) stands for; None: bytes_problem says why."""
        if self._bytes is None:
            return None
        return np.asarray(self._bytes(self._slice(row)), dtype=np.int64)

    @property
    def bytes_problem(self) -> str | None:
        """Why there are no bits per byte of this split."""
        if self._bytes is not None or not self.num_tokens:
            return None
        return (f"bits_per_byte is left out: the store {self.store.path} is of an earlier version and does not say how many "
                "bytes its held-out tokens stand for; delete it, and it is made again when the run is resumed or evaluated")

    @functools.cached_property
    def _bytes(self) -> Callable[[slice], np.ndarray] | None:
        return self.store.held_out_bytes(self._tokens) if self.num_tokens else None

    def _slice(self, row: int) -> slice:
        return slice(row * self.seq_len, (row + 1) * self.seq_len + 1)
