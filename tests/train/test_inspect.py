"""launch.prepare inspect=true: what is in the sources, as counted by hand; nothing is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.commandline import launch
from train.config.data import DataConfig, SourceConfig, TokenizerConfig
from train.data.prepare import prepare, store_path
from train.data.shards import inspect as inspecting
from train.data.shards.inspect import inspect

TEXTS = [
    *(f"a plain line of words {i}" for i in range(40)),
    "ja да нет",
    "",
    "a plain line of words 7",
]


def config_of(folder: Path) -> DataConfig:
    rows = [json.dumps({"text": text}) for text in TEXTS]
    rows += [json.dumps({"text": None}), json.dumps({"text": "xqzjkvw \u1234\u2345" * 9})]
    (folder / "a.jsonl").write_text("\n".join(rows))
    (folder / "b.txt").write_text("once\na plain line of words 3\nmore")
    return DataConfig(
        (
            SourceConfig("json", data_files=str(folder / "a.jsonl")),
            SourceConfig("text", data_files=str(folder / "b.txt"), sample_by="line", label="notes"),
        ),
        TokenizerConfig(vocab_size=300),
        0.1,
        str(folder / "cache"),
        max_bad_rows=0.1,
    )


def test_a_page_counts_documents_duplicates_lengths_scripts_and_bad_rows(tmp_path):
    first, second = inspect(config_of(tmp_path), None)
    texts = [text for text in TEXTS if text] + ["xqzjkvw \u1234\u2345" * 9]
    assert (first.label, second.label) == ("a", "notes")
    assert first.documents == len(texts) and first.bytes == sum(len(t.encode()) for t in texts)
    assert first.duplicates == 1 and second.duplicates == 1  # one of them in the other source
    assert first.bad_rows == {"'text' is null": 1}
    lengths = sorted(map(len, texts))
    assert first.lengths["shortest"] == lengths[0] and first.lengths["longest"] == lengths[-1]
    assert first.lengths["median"] == lengths[(len(lengths) - 1) // 2]
    letters = [c for text in texts for c in text if c.isalpha()]
    assert first.scripts["Cyrillic"] == pytest.approx(5 / len(letters))
    assert first.scripts["Ethiopic"] == pytest.approx(9 / len(letters))
    assert first.bytes_per_token is None and not (tmp_path / "cache").exists()


def test_a_tokenizer_is_tried_on_a_sample_and_its_worst_documents_are_named(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    store = prepare(config, lambda line: None)
    page, _ = inspect(config, store / "tokenizer.json")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(store / "tokenizer.json"))
    texts = list(dict.fromkeys([t for t in TEXTS if t] + ["xqzjkvw \u1234\u2345" * 9]))
    rates = {t: len(t.encode()) / len(tokenizer.encode(t).ids) for t in texts}
    tokens = sum(len(tokenizer.encode(t).ids) for t in texts)
    assert page.bytes_per_token == pytest.approx(sum(len(t.encode()) for t in texts) / tokens)
    assert page.unknown_share == 0.0
    assert page.worst[0][0] == pytest.approx(min(rates.values()))
    assert "a.jsonl row" in page.worst[0][1]

    monkeypatch.setattr(inspecting, "SAMPLE", 5)
    few, _ = inspect(config, store / "tokenizer.json")
    assert few.documents == page.documents and few.bytes_per_token != page.bytes_per_token


def test_the_command_prints_the_pages_and_makes_nothing(tmp_path):
    config = config_of(tmp_path)
    sources = f"[{{path:json,data_files:{tmp_path}/a.jsonl}}]"
    told = launch(
        "prepare",
        "data=files",
        f"data.sources={sources}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "inspect=true",
    ).stdout
    (page,) = json.loads(told.splitlines()[-1])["sources"]
    assert page["documents"] == 43 and "duplicates   1 (2.33%)" in told
    assert "no tokenizer yet" in told and not store_path(config).parent.exists()
