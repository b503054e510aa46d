"""Files of strangers: whatever they do to a parser or a tokenizer is one line, and a signal ends it
at once.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from train.config.data import DataConfig, SourceConfig, TokenizerConfig
from train.data import prepare as preparing
from train.data import sources, worker
from train.data import tokenizer as tokenizers
from train.data.files import Format, read_rows
from train.data.prepare import prepare
from train.data.shards import encode
from train.data.tokenizer import tokenizer_problems
from train.data.worker import LibraryError, apart, doing, tell
from train.rank.stop import Stopped, StopSignal

END = "<|endoftext|>"


def data_of(
    folder: Path, tokenizer: dict[str, Any] | None = None, source: SourceConfig | None = None
) -> DataConfig:
    """Two documents, one a string of `a` that a bad pattern does not get over."""
    (folder / "text.txt").write_text("abc\n" + "a" * 60 + "!\n")
    path = None
    if tokenizer is not None:
        path = str(folder / "tokenizer.json")
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    source = source or SourceConfig("text", data_files=str(folder / "text.txt"), sample_by="line")
    return DataConfig(
        (source,),
        TokenizerConfig(path=path, vocab_size=300),
        validation_fraction=0.5,
        cache_dir=str(folder / "cache"),
    )


def tokenizer_of(**parts: Any) -> dict[str, Any]:
    """A tokenizer.json of the letters."""
    vocab = {chr(97 + i): i for i in range(26)} | {"!": 26}
    token = {
        "id": 27,
        "content": END,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocab,
        "merges": [],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    } | parts


def split_at(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


HOSTILE = {
    "a pattern that backtracks": ({"pre_tokenizer": split_at("(a+)+$")}, "too many ways to match"),
    "the same in a normalizer": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}},
        "too many ways to match",
    ),
    "a step of no length": (
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        "chunk size must be non-zero",
    ),
    "a decoder that reads beyond": (
        {"decoder": {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**62}},
        "cannot spell its tokens: index out of bounds",
    ),
    "an unknown token that is none": (
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "no"}},
        "WordLevel error: Missing",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_tokenizer_file_does_to_the_library_is_one_line_that_names_the_file(
    tmp_path, capfd, name
):
    parts, said = HOSTILE[name]
    with pytest.raises(ValueError, match=said) as raised:
        prepare(data_of(tmp_path, tokenizer_of(**parts)), report=lambda line: None)
    assert str(tmp_path / "tokenizer.json") in str(raised.value) and "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""  # the library writes a trace where it panics
    assert not list((tmp_path / "cache").iterdir())


def test_a_tokenizer_file_that_makes_the_library_panic_is_named_before_any_text_is_read(tmp_path):
    config = data_of(
        tmp_path, tokenizer_of(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    )
    (problem,) = tokenizer_problems(config.tokenizer, 1000)
    assert "is not a tokenizers file: Precompiled" in problem and "\n" not in problem


def test_two_tokens_cannot_ask_for_a_table_of_four_billion(tmp_path):
    model = tokenizer_of()["model"] | {"vocab": {"a": 2**32 - 1, "b": 1}}
    config = data_of(tmp_path, tokenizer_of(model=model))
    with pytest.raises(
        ValueError, match=r"largest token id .* is 4294967295; no more than 16777216"
    ):
        prepare(config, report=lambda line: None)


def test_a_tokenizer_that_never_comes_back_is_given_up(tmp_path, monkeypatch):
    """Every character becomes ten, nine times over. The limit is of processor time."""
    tenfold = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    config = data_of(
        tmp_path, tokenizer_of(normalizer={"type": "Sequence", "normalizers": [tenfold] * 9})
    )
    monkeypatch.setattr(encode, "SECONDS_A_BATCH", 0.0)
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    with pytest.raises(
        ValueError,
        match=r"tokenising 1 documents of 3 characters (took more than .* s of "
        r"processor time|takes more memory|ended the process)",
    ):
        monkeypatch.setattr(encode, "BATCH_DOCUMENTS", 1)
        prepare(config, report=lambda line: None)


def test_a_tokenizer_is_asked_for_few_documents_at_a_time_and_fewer_long_ones(monkeypatch):
    monkeypatch.setattr(encode, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 10)
    texts = ["a", "b", "c", "d" * 10, "e", "f" * 9, "g"]
    batches = list(encode.batches(texts))
    assert batches == [["a", "b", "c"], ["d" * 10], ["e", "f" * 9], ["g"]]
    assert tokenizers.MAX_VOCABULARY < 2**31  # of the token files


@pytest.mark.parametrize("nest", ["[", '{"a": '])
def test_json_nested_without_end_is_an_odd_row_whatever_the_limit_of_recursion(tmp_path, nest):
    """Libraries raise the limit, and then the stack ends before it does."""
    rows = '{"text": "one"}', '{"text": "x", "a": ' + nest * 300_000, '{"text": "two"}'
    (tmp_path / "deep.jsonl").write_text("\n".join(rows))
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    try:
        texts = apart(
            lambda: [
                str(row.text)
                for row in read_rows(str(tmp_path / "deep.jsonl"), Format("json"), "text")
            ]
        )
    finally:
        sys.setrecursionlimit(usual)
    assert texts[0] == "one" and "recursion" in texts[1] and texts[2] == "two"


def test_a_parser_that_dies_is_told_with_what_it_read(tmp_path):
    def dies() -> None:
        with doing(f"reading {tmp_path}/x.parquet"), doing("reading something else"):
            pass
        with doing(f"reading {tmp_path}/y.parquet"):
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)

    with pytest.raises(
        ValueError, match=rf"reading {tmp_path}/y.parquet ended the process .* by SIGSEGV"
    ):
        apart(dies)


def test_an_error_is_the_users_or_ours_or_a_librarys_as_it_was_in_the_child():
    def of_ours() -> None:
        Format("json").kind.index("x")

    assert apart(lambda: tell("a line") or 7, (lines := []).append) == 7 and lines == ["a line"]
    with pytest.raises(LibraryError, match="ValueError: substring not found") as raised:
        apart(of_ours)
    assert "of_ours" in raised.value.__notes__[0]
    with pytest.raises(OSError) as full:
        apart(lambda: os.open(os.devnull + "/x", os.O_RDONLY))
    assert full.value.errno == 20
    with pytest.raises(ValueError, match="no file matches"):
        apart(lambda: list(preparing.documents(SourceConfig("text", data_files="/no/such/file"))))


class Native:
    """In a circle that nobody holds any more; taking it apart works in its own process alone."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.itself = self

    def __del__(self) -> None:
        if os.getpid() != self.owner:
            os.kill(os.getpid(), signal.SIGSEGV)


def test_the_child_takes_nothing_apart_that_the_parent_has_dropped():
    gc.disable()
    try:
        Native()
        assert apart(gc.collect) >= 0
    finally:
        gc.enable()


def test_a_signal_ends_native_code_that_lets_no_handler_run(tmp_path):
    """As the encoding of a document of 60 MB: the child does not answer, and is gone when the
    parent is.
    """
    pid_file = tmp_path / "pid"

    def stuck() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, set(range(1, 32)))
        pid_file.write_text(str(os.getpid()))
        tell("stuck")
        threading.Event().wait()

    with StopSignal() as stop, pytest.raises(Stopped), stop.obeyed_at_once():
        apart(stuck, lambda line: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


DAMAGED = {
    "json": (b'{"text": "a"}\n', b"\xff\xfe[", b"[" * 10_000, b'{"text": "\\ud800"}', b"\0" * 100),
    "csv": (b'text\n"a', b"text\n" + b'"' * 99, b"text\r\ra", b"\0,\0\ntext", b"text," * 9),
    "text": (b"\xff" * 100, b"\0" * 100),
    "parquet": (b"PAR1", b"PAR1" * 2, b"PAR1" + b"\xff" * 64 + b"\x40\0\0\0PAR1", b""),
}
HEADS = (
    b"",
    b"\x1f\x8b",
    b"\x1f\x8b\x08\0",
    b"BZh91AY&SY",
    b"\xfd7zXZ\0",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
    b"PK\x03\x04",
    b"\0" * 257 + b"ustar",
)


@pytest.mark.parametrize(("kind", "head"), itertools.product(DAMAGED, HEADS))
def test_a_damaged_file_has_odd_rows_or_one_error_that_names_it(tmp_path, kind, head):
    for number, body in enumerate(DAMAGED[kind]):
        path = tmp_path / f"{number}"
        path.write_bytes(head + body)
        try:
            for row in read_rows(str(path), Format(kind), "text"):
                str(row)
        except ValueError as error:
            assert str(error).startswith(f"{path} cannot be read: ") and "\n" not in str(error)


def test_a_data_sets_readme_whose_aliases_multiply_is_given_up(tmp_path, monkeypatch):
    """400 bytes of YAML: nine lists of nine, nine times over."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "x"}\n')
    names = "abcdefghij"
    lists = [
        f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]"
        for before, name in itertools.pairwise(names)
    ]
    settings = [
        "a: &a [x,x,x,x,x,x,x,x,x]",
        *lists,
        "configs:",
        "- config_name: default",
        "  data_files: *j",
    ]
    (folder / "README.md").write_text("\n".join(["---", *settings, "---", ""]))
    monkeypatch.setattr(sources, "FINDING_SECONDS", 0.5)
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    with pytest.raises(
        ValueError,
        match=r"reading source .* took more than 0.5 s of processor time, and was given up",
    ):
        apart(lambda: list(sources.documents(SourceConfig(str(folder)))))
