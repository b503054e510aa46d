"""The text behind the tokens of a run."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from train.files.strict_json import dumps

MAX_SEQUENCES = 20_000
"""Most training sequences read for the tokens of experts, spread evenly over the sampled ones."""
CONTEXT = 6
"""Tokens shown on either side."""


class Texts:
    """Source and text of training tokens, from the run's token store. Token id = sample * seq_len +
    position.
    """

    def __init__(self, store: Any, run: Any, run_data: Path):
        from train.config.data import labels
        from train.data.open import training_samples
        from train.data.tokenizer import TextInside

        self.seq_len = run.train.seq_len
        self.samples = training_samples(run, store, run_data)
        self.text = TextInside(store.tokenizer())
        self.names = labels(run.data.sources)
        self.row = lru_cache(maxsize=1024)(self._row)

    def _row(self, sample: int) -> np.ndarray:
        self.samples.open(sample, sample + 1)
        return self.samples.tokens(sample)[: self.seq_len]

    def source(self, token: int) -> int:
        return self.samples.source_of(token // self.seq_len)

    def vocabulary_ids(self, tokens: np.ndarray) -> np.ndarray:
        """[N] token ids -> [N] int64, what stands there; -1 in sequences that were not read (see
        MAX_SEQUENCES).
        """
        found = np.full(len(tokens), -1)
        samples, which = np.unique(tokens // self.seq_len, return_inverse=True)
        by_sample = np.split(np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1])
        for i in np.unique(
            np.linspace(0, len(samples) - 1, min(len(samples), MAX_SEQUENCES)).astype(int)
        ):
            found[by_sample[i]] = self.row(int(samples[i]))[tokens[by_sample[i]] % self.seq_len]
        return found

    def decode(self, ids: np.ndarray) -> str:
        return self.text.decode(ids.tolist())

    def context(self, token: int) -> str:
        """The token in marks between its neighbours, on one line."""
        row, at = self.row(token // self.seq_len), token % self.seq_len
        before, after = row[max(0, at - CONTEXT) : at], row[at + 1 : at + 1 + CONTEXT]
        return _one_line(
            f"{self.decode(before)}⟦{self.decode(row[at : at + 1])}⟧{self.decode(after)}"
        )


def open_texts(run_dir: str, run: Any) -> Texts | None:
    """None, with one line that says why, when the tokens the run was trained on cannot be had."""
    from train.data.prepare import prepare
    from train.data.store import TokenStore

    try:
        if run.data.streaming:
            raise ValueError("the text of a stream is not kept (data.streaming=true)")
        recorded = TokenStore(Path(run_dir) / "data").manifest
        # even if the files it was made of are gone
        path = Path(run.data.cache_dir) / recorded["fingerprint"]
        store = TokenStore(path if (path / "manifest.json").is_file() else prepare(run.data))
        if store.manifest["content"] != recorded["content"]:
            raise ValueError(f"{store.path} holds other tokens than the run was trained on")
        return Texts(store, run, Path(run_dir) / "data")
    except (ValueError, OSError) as error:
        print(f"token ids without text: {str(error).splitlines()[0]}")
        return None


def _one_line(text: str) -> str:
    return dumps(text, ensure_ascii=False)
