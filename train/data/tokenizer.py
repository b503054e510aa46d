"""Tokenizers: loading one, its largest id, the bytes of text that tokens stand for, and text from tokens as they come."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from train.config import TokenizerConfig

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token that stands for one byte, in tokenizers with byte fallback."""


def tokenizer_file(config: TokenizerConfig) -> Path:
    """The tokenizer.json a config points to.

    Raises:
        ValueError: there is none.
    """
    assert config.path is not None
    path = Path(config.path).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"data.tokenizer.path: {path} does not exist; give a tokenizer.json or a folder holding one")
    return path


def load_tokenizer(config: TokenizerConfig) -> Any:
    """The tokenizers.Tokenizer that data.tokenizer.path points to; it neither cuts nor fills documents.

    Raises:
        ValueError: there is no such file, or it holds no tokenizer.
    """
    from tokenizers import Tokenizer

    path = tokenizer_file(config)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"data.tokenizer.path: {path} is not a tokenizers file ({error})") from error
    tokenizer.no_truncation()  # settings for sentence encoders
    tokenizer.no_padding()
    return tokenizer


# --- bytes -----------------------------------------------------------------------------------------------------------

def token_bytes(tokenizer: Any) -> np.ndarray:
    """[vocab_size] int32: bytes of UTF-8 that each token spells inside of a text; 0 for special tokens and unused ids.

    What a token stands for in a document may differ: a first token has no space before it though it spells one, and an
    unknown token or a normalizer hides what was there. encoded_bytes looks at the document.
    """
    vocab_size = vocabulary_size(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    spelled = {i: token for i in range(vocab_size)
               if i not in special and (token := tokenizer.id_to_token(i)) is not None}
    kinds = _decoder_kinds(tokenizer)
    lengths = np.zeros(vocab_size, dtype=np.int32)
    if "ByteLevel" in kinds:  # one character a byte, but for added tokens, which are matched in the text itself
        for i, token in spelled.items():
            lengths[i] = len(token.encode()) if i in added else len(token)
        return lengths
    # Between two words, so that the decoder neither strips a space that stands in texts nor leaves out one it adds.
    words = [i for i, token in spelled.items() if i not in added and token.strip("▁").isalpha()]
    around = words[0] if words else 0
    texts = tokenizer.decode_batch([[around, i, around] for i in spelled])
    without = len(tokenizer.decode([around, around]).encode())
    for (i, token), text in zip(spelled.items(), texts, strict=True):
        is_byte = "ByteFallback" in kinds and BYTE_PIECE.fullmatch(token)
        lengths[i] = 1 if is_byte else max(0, len(text.encode()) - without)
    return lengths


def encoded_bytes(text: str, encoding: Any, spelled: np.ndarray) -> np.ndarray:
    """[tokens + 1] int64: bytes of the text that each token of its encoding stands for; their sum is its UTF-8 length.

    The last entry is what follows the last token, for the token that ends the document. What a tokenizer drops between
    two tokens counts for the second one.

    Args:
        encoding: of `text` by a tokenizer without a post-processor (some move offsets); spelled: its token_bytes.
    """
    ends = _byte_positions(text)[np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)]  # [tokens, 2]: begin, end
    total = len(text.encode())
    # A character split over tokens is whole with the last of them.
    covered = np.minimum(ends[:, 1], np.append(ends[1:, 0], total)[:len(ends)])
    covered = np.append(np.maximum.accumulate(covered), total)
    counts = np.diff(covered, prepend=0)
    # Inside a stretch of text that offsets cannot divide, each token counts what it spells if that adds up, but for the
    # space that some tokenizers put before a text.
    lengths = np.append(spelled[encoding.ids], 0).astype(np.int64)
    begins = np.flatnonzero(np.append(True, ends[:, 1] <= covered[:-1]))
    excess = np.add.reduceat(lengths, begins) - np.add.reduceat(counts, begins)
    lengths[begins[(excess == 1) & (lengths[begins] > 0)]] -= 1
    adds_up = np.add.reduceat(lengths, begins) == np.add.reduceat(counts, begins)
    return np.where(np.repeat(adds_up, np.diff(begins, append=len(counts))), lengths, counts)


def _byte_positions(text: str) -> np.ndarray:
    """[characters + 1] int64: bytes of UTF-8 before each character, and before the end."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate(([0], np.cumsum(widths)))


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """Names of the decoder's parts, e.g. {"Sequence", "Replace", "ByteFallback"}."""
    def names(part: Any) -> set[str]:
        return {part["type"]}.union(*map(names, part.get("decoders", ()))) if part else set()

    return names(json.loads(tokenizer.to_str()).get("decoder"))


def vocabulary_size(tokenizer: Any) -> int:
    """The largest token id plus one: ids may have holes, so their number can be smaller."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
