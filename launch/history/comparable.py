"""Whether losses of several runs may be held against each other: a loss is per token of a
tokenizer, on a text, in rows of a length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measure:
    """What a run's losses are of."""

    tokenizer: str | None
    """Hash of RUN/data/tokenizer.json; None: it is not there."""
    tokens: str | None
    """Of its store, held-out ones included; None: RUN/data does not say."""
    seq_len: int
    """Tokens of a row: the first ones of a row have little to go by."""


def measure_of(run_dir: str | Path, seq_len: int) -> Measure:
    """Read what RUN/data keeps of a run's tokens."""
    folder = Path(run_dir) / "data"
    try:
        tokenizer = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    except OSError:
        tokenizer = None
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        tokens = str(manifest["content"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        tokens = None
    return Measure(tokenizer, tokens, seq_len)


def incomparable(measures: Sequence[Measure]) -> str | None:
    """Why losses per token of these runs say nothing about which is better; None: they do."""
    if len(measures) < 2:
        return None
    if _differ(m.tokenizer for m in measures):
        return "their tokenizers differ, and with them what a token is; compare bits per byte"
    if _differ(m.tokens for m in measures):
        return "their texts differ, held-out text among them"
    if _differ(m.seq_len for m in measures):
        lengths = ", ".join(str(n) for n in sorted({m.seq_len for m in measures}))
        return f"their rows have {lengths} tokens, and the loss falls along a row"
    return None


def _differ(values: Iterable[str | int | None]) -> bool:
    """Whether they are not all one; what is not known (None) may be any."""
    return len(set(values) - {None}) > 1
