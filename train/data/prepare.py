"""From text to a token store: train or load the tokenizer, tokenise, hold out documents, count.

A store is a folder named by the fingerprint of what it was made from:
    manifest.json        counts, fingerprint of the settings and files, hash of the tokens,
                         tokenizer facts; size and SHA-256 of the files below
    tokenizer.json       Hugging Face tokenizers format
    token_bytes.npy      bytes of text each token spells, for bits per byte
    train_<i>.bin/.idx   one per source, megatron-core's indexed format; every document ends with
                         end_of_document. Of a source that is tokens already, what tokens/place.py
                         says: they stay where they are
    validation.bin/.idx  held-out documents of all sources
    validation_bytes.bin uint32, bytes of text each held-out token stands for; only where they are
                         not what it spells
A store of tokens without a tokenizer lacks tokenizer.json and token_bytes.npy.
A store of conversations (data.format=chat) has no end_of_document in it, and
    train_<i>_targets.bin, validation_targets.bin
                         uint8, 1 for a token that is learnt
    chat_template.jinja  what made text of the messages
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import heapq
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from train.config.data import DataConfig, SourceConfig, TokenizerConfig, labels
from train.data.chat.examples import spoken
from train.data.chat.template import ChatTemplate, chat_template, template_facts
from train.data.damage import MANIFEST, seal
from train.data.shards.assemble import Assembly, HeldOut
from train.data.shards.chat import ChatEncoder
from train.data.shards.encode import Encoder, document_key
from train.data.shards.make import Progress, Shards, bad_rows_of
from train.data.shards.parts import DamagedShard, Parts, parts_beside, remove_parts
from train.data.sources import BadRows, checked_files, documents, files_of
from train.data.store import CHAT_TEMPLATE
from train.data.tokenizer import (
    LOADING_SECONDS,
    load_tokenizer,
    no_end,
    spells_exactly,
    token_bytes,
    tokenizer_file,
    tokenizers_errors,
    vocabulary_size,
)
from train.data.tokens.files import IdFile, parts_of
from train.data.worker import apart, doing, no_progress, tell
from train.files.durable import replacing
from train.files.scratch import make_folder
from train.files.strict_json import dumps

FORMAT = 1


def fingerprint(config: DataConfig) -> str:
    """Content key of a store: the config without weights and cache place, and size and time of
    every local file.
    """
    sources = []
    for source in (*config.sources, *config.validation.sources):
        facts = dataclasses.asdict(source)
        for of_the_run in ("weight", "max_epochs", "label"):
            facts.pop(of_the_run)
        files = [f for f in files_of(source) if os.path.isfile(f)]
        if source.holds_tokens:
            files = [part for file in files for part in parts_of(file)]
            facts["places"] = list(map(os.path.abspath, files))
        # a data set's own folder
        if source.data_files is None and os.path.isdir(source.path):
            files = sorted(str(p) for p in Path(source.path).rglob("*") if p.is_file())
        facts["files"] = [
            (os.path.basename(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files
        ]
        # earlier stores may hold another file's text under these names
        if any(map(glob.has_magic, files)):
            facts["literal_names"] = True
        sources.append(facts)
    tokenizer: dict[str, Any] = dataclasses.asdict(config.tokenizer)
    # as in stores that were made before these could be set
    for name in ("max_documents", "end_of_document_id"):
        if tokenizer[name] is None:
            tokenizer.pop(name)
    if config.tokenizer.path is not None:
        tokenizer["content"] = hashlib.sha256(
            tokenizer_file(config.tokenizer).read_bytes()
        ).hexdigest()
    facts_of_all = [FORMAT, sources, tokenizer, config.validation_fraction]
    # without them it is the key of stores that were made before there were any
    if config.validation.sources:
        facts_of_all.append(len(config.validation.sources))
    if config.format == "chat":
        facts_of_all += ["chat", template_facts(config), config.thinking, config.train_on]
    key = dumps(facts_of_all, sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def store_path(config: DataConfig) -> Path:
    """Of a stream that of its head."""
    config = config.head
    return Path(config.cache_dir) / fingerprint(config)


def prepare(
    config: DataConfig,
    report: Callable[[str], None] = print,
    num_workers: int | None = None,
    progress: Callable[[Progress], None] = no_progress,
) -> Path:
    """Make the store unless it exists, and return its folder. It is whole or absent at any time.
    Of a stream it is the store of its head (DataConfig.head).

    Files and tokenizer are read in processes of their own (train/data/worker.py), which end at once
    when this one is asked to stop. What they have tokenised by then is kept beside the place of the
    store (train/data/shards/parts.py), and the next call goes on from there.

    Args:
        num_workers: how many processes tokenise; None: one for every core that this one may use.
            The store does not depend on it.
        progress: is told how far it is, now and then.

    Raises:
        ValueError: the sources or the tokenizer cannot be read, or the place of the store not be
            written.
    """
    is_stream, most = config.streaming, config.stream.head_documents
    config = config.head
    final = store_path(config)

    def is_whole() -> bool:
        return (final / MANIFEST).is_file()

    if is_whole():
        return final

    # Here, or every child would import them for itself.
    import pyarrow.parquet  # noqa: F401
    import tokenizers  # noqa: F401

    workers = num_workers or len(os.sched_getaffinity(0))
    if is_stream:
        report(f"of a stream the first {most:,} documents of every source are prepared")

    def build(scratch: Path) -> None:
        apart(lambda: _fill(config, scratch, final, workers), report, progress)

    try:
        make_folder(final, build, is_whole)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir: {final.parent} cannot be written ({error.strerror}); set "
            "data.cache_dir, or LOADSTONE_DATA, to a folder that can and has room"
        ) from error
    remove_parts(final)
    return final


def _fill(config: DataConfig, folder: Path, final: Path, num_workers: int) -> None:
    """Write the store into an empty folder."""
    with parts_beside(final, folder / "parts") as parts:
        manifest = _write_store(config, folder, parts, num_workers)

    # The shards stay until the store has its name.
    (folder / MANIFEST).write_text(dumps(seal(manifest, folder), indent=2) + "\n")


def _tokenizer(config: DataConfig, parts: Parts) -> Any:
    if config.tokenizer.path is not None:
        with doing(f"reading the tokenizer {config.tokenizer.path}", LOADING_SECONDS):
            return load_tokenizer(config.tokenizer)

    from tokenizers import Tokenizer

    # Trained by a preparation that was ended: the same text gives the same tokenizer.
    if parts.tokenizer_file.is_file():
        return Tokenizer.from_file(str(parts.tokenizer_file))

    tell(f"training a byte-level BPE of {config.tokenizer.vocab_size} tokens")
    texts = _texts_of_tokenizer(config)
    with doing("training the tokenizer"):
        tokenizer = train_bpe(
            map(spoken, texts) if config.format == "chat" else texts, config.tokenizer
        )
    with replacing(parts.tokenizer_file) as scratch:
        tokenizer.save(str(scratch))
    return tokenizer


def _texts_of_tokenizer(config: DataConfig) -> Iterator[str]:
    """What a tokenizer is trained on: all documents, or those of the sample in their order.

    A sample are the documents with the smallest keys that are not held out, each once: which they
    are does not depend on the order of the sources.
    """
    most = config.tokenizer.max_documents
    if most is None:
        for source in config.sources:
            yield from _documents(source, config)
        return

    # One more than wanted: where no key is small enough, the smallest is held out.
    elsewhere = {
        document_key(text)
        for source in config.validation.sources
        for text in _documents(source, config)
    }
    keys = (document_key(text) for source in config.sources for text in _documents(source, config))
    below = config.validation_fraction * 2**64
    chosen, is_some_below = _smallest(keys, most + 1, below, elsewhere)
    taken = chosen[:most] if is_some_below or elsewhere else chosen[1:]
    if not taken:
        raise ValueError(
            "no document is left to train a tokenizer on; give more text, or hold out less"
        )

    waiting = set(taken)
    tell(f"a sample of {len(waiting):,} documents for the tokenizer")
    for source in config.sources:
        for text in _documents(source, config):
            if (key := document_key(text)) in waiting:
                waiting.remove(key)
                yield text


def _smallest(
    keys: Iterator[int], most: int, below: float, without: set[int]
) -> tuple[list[int], bool]:
    """The smallest different keys that are not below a limit, and whether some are."""
    heap: list[int] = []  # of negative keys, the largest first
    there: set[int] = set()
    is_some_below = False
    for key in keys:
        if key < below:
            is_some_below = True
        elif key in there or key in without or (len(heap) == most and -key < heap[0]):
            continue
        else:
            heapq.heappush(heap, -key)
            there.add(key)
            if len(heap) > most:
                there.remove(-heapq.heappop(heap))
    return sorted(-key for key in heap), is_some_below


def _write_store(
    config: DataConfig, folder: Path, parts: Parts, num_workers: int
) -> dict[str, Any]:
    # A mistake in the last source must not be found after hours with the first.
    for source in (*config.sources, *config.validation.sources):
        checked_files(source)

    encoder = _encoder(config, folder, parts) if config.has_tokenizer else _of_ids(config)
    template = _template(config, folder)
    if template is not None:
        encoder = ChatEncoder(encoder, template, config.train_on)

    # Each shard is made once, by whoever is free, and stays if this process is killed.
    shards = Shards(config, encoder, parts)
    counted = shards.make(num_workers)

    # What is held out is known when all are there.
    try:
        manifest = _assembled(config, folder, parts, counted, encoder, shards.id_files)
        return manifest | _chat_facts(config, template)
    except DamagedShard:
        raise
    except ValueError:  # about the documents: other ones are needed
        parts.discard()
        raise


def _encoder(config: DataConfig, folder: Path, parts: Parts) -> Encoder:
    """What tokenises text; the store keeps its tokenizer, and what every token of it spells."""
    tokenizer = _tokenizer(config, parts)
    end_of_document = tokenizer.token_to_id(config.tokenizer.end_of_document)
    if end_of_document is None:
        raise ValueError(no_end(config.tokenizer))
    # Text that spells a special token is text; what a chat template writes is meant.
    tokenizer.encode_special_tokens = config.format == "text"

    # What every token spells is worked out once and kept: bits per byte need it.
    vocab_size = vocabulary_size(tokenizer)
    about = f"the tokenizer {config.tokenizer.path or 'that was trained'}"
    with (
        doing(f"spelling the tokens of {about}", LOADING_SECONDS),
        tokenizers_errors(f"{about} cannot spell its tokens"),
    ):
        spelled = token_bytes(tokenizer)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    tokenizer.post_processor = None  # it adds nothing here, and may move offsets
    np.save(folder / "token_bytes.npy", spelled)

    below = config.validation_fraction * 2**64
    return Encoder(tokenizer, about, end_of_document, spelled, _dtype(vocab_size), below)


def _of_ids(config: DataConfig) -> Encoder:
    """The facts of a vocabulary without a tokenizer, for sources that need none."""
    end, vocab_size = config.tokenizer.end_of_document_id, config.tokenizer.vocab_size
    assert end is not None
    spelled = np.zeros(vocab_size, dtype=np.int32)
    below = config.validation_fraction * 2**64
    return Encoder(None, "no tokenizer", end, spelled, _dtype(vocab_size), below)


def _dtype(vocab_size: int) -> Any:
    """Of tokens, as megatron-core chooses it."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def _assembled(
    config: DataConfig,
    folder: Path,
    parts: Parts,
    counted: list[tuple[int, BadRows]],
    encoder: Encoder,
    id_files: dict[int, list[IdFile]],
) -> dict[str, Any]:
    """Write the files of the store from its shards; returns the manifest.

    Args:
        counted: of every source how many shards it has, and its bad rows; id_files: of sources that
            are tokens already.
    """

    def keys(first: int, last: int) -> Iterator[np.ndarray]:
        for source in range(first, last):
            for number in range(counted[source][0]):
                yield parts.keys(source, number)

    num_sources = len(config.sources)
    held_out = HeldOut.of(
        keys(0, num_sources), config.validation_fraction, keys(num_sources, len(counted))
    )
    chat = config.format == "chat"
    spells = encoder.tokenizer is not None and spells_exactly(encoder.tokenizer)
    assembly = Assembly(
        folder, encoder.dtype, encoder.spelled, held_out, encoder.end_of_document, spells, chat
    )

    sources = []
    names = labels((*config.sources, *config.validation.sources))
    for i, source in enumerate(config.sources):
        num_shards, bad_rows = counted[i]
        places: dict[str, Any] = {}
        if i in id_files:
            counts, places["files"] = assembly.add_tokens(i, parts, num_shards, id_files[i])
        else:
            counts = assembly.add_source(i, parts, num_shards)
        if not counts.documents:
            raise ValueError(
                f"source {names[i]!r} left no training document; lower data.validation_fraction "
                f"{config.validation_fraction} or give more text"
            )
        tell(f"source {names[i]}: {counts.told}{counts.share_learnt}")
        if bad_rows.count:
            tell(f"source {names[i]}: left out {bad_rows}{bad_rows.by_kind}")
        sources.append(
            {
                "path": source.path,
                **counts.facts(),
                "bad_rows": bad_rows.count,
                "bad_rows_by_reason": bad_rows.reasons,
                **places,
            }
        )

    for i in range(num_sources, len(counted)):
        num_shards, bad_rows = counted[i]
        if i in id_files:
            counts = assembly.add_validation_tokens(i, parts, num_shards, id_files[i])
        else:
            counts = assembly.add_validation(i, parts, num_shards)
        if not counts.documents:
            raise ValueError(f"validation source {names[i]!r} holds no document")
        tell(f"validation source {names[i]}: {counts.documents:,} documents")
        if bad_rows.count:
            tell(f"validation source {names[i]}: left out {bad_rows}{bad_rows.by_kind}")
    if assembly.dropped:
        tell(f"left out of training, for being validation text: {assembly.dropped:,} documents")

    content = assembly.close()
    validation = assembly.validation
    entropy = unigram_entropy(assembly.unigrams)
    held = [counts.documents for counts in assembly.by_source]
    shares = ", ".join(f"{n:,} of {name}" for name, n in zip(names, held, strict=True))
    tell(
        f"held out: {validation.documents:,} documents{f' ({shares})' if len(held) > 1 else ''}, "
        f"{validation.tokens:,} tokens{validation.share_learnt}; unigram entropy {entropy:.4f} "
        "nats per token"
    )
    for name, number in zip(names[:num_sources], held, strict=False):
        if not number and config.validation_fraction > 0:
            tell(
                f"source {name} holds nothing out, so the held-out loss says nothing of it: raise "
                f"data.validation_fraction ({config.validation_fraction:g}), or name text of its "
                "kind in data.validation.sources"
            )
    return {
        "format": FORMAT,
        "fingerprint": fingerprint(config),
        "content": content,
        "vocab_size": len(encoder.spelled),
        "end_of_document": encoder.end_of_document,
        "token_dtype": encoder.dtype.name,
        "sources": sources,
        "validation": {
            **validation.facts(),
            "sources": [counts.facts() for counts in assembly.by_source],
        },
        "unigram_entropy": entropy,
        **({} if held_out.smallest is None else {"held_out_key": str(held_out.smallest)}),
    }


def _template(config: DataConfig, folder: Path) -> ChatTemplate | None:
    """What makes text of conversations; a store keeps it."""
    if config.format == "text":
        return None
    with doing("reading the chat template", LOADING_SECONDS):
        template = chat_template(config)
    (folder / CHAT_TEMPLATE).write_text(template.source, encoding="utf-8")
    tell(f"conversations are written out by {template.where}")
    return template


def _chat_facts(config: DataConfig, template: ChatTemplate | None) -> dict[str, Any]:
    """What the manifest says of conversations."""
    if template is None:
        return {}
    return {"chat": {"template": template.where, "train_on": config.train_on}}


def _documents(source: SourceConfig, config: DataConfig) -> Iterator[str]:
    return documents(source, bad_rows_of(source, config), config.format == "chat")


def train_bpe(texts: Iterator[str], config: TokenizerConfig) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[config.end_of_document],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the empirical token distribution: no model that ignores context does
    better on this text.
    """
    total = counts.sum()
    shares = counts[counts > 0] / max(total, 1)
    return float(-(shares * np.log(shares)).sum()) if total else math.nan
