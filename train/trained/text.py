"""A text file as rows to evaluate a model on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.loss import IGNORE_INDEX
from train.config.data import TokenizerConfig
from train.data.loader import Batch, pack
from train.data.tokenizer import encoded_bytes, load_tokenizer, token_bytes, tokenizers_errors


@dataclass(frozen=True)
class FolderTokens:
    """The tokens of a folder of published weights, as a TokenStore has them."""

    _tokenizer: Any
    end_of_document: int
    """Id of the token that ends a text; -1 where the tokenizer has none of that name."""

    @staticmethod
    def of(config: TokenizerConfig) -> FolderTokens:
        """
        Raises:
            ValueError: the tokenizer cannot be read.
        """
        tokenizer = load_tokenizer(config)
        end = tokenizer.token_to_id(config.end_of_document)
        return FolderTokens(tokenizer, -1 if end is None else end)

    def tokenizer(self) -> Any:
        return self._tokenizer


def read_text(path: str) -> str:
    """
    Raises:
        ValueError: there is no such file, or it is no UTF-8.
    """
    try:
        return Path(path).expanduser().read_bytes().decode()
    except OSError as error:
        raise ValueError(f"text={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"text={path} is not UTF-8: {error.reason} at {error.start}") from error


def text_batches(
    text: str,
    tokenizer: Any,
    end_of_document: int,
    seq_len: int,
    batch_size: int,
    max_sequences: int | None,
) -> Iterator[Batch]:
    """The text as one document, cut into rows: every token but the first is predicted once, by
    those before it in its row.

    Args:
        tokenizer: a tokenizers.Tokenizer.

    Raises:
        ValueError: the text has fewer than two tokens, or cannot be encoded.
    """
    tokenizer.encode_special_tokens = True  # text that spells a special token is text
    spelled = token_bytes(tokenizer)
    tokenizer.post_processor = None  # it may move offsets
    with tokenizers_errors("the tokenizer cannot encode the text"):
        encoding = tokenizer.encode(text, add_special_tokens=False)
    ids = np.array(encoding.ids, dtype=np.int64)
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; there is nothing to predict")
    num_bytes = encoded_bytes(text, encoding, spelled)[: len(ids)]

    starts = list(range(0, len(ids) - 1, seq_len))[:max_sequences]
    for first in range(0, len(starts), batch_size):
        rows = starts[first : first + batch_size]
        batch = pack([ids[i : i + seq_len + 1] for i in rows], seq_len, end_of_document)
        kept = batch.targets.numpy() != IGNORE_INDEX
        counts = 0
        for row, start in enumerate(rows):
            here = num_bytes[start + 1 : start + seq_len + 1]
            counts += int(here[kept[row, : len(here)]].sum())
        yield dataclasses.replace(batch, target_bytes=counts)
