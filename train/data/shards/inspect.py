"""What is in a corpus, before anything is made of it: documents, lengths, duplicates, scripts, and
what a tokenizer does to them.
"""

from __future__ import annotations

import heapq
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from train.config.data import DataConfig, SourceConfig, labels
from train.data.chat.examples import spoken
from train.data.shards.encode import batches, document_key
from train.data.shards.make import bad_rows_of
from train.data.sources import checked_files, placed_documents
from train.data.tokenizer import (
    LOADING_SECONDS,
    load_tokenizer,
    no_end,
    token_bytes,
    tokenizers_errors,
)
from train.data.tokens.files import id_files
from train.data.tokens.read import ranges, read_range
from train.data.worker import apart, doing

SAMPLE = 2000
"""Documents of a source that the tokenizer is tried on: those with the smallest keys."""
READ_CHARACTERS = 400
"""As many of a document's first characters tell its scripts."""
WORST = 3
"""Documents that are named for the few bytes that a token of them stands for."""
SHOWN_CHARACTERS = 60


@dataclass
class SourcePage:
    """What is known of a source."""

    label: str
    documents: int = 0
    bytes: int = 0
    """Of text in UTF-8."""
    duplicates: int = 0
    """Documents that an earlier one of any source equals."""
    bad_rows: dict[str, int] = field(default_factory=dict)
    """By kind of reason."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Characters of the shortest document, the median, and so on; of tokens their number."""
    unit: str = "characters"
    """What lengths are counted in."""
    tokens: int | None = None
    """Of a source that is tokens already."""
    scripts: dict[str, float] = field(default_factory=dict)
    """Share of the letters, in Unicode's names."""
    bytes_per_token: float | None = None
    """Of a sample, and of tokens of all; None without a tokenizer."""
    unknown_share: float | None = None
    """Tokens of the sample that stand for what the tokenizer does not know."""
    worst: list[tuple[float, str, str]] = field(default_factory=list)
    """Documents of the sample with the fewest bytes per token: how many, where, how they begin."""


def inspect(config: DataConfig, tokenizer_file: Path | None) -> list[SourcePage]:
    """A page for every source, validation sources among them. Reads each once, in a process of its
    own.

    Args:
        tokenizer_file: tried on a sample; None: there is none yet.

    Raises:
        ValueError: a source or the tokenizer cannot be read.
    """
    return apart(lambda: list(_pages(config, tokenizer_file)))


def _pages(config: DataConfig, tokenizer_file: Path | None) -> Iterator[SourcePage]:
    tokenizer = None
    if tokenizer_file is not None:
        from dataclasses import replace

        with doing(f"reading the tokenizer {tokenizer_file}", LOADING_SECONDS):
            tokenizer = load_tokenizer(replace(config.tokenizer, path=str(tokenizer_file)))
        tokenizer.encode_special_tokens = True

    seen: set[int] = set()
    sources = (*config.sources, *config.validation.sources)
    for source, label in zip(sources, labels(sources), strict=True):
        page = SourcePage(label)
        if source.holds_tokens:
            _look_at_tokens(page, source, config, tokenizer, seen)
            yield page
            continue
        # counted, and told whatever their number
        bad_rows = bad_rows_of(source, config)
        bad_rows.limit, bad_rows.fails = 1.0, False
        lengths: list[int] = []
        letters: Counter[str] = Counter()
        # the largest key of the sample first, by its negative
        sample: list[tuple[int, str, str]] = []
        is_chat = config.format == "chat"
        for row, stored in placed_documents(source, bad_rows, is_chat):
            key = document_key(stored)
            text = spoken(stored) if is_chat else stored
            page.duplicates += key in seen
            if key not in seen and (len(sample) < SAMPLE or -key > sample[0][0]):
                heapq.heappush(sample, (-key, f"{row.file} row {row.number}", text))
                if len(sample) > SAMPLE:
                    heapq.heappop(sample)
            seen.add(key)
            page.documents += 1
            page.bytes += len(text.encode())
            lengths.append(len(text))
            letters.update(map(_script, filter(str.isalpha, text[:READ_CHARACTERS])))

        page.bad_rows = bad_rows.reasons
        page.lengths = _spread(lengths)
        total = max(letters.total(), 1)
        page.scripts = {name: count / total for name, count in letters.most_common(6)}
        if tokenizer is not None and sample:
            _try(tokenizer, page, [(place, text) for _, place, text in sorted(sample)])
        yield page


def _look_at_tokens(
    page: SourcePage, source: SourceConfig, config: DataConfig, tokenizer: Any, seen: set[int]
) -> None:
    """Of a source that is tokens already; its scripts and bytes are those of a sample."""
    page.unit, page.tokens = "tokens", 0
    end, spelled = config.tokenizer.end_of_document_id, np.zeros(config.tokenizer.vocab_size, int)
    if tokenizer is not None:
        end = tokenizer.token_to_id(config.tokenizer.end_of_document)
        spelled = token_bytes(tokenizer)
    if end is None:
        raise ValueError(no_end(config.tokenizer))

    lengths: list[int] = []
    letters: Counter[str] = Counter()
    for place, found in enumerate(id_files(source, checked_files(source), end)):
        for asked in ranges(place, found):
            with doing(f"reading {found.path}"):
                read = read_range(asked, end, spelled)
            is_one = read.lengths > read.has_end
            for key in read.keys[is_one].tolist():
                page.duplicates += key in seen
                seen.add(key)
            lengths += (read.lengths - read.has_end)[is_one].tolist()
            page.documents += int(is_one.sum())
            page.tokens += int(read.lengths[is_one].sum())
            page.bytes += int(read.text_bytes.sum())
            if tokenizer is not None:
                for start in read.starts[is_one][:SAMPLE].tolist():
                    ids = found.ids()[start : start + READ_CHARACTERS].tolist()
                    text = tokenizer.decode(ids)
                    letters.update(map(_script, filter(str.isalpha, text[:READ_CHARACTERS])))
    page.lengths = _spread(lengths)
    total = max(letters.total(), 1)
    page.scripts = {name: count / total for name, count in letters.most_common(6)}
    if tokenizer is not None:
        page.bytes_per_token = page.bytes / max(page.tokens, 1)


def _spread(lengths: list[int]) -> dict[str, int]:
    if not lengths:
        return {}
    shares = {"shortest": 0, "10%": 10, "median": 50, "90%": 90, "99%": 99, "longest": 100}
    found = np.percentile(lengths, list(shares.values()), method="lower").tolist()
    return {name: int(length) for name, length in zip(shares, found, strict=True)}


@lru_cache(maxsize=2**16)
def _script(letter: str) -> str:
    """As in LATIN SMALL LETTER A; ideographs are CJK."""
    return unicodedata.name(letter, "UNNAMED").split()[0].split("-")[0].capitalize()


def _try(tokenizer: Any, page: SourcePage, sample: list[tuple[str, str]]) -> None:
    """What the tokenizer does to places and texts."""
    unknown_token = getattr(tokenizer.model, "unk_token", None)
    unknown = None if unknown_token is None else tokenizer.token_to_id(unknown_token)
    sizes: list[tuple[int, int]] = []
    num_unknown = 0
    for batch in batches(text for _, text in sample):
        with (
            doing(f"tokenising {len(batch)} documents", LOADING_SECONDS),
            tokenizers_errors(f"the tokenizer cannot encode source {page.label}"),
        ):
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for text, encoding in zip(batch, encodings, strict=True):
            ids = encoding.ids
            sizes.append((len(text.encode()), max(len(ids), 1)))
            num_unknown += ids.count(unknown) if unknown is not None else 0

    num_bytes, num_tokens = (sum(column) for column in zip(*sizes, strict=True))
    page.bytes_per_token = num_bytes / num_tokens
    page.unknown_share = num_unknown / num_tokens
    rates = [size / tokens for size, tokens in sizes]
    for i in np.argsort(rates, kind="stable")[:WORST]:
        place, text = sample[int(i)]
        page.worst.append((rates[int(i)], place, text[:SHOWN_CHARACTERS]))
