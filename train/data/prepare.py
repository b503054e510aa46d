"""From text to a token store: train or load the tokenizer, tokenise, hold out documents, count.

A store is a folder named by the fingerprint of what it was made from:
    manifest.json        counts, fingerprint of the settings and files, hash of the tokens, tokenizer facts; size and
                         SHA-256 of the files below
    tokenizer.json       Hugging Face tokenizers format
    token_bytes.npy      bytes of text each token spells, for bits per byte
    train_<i>.bin/.idx   one per source, megatron-core's indexed format; every document ends with end_of_document
    validation.bin/.idx  held-out documents of all sources
    validation_bytes.bin uint32, bytes of text each held-out token stands for; only where they are not what it spells
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.config import DataConfig, SourceConfig, TokenizerConfig
from train.data.damage import seal
from train.data.sources import BadRows, documents, files_of
from train.data.store import HELD_OUT_BYTES
from train.data.tokenizer import encoded_bytes, load_tokenizer, no_end, token_bytes, tokenizer_file, vocabulary_size
from train.strict_json import dumps

FORMAT = 1
BATCH_DOCUMENTS = 256


def fingerprint(config: DataConfig) -> str:
    """Content key of a store: the config without weights and cache place, and size and time of every local file."""
    sources = []
    for source in config.sources:
        facts = dataclasses.asdict(source)
        facts.pop("weight")
        files = [f for f in files_of(source) if os.path.isfile(f)]
        if source.data_files is None and os.path.isdir(source.path):  # a data set's own folder
            files = sorted(str(p) for p in Path(source.path).rglob("*") if p.is_file())
        facts["files"] = [(os.path.basename(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
        if any(map(glob.has_magic, files)):  # earlier stores may hold another file's text under these names
            facts["literal_names"] = True
        sources.append(facts)
    tokenizer: dict[str, Any] = dataclasses.asdict(config.tokenizer)
    if config.tokenizer.path is not None:
        tokenizer["content"] = hashlib.sha256(tokenizer_file(config.tokenizer).read_bytes()).hexdigest()
    key = dumps([FORMAT, sources, tokenizer, config.validation_fraction], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def store_path(config: DataConfig) -> Path:
    return Path(config.cache_dir) / fingerprint(config)


def prepare(config: DataConfig, report: Callable[[str], None] = print) -> Path:
    """Make the store unless it exists; returns its folder. Written beside and renamed, so it is whole or absent."""
    final = store_path(config)
    if (final / "manifest.json").is_file():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        manifest = seal(_write_store(config, scratch, report), scratch)
        (scratch / "manifest.json").write_text(dumps(manifest, indent=2) + "\n")
        if final.exists():  # an incomplete folder of the same name
            shutil.rmtree(final)
        try:
            scratch.rename(final)
        except OSError:  # another process finished first
            if not (final / "manifest.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def _write_store(config: DataConfig, folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    if config.tokenizer.path is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        report(f"training a byte-level BPE of {config.tokenizer.vocab_size} tokens")
        texts = (text for source in config.sources for text in _documents(source, config))
        tokenizer = train_bpe(texts, config.tokenizer)
    end_of_document = tokenizer.token_to_id(config.tokenizer.end_of_document)
    if end_of_document is None:
        raise ValueError(no_end(config.tokenizer))
    tokenizer.encode_special_tokens = True  # text that spells a special token is text
    vocab_size = vocabulary_size(tokenizer)
    spelled = token_bytes(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.post_processor = None  # it adds nothing here, and may move offsets
    np.save(folder / "token_bytes.npy", spelled)

    dtype = DType.optimal_dtype(vocab_size)
    unigrams = np.zeros(vocab_size, dtype=np.int64)
    validation = IndexedDatasetBuilder(str(folder / "validation.bin"), dtype=dtype)
    held_out = {"documents": 0, "tokens": 0, "bytes": 0}
    held_out_keys = _held_out_keys((t for s in config.sources for t in _documents(s, config)), config.validation_fraction)
    sources = []
    content = hashlib.sha256()
    held_out_bytes = HeldOutBytes(folder / HELD_OUT_BYTES, spelled)
    ids: np.ndarray
    for i, source in enumerate(config.sources):
        train = IndexedDatasetBuilder(str(folder / f"train_{i}.bin"), dtype=dtype)
        counts = {"path": source.path, "documents": 0, "tokens": 0, "bytes": 0}
        bad_rows = BadRows(source, config.max_bad_rows)
        for text, encoded in _encode(documents(source, bad_rows), tokenizer):
            ids = np.append(encoded.ids, end_of_document).astype(np.int64)
            is_held_out = _document_key(text) in held_out_keys
            target, count = (validation, held_out) if is_held_out else (train, counts)
            target.add_document(torch.from_numpy(ids), [len(ids)])
            content.update(bytes([is_held_out]) + ids.tobytes())
            count["documents"] += 1  # type: ignore[operator]
            count["tokens"] += len(ids)  # type: ignore[operator]
            count["bytes"] += len(text.encode())  # type: ignore[operator]
            if is_held_out:
                unigrams += np.bincount(ids, minlength=vocab_size)
                held_out_bytes.add(ids, encoded_bytes(text, encoded, spelled))
        if not counts["documents"]:
            raise ValueError(f"source {source.path!r} left no training document; lower data.validation_fraction "
                             f"{config.validation_fraction} or give more text")
        train.finalize(str(folder / f"train_{i}.idx"))
        report(f"source {source.path}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
               f"{counts['bytes']:,} bytes")
        if bad_rows.count:
            report(f"source {source.path}: left out {bad_rows}")
        counts["bad_rows"] = bad_rows.count
        sources.append(counts)
    validation.finalize(str(folder / "validation.idx"))
    held_out_bytes.close()
    entropy = unigram_entropy(unigrams)
    report(f"held out: {held_out['documents']:,} documents, {held_out['tokens']:,} tokens; unigram entropy "
           f"{entropy:.4f} nats per token")
    return {"format": FORMAT, "fingerprint": fingerprint(config), "content": content.hexdigest(), "vocab_size": vocab_size,
            "end_of_document": end_of_document, "token_dtype": np.dtype(dtype).name, "sources": sources,
            "validation": held_out, "unigram_entropy": entropy}


def _encode(texts: Iterator[str], tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """Documents with their encodings, which know the tokens and where they stand in the text."""
    while batch := list(islice(texts, BATCH_DOCUMENTS)):
        yield from zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True)


class HeldOutBytes:
    """Writes how many bytes of text every held-out token stands for, unless each stands for what it spells."""

    def __init__(self, path: Path, spelled: np.ndarray):
        self.path, self.spelled, self.file = path, spelled, path.open("wb")
        self.needed = False

    def add(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """The next document: token ids and bytes, both [tokens of the document]."""
        self.needed = self.needed or not np.array_equal(counts, self.spelled[ids])
        self.file.write(counts.astype(np.uint32).tobytes())

    def close(self) -> None:
        self.file.close()
        if not self.needed:
            self.path.unlink()


def _document_key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _held_out_keys(texts: Iterator[str], fraction: float) -> set[int]:
    """Keys of the held-out documents of all sources. By content, so duplicates never stand on both sides of the split.

    Raises:
        ValueError: there are fewer than two different documents, so none can be held out.
    """
    chosen: set[int] = set()
    smallest, different = 2**64, 0
    for key in map(_document_key, texts):
        if key < fraction * 2**64:
            chosen.add(key)
        different += key != smallest
        smallest = min(smallest, key)
    if different < 2:
        raise ValueError("the data holds fewer than two different documents, so none can be held out; give more text, or "
                         "split it finer (sample_by=paragraph for text files)")
    return chosen or {smallest}


def _documents(source: SourceConfig, config: DataConfig) -> Iterator[str]:
    return documents(source, BadRows(source, config.max_bad_rows))


def train_bpe(texts: Iterator[str], config: TokenizerConfig) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=[config.end_of_document], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the empirical token distribution: no model that ignores context does better on this text."""
    total = counts.sum()
    shares = counts[counts > 0] / max(total, 1)
    return float(-(shares * np.log(shares)).sum()) if total else math.nan
