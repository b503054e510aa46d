"""Tokenizers: loading one, its largest id, the bytes of text that tokens stand for, and text from
tokens as they come.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from train.config.data import TokenizerConfig
from train.data.worker import apart, doing, is_panic

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token that stands for one byte, in tokenizers with byte fallback."""
LOADING_SECONDS = 600.0
"""Of processor time for reading a tokenizer. The largest in use take a few."""
MAX_VOCABULARY = 2**24
"""Tables have an entry for every id up to the largest, so a file of two tokens could ask for
2**32.
"""


@contextmanager
def tokenizers_errors(about: str) -> Iterator[None]:
    """Whatever the tokenizers library raises inside, bare Exceptions and panics too, as one line
    about it.

    Raises:
        ValueError: "<about>: <what the library says>".
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        hint = "; a pattern in it tries too many ways to match" if "retry-limit" in said else ""
        raise ValueError(f"{about}: {said}{hint}") from error


def tokenizer_file(config: TokenizerConfig) -> Path:
    """The tokenizer.json a config points to.

    Raises:
        ValueError: there is none.
    """
    assert config.path is not None
    path = Path(config.path).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"data.tokenizer.path: {path} does not exist; "
            "give a tokenizer.json or a folder holding one"
        )
    return path


def load_tokenizer(config: TokenizerConfig) -> Any:
    """The tokenizers.Tokenizer that data.tokenizer.path points to; it neither cuts nor fills
    documents.

    Raises:
        ValueError: there is no such file, it holds no tokenizer, or an id beyond MAX_VOCABULARY.
    """
    from tokenizers import Tokenizer

    path = tokenizer_file(config)
    with tokenizers_errors(f"data.tokenizer.path: {path} is not a tokenizers file"):
        tokenizer = Tokenizer.from_file(str(path))
    if (size := vocabulary_size(tokenizer)) > MAX_VOCABULARY:
        raise ValueError(
            f"data.tokenizer.path: the largest token id of {path} is {size - 1}; no more than "
            f"{MAX_VOCABULARY} ids are supported"
        )
    tokenizer.no_truncation()  # settings for sentence encoders
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """The largest token id plus one: ids may have holes, so their number can be smaller."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def tokenizer_problems(config: TokenizerConfig, vocab_size: int) -> list[str]:
    """What keeps a model of model.vocab_size from being trained with the tokenizer that is given;
    reads no text.

    A tokenizer that is still to be trained has no more than data.tokenizer.vocab_size tokens.
    """
    if config.path is None:
        return []
    try:
        return apart(lambda: _problems(config, vocab_size))
    except ValueError as error:
        return [str(error)]


def _problems(config: TokenizerConfig, vocab_size: int) -> list[str]:
    with doing(f"reading the tokenizer {config.path}", LOADING_SECONDS):
        tokenizer = load_tokenizer(config)
    found = []
    if (size := vocabulary_size(tokenizer)) > vocab_size:
        found.append(
            f"data.tokenizer.path: the largest token id of {config.path} "
            f"is {size - 1}, so model.vocab_size {vocab_size} must be at "
            f"least {size}; raise it or use a smaller tokenizer"
        )
    if tokenizer.token_to_id(config.end_of_document) is None:
        found.append(no_end(config))
    return found


def no_end(config: TokenizerConfig) -> str:
    """The problem of a tokenizer without a token that ends documents."""
    return (
        f"the tokenizer has no token {config.end_of_document!r}; set "
        "data.tokenizer.end_of_document to its end-of-text token"
    )


# --- bytes ----------------------------------------------------------------------------------------


def token_bytes(tokenizer: Any) -> np.ndarray:
    """[vocab_size] int32: bytes of UTF-8 that each token spells inside of a text; 0 for special
    tokens and unused ids.

    What a token stands for in a document may differ: a first token has no space before it though it
    spells one, and an unknown token or a normalizer hides what was there. encoded_bytes looks at
    the document.
    """
    vocab_size = vocabulary_size(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    spelled = {
        i: token
        for i in range(vocab_size)
        if i not in special and (token := tokenizer.id_to_token(i)) is not None
    }
    kinds = _decoder_kinds(tokenizer)
    lengths = np.zeros(vocab_size, dtype=np.int32)
    # one character a byte, but for added tokens, which are matched in the text itself
    if "ByteLevel" in kinds:
        for i, token in spelled.items():
            lengths[i] = len(token.encode()) if i in added else len(token)
        return lengths
    # Between two words, so that the decoder neither strips a space that stands in texts nor leaves
    # out one it adds.
    around = _a_word(tokenizer)
    texts = tokenizer.decode_batch([[around, i, around] for i in spelled])
    without = len(tokenizer.decode([around, around]).encode())
    for (i, token), text in zip(spelled.items(), texts, strict=True):
        is_byte = "ByteFallback" in kinds and BYTE_PIECE.fullmatch(token)
        lengths[i] = 1 if is_byte else max(0, len(text.encode()) - without)
    return lengths


def spells_exactly(tokenizer: Any) -> bool:
    """Whether every token stands for the bytes that it spells, wherever it is."""
    return "ByteLevel" in _decoder_kinds(tokenizer)


def encoded_bytes(text: str, encoding: Any, spelled: np.ndarray) -> np.ndarray:
    """[tokens + 1] int64: bytes of the text that each token of its encoding stands for; their sum
    is its UTF-8 length.

    The last entry is what follows the last token, for the token that ends the document. What a
    tokenizer drops between two tokens counts for the second one.

    Args:
        encoding: of `text` by a tokenizer without a post-processor (some move offsets); spelled:
            its token_bytes.
    """
    # [tokens, 2]: begin, end
    ends = _byte_positions(text)[np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)]
    total = len(text.encode())
    # A character split over tokens is whole with the last of them.
    covered = np.minimum(ends[:, 1], np.append(ends[1:, 0], total)[: len(ends)])
    covered = np.append(np.maximum.accumulate(covered), total)
    counts = np.diff(covered, prepend=0)
    # Inside a stretch of text that offsets cannot divide, each token counts what it spells if that
    # adds up, but for the space that some tokenizers put before a text.
    lengths = np.append(spelled[encoding.ids], 0).astype(np.int64)
    begins = np.flatnonzero(np.append(True, ends[:, 1] <= covered[:-1]))
    excess = np.add.reduceat(lengths, begins) - np.add.reduceat(counts, begins)
    lengths[begins[(excess == 1) & (lengths[begins] > 0)]] -= 1
    adds_up = np.add.reduceat(lengths, begins) == np.add.reduceat(counts, begins)
    return np.where(np.repeat(adds_up, np.diff(begins, append=len(counts))), lengths, counts)


def _a_word(tokenizer: Any) -> int:
    """Id of a token of letters: the first."""
    added, size = tokenizer.get_added_tokens_decoder(), vocabulary_size(tokenizer)
    return next(
        (
            i
            for i in range(size)
            if i not in added and (tokenizer.id_to_token(i) or "").strip("▁Ġ").isalpha()
        ),
        0,
    )


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


# --- text -----------------------------------------------------------------------------------------


class TextInside:
    """Text of tokens from the midst of a document, which decoders take for its beginning and strip
    of its first space.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.before = tokenizer, _a_word(tokenizer)
        self.skipped = len(tokenizer.decode([self.before]))

    def decode(self, ids: list[int]) -> str:
        """Special tokens are spelled out; part of a character is U+FFFD."""
        text: str = self.tokenizer.decode([self.before, *ids], skip_special_tokens=False)
        return text[self.skipped :]


class TextStream:
    """Text after a prompt from tokens as they come: all pieces joined are what the whole sequence
    adds to the prompt.

    A piece is given out once no later token can change it. So an unfinished character is held back,
    and with byte fallback a run of bytes, since one that is no UTF-8 spoils all of it. A token
    costs the same at any length.
    """

    KEPT = 8
    """Tokens decoded again before the new ones: a character has at most four bytes."""

    def __init__(self, tokenizer: Any, prompt: list[int]):
        self.tokenizer = tokenizer
        self.skipped = {
            i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self.in_runs = "ByteFallback" in _decoder_kinds(tokenizer)
        self.window = [i for i in prompt if self._is_text(i)]
        self.given = len(tokenizer.decode(self.window))
        """Characters of the window's text that are the prompt's, or were given out."""

    def add(self, token: int) -> str:
        """What is certain now; often one token's text, at times nothing."""
        if not self._is_text(token):
            return ""
        self.window.append(token)
        if self.in_runs and BYTE_PIECE.fullmatch(self.tokenizer.id_to_token(token)):
            return ""
        text = self.tokenizer.decode(self.window)
        held = text.endswith("\ufffd")
        piece = self._give(text[:-1] if held else text)
        if not held or len(self.window) > 4 * self.KEPT:
            self.window = self.window[-self.KEPT :]
            self.given = len(self.tokenizer.decode(self.window)) - held
        return piece

    def end(self) -> str:
        """What was held back."""
        return self._give(self.tokenizer.decode(self.window))

    def _give(self, certain: str) -> str:
        piece = certain[self.given :]
        self.given += len(piece)
        return piece

    def _is_text(self, token: int) -> bool:
        return token not in self.skipped and self.tokenizer.id_to_token(token) is not None
