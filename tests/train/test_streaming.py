"""Streams: the rows of their definition, whoever makes them, and from any of them on."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from train.config.data import (
    DataConfig,
    MixtureConfig,
    PhaseConfig,
    SourceConfig,
    StreamConfig,
    TokenizerConfig,
    ValidationConfig,
)
from train.data import sources
from train.data.files import Meter
from train.data.prepare import prepare, store_path
from train.data.shards import make
from train.data.shards.make import bad_rows_of
from train.data.store import TokenStore
from train.data.streaming import producer
from train.data.streaming.samples import StreamingSamples
from train.data.streaming.windows import RECORDS, Position, Records, Window

SEQ_LEN, SEED, WINDOW, FRACTION = 16, 77, 3_000, 0.1
WORDS = ["one", "two", "three", "é€", "😀", "a b", "12345", "x" * 30]


def texts_of(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) + f" {i}" for i in range(count)]


def write(folder: Path, name: str, texts: list[str]) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Windows of several shards, several of them in a pass."""
    monkeypatch.setattr(make, "SHARD_CHARACTERS", 900)
    monkeypatch.setattr(make, "LOOK_CHARACTERS", 300)
    monkeypatch.setattr(producer, "WINDOW_UNIT", WINDOW)


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """Two sources, the first of three files; a document stands twice."""
    first, second = texts_of(240, 1), texts_of(90, 2)
    first[200] = first[3]
    (tmp_path / "many").mkdir()
    for i in range(3):
        write(tmp_path / "many", f"{i}.jsonl", first[80 * i : 80 * i + 80])
    write(tmp_path, "other.jsonl", second)
    return DataConfig(
        (
            SourceConfig("json", data_files=str(tmp_path / "many"), weight=3.0),
            SourceConfig("json", data_files=str(tmp_path / "other.jsonl"), weight=1.0),
        ),
        TokenizerConfig(vocab_size=300),
        FRACTION,
        str(tmp_path / "cache"),
        streaming=True,
        stream=StreamConfig(window_mib=1, head_documents=60, workers=2),
    )


def key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_held_out(text: str) -> bool:
    return key(text) < FRACTION * 2**64


def definition(texts: list[str], source: int, tokenizer, end: int, passes: int) -> list[int]:
    """The stream of a source, as the docstring of windows.py says it."""
    stream: list[int] = []
    number = 0
    for _ in range(passes):
        left = list(texts)
        while left:
            window, characters = [], 0
            while left and characters < WINDOW:
                window.append(left.pop(0))
                characters += len(window[-1])
            kept = [text for text in window if not is_held_out(text)]
            seed = (SEED + 104729 * source + 7919 * number) % 2**32
            for i in np.random.RandomState(seed).permutation(len(kept)):
                stream += [*tokenizer.encode(kept[i], add_special_tokens=False).ids, end]
            number += 1
        if characters >= WINDOW:  # the window that the end of the pass ends is empty
            number += 1
    return stream


def store_of(config: DataConfig) -> TokenStore:
    assert not config.problems()
    return TokenStore(prepare(config, lambda line: None, 1))


def samples_of(config: DataConfig, run_data: Path) -> StreamingSamples:
    found = StreamingSamples(store_of(config), config, SEQ_LEN, SEED, run_data)
    found.mix(config)
    return found


def read(config: DataConfig, run_data: Path, start: int, stop: int, step: int = 4) -> np.ndarray:
    """Rows start..stop-1, taken in steps by a job of its own."""
    samples = samples_of(config, run_data)
    try:
        rows = []
        for first in range(start, stop, step):
            samples.open(first, min(first + step, stop))
            rows += [samples.tokens(i) for i in range(first, min(first + step, stop))]
            files = list(run_data.glob("stream/*/*.bin"))
            assert len(files) <= 4 * len(config.sources), files
        return np.stack(rows)
    finally:
        samples.close()


def passes_of(config: DataConfig) -> list[list[str]]:
    return [
        [text for _, text in sources.placed_documents(s, bad_rows_of(s, config), meter=Meter())]
        for s in config.sources
    ]


def test_rows_are_those_of_the_definition_for_any_number_of_workers(config, tmp_path):
    store = store_of(config)
    tokenizer = store.tokenizer()
    tokenizer.encode_special_tokens = True
    streams = [
        definition(texts, i, tokenizer, store.end_of_document, 4)
        for i, texts in enumerate(passes_of(config))
    ]
    per_pass = len(streams[1]) // 4
    number = 4 * (2 * per_pass // SEQ_LEN)  # of the second source two passes
    samples = samples_of(config, tmp_path / "plan")
    expected, sources_seen = [], []
    for i in range(number):
        source, within = samples._locate(i)
        sources_seen.append(source)
        begin = within * SEQ_LEN
        expected.append(streams[source][begin : begin + SEQ_LEN + 1])
    samples.close()
    assert set(sources_seen) == {0, 1} and sources_seen.count(0) > 2 * sources_seen.count(1)

    found = read(config, tmp_path / "run", 0, number)
    np.testing.assert_array_equal(found, np.array(expected))
    one = dataclasses.replace(config, stream=dataclasses.replace(config.stream, workers=1))
    np.testing.assert_array_equal(read(one, tmp_path / "one", 0, number, 7), found)


@pytest.mark.parametrize("kept", ["all", "records", "nothing", "half a line"])
def test_a_job_that_goes_on_in_the_midst_of_a_shard_reads_the_same_rows(config, tmp_path, kept):
    run_data = tmp_path / "run"
    whole = read(config, tmp_path / "whole", 0, 120)
    read(config, run_data, 0, 70)
    for path in run_data.glob("stream/*/*"):
        if kept == "nothing" or (kept == "records" and path.suffix == ".bin"):
            path.unlink()
        if kept == "half a line" and path.name == RECORDS:
            path.write_bytes(path.read_bytes()[:-9])
    other = dataclasses.replace(config, stream=dataclasses.replace(config.stream, workers=3))
    np.testing.assert_array_equal(read(other, run_data, 61, 120, 3), whole[61:])


def test_files_of_a_pass_that_are_behind_are_not_read_again(config, tmp_path):
    alone = dataclasses.replace(config, sources=config.sources[:1])
    records = Records(tmp_path / "run" / "stream" / "0")
    store = store_of(alone)
    whole = read(alone, tmp_path / "run", 0, 300)
    window = next(w for w in records.read() if w.end.file == 1 and w.end.number_of_pass == 0)
    tokens = sum(w.tokens for w in records.read()[: window.number + 1])
    # reading it would fail, for its rows hold no text
    (tmp_path / "many" / "0.jsonl").write_text("broken\n" * 200)
    start = -(-tokens // SEQ_LEN)
    samples = StreamingSamples(store, alone, SEQ_LEN, SEED, tmp_path / "run")
    samples.open(start, start + 4)
    np.testing.assert_array_equal(samples.tokens(start), whole[start])
    samples.close()


def test_a_part_of_a_set_is_found_again_too(config, tmp_path):
    """Where files are not read one after another, whole, documents are counted."""
    for changed in ({"max_documents": 150}, {"split": "train[40%:]+train[:70%]"}):
        part = dataclasses.replace(config.sources[0], **changed)
        alone = dataclasses.replace(config, sources=(part,))
        name = str(next(iter(changed)))
        whole = read(alone, tmp_path / f"{name} whole", 0, 120, 10)
        read(alone, tmp_path / name, 0, 80, 10)
        np.testing.assert_array_equal(read(alone, tmp_path / name, 80, 120, 10), whole[80:])


def test_a_source_that_has_changed_is_refused(config, tmp_path):
    store = store_of(config)
    read(config, tmp_path / "run", 0, 120)
    texts = texts_of(240, 1)
    texts[5] = "another"
    write(tmp_path / "many", "0.jsonl", texts[:80])
    samples = StreamingSamples(store, config, SEQ_LEN, SEED, tmp_path / "run")
    samples.mix(config)
    with pytest.raises(ValueError, match=r"has changed since the run has read it"):
        for first in range(0, 120, 4):
            samples.open(first, first + 4)
    samples.close()


def test_a_file_that_is_not_what_was_written_is_not_trained_on(config, tmp_path):
    samples = samples_of(config, tmp_path / "run")
    samples.open(0, 4)
    path = tmp_path / "run" / "stream" / "0" / "0.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"0\.bin is not what was written"):
        samples.tokens(0)
    samples.close()


def test_what_is_held_out_is_in_no_row(config, tmp_path):
    """By its key, by the fewest that the head has, and as validation source."""
    exam = texts_of(90, 2)[:10]
    file = write(tmp_path, "exam.jsonl", exam)
    alone = dataclasses.replace(
        config,
        sources=config.sources[1:],
        validation=ValidationConfig((SourceConfig("json", data_files=file),)),
    )
    for one, said in (
        (alone, exam),
        (dataclasses.replace(alone, validation=ValidationConfig()), []),
        (
            dataclasses.replace(alone, validation=ValidationConfig(), validation_fraction=1e-18),
            [],
        ),
    ):
        store = store_of(one)
        tokenizer, end = store.tokenizer(), store.end_of_document
        held = np.fromfile(store.path / "validation.bin", np.uint16)
        held_out = [
            tokenizer.decode(ids[:-1])
            for ids in np.split(held, np.flatnonzero(held == end) + 1)[:-1]
        ]
        assert held_out and set(said) <= set(held_out)
        rows = read(one, tmp_path / f"run{id(one)}", 0, 150)
        stream = [*rows[0][:1], *rows[:, 1:].reshape(-1)]
        ends = [i for i, token in enumerate(stream) if token == end]
        seen = {tokenizer.decode(stream[a + 1 : b]) for a, b in itertools.pairwise(ends)}
        everything = set(passes_of(one)[0])
        below = {text for text in everything if key(text) < one.validation_fraction * 2**64}
        assert not seen & {*held_out, *below}
        assert seen <= everything and len(seen) > 30


def test_a_mixture_over_time_and_a_pass_that_ends_are_followed(config, tmp_path, caplog):
    scheduled = dataclasses.replace(
        config, mixture=MixtureConfig(schedule=(PhaseConfig(40 * SEQ_LEN, (0.0, 1.0)),))
    )
    with caplog.at_level("INFO", logger="loadstone"):
        whole = read(scheduled, tmp_path / "whole", 0, 300)
    assert "source other is read to its end: pass 1 has" in caplog.text
    read(scheduled, tmp_path / "run", 0, 40)
    np.testing.assert_array_equal(read(scheduled, tmp_path / "run", 40, 300), whole[40:])


def test_what_is_prepared_is_the_head(config):
    store = store_of(config)
    facts = store.manifest["sources"]
    held = store.manifest["validation"]["documents"]
    assert sum(f["documents"] for f in facts) + held == 2 * 60
    assert store.path == store_path(config) == store_path(config.head)


def test_records_end_where_they_are_damaged(tmp_path):
    (tmp_path / "0").mkdir()
    records = Records(tmp_path / "0")
    windows = [Window(i, 5, 2, 9, Position(0, 0, i)) for i in range(3)]
    records.keep(windows)
    assert records.read() == windows
    text = records.path.read_text()
    for damage in ("{", "null\n", text.splitlines()[0] + "\n", '{"number": 3}\n'):
        records.path.write_text(text + damage)
        assert records.read() == windows


def test_an_error_in_the_background_is_told(config, tmp_path):
    (tmp_path / "many" / "2.jsonl").write_text("broken\n" * 200)
    with pytest.raises(ValueError, match=r"2\.jsonl.*is not valid JSON"):
        read(config, tmp_path / "run", 0, 400)


def test_what_is_fetched_goes_when_it_was_read_and_what_was_there_stays(tmp_path, monkeypatch):
    import datasets

    fetched = tmp_path / "fetched"
    fetched.mkdir()
    there = []

    class Manager:
        def download(self, file: str) -> str:
            path = fetched / Path(file).name
            if not path.is_file():
                write(fetched, path.name, ["some text"])
            there.append(sorted(p.name for p in fetched.iterdir()))
            return str(path)

    class Builder:
        class config:
            data_files = {"train": ["hub://0.jsonl", "hub://1.jsonl", "hub://2.jsonl"]}  # noqa: RUF012

    from train.data.files import Format

    monkeypatch.setattr(datasets, "DownloadManager", Manager)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: Builder)
    monkeypatch.setattr(sources, "_format", lambda _: Format("json"))
    source = SourceConfig("some/set")
    write(fetched, "1.jsonl", ["was there"])
    import time

    time.sleep(0.05)
    bad_rows = sources.BadRows(source)
    found = [t for _, t in sources.placed_documents(source, bad_rows, keep_files=False)]
    assert found == ["some text", "was there", "some text"]
    assert there == [["0.jsonl", "1.jsonl"], ["1.jsonl"], ["1.jsonl", "2.jsonl"]]
    assert sorted(p.name for p in fetched.iterdir()) == ["1.jsonl"]


def test_what_does_not_combine_is_refused():
    text = SourceConfig("sample")
    for changed, said in (
        ({"format": "chat"}, "conversations are packed over a whole set"),
        ({"mixture": MixtureConfig(temperature=2.0)}, "data.mixture.temperature is 2.0"),
        ({"sources": (SourceConfig("sample", max_epochs=2.0),)}, "data.sources[0].max_epochs"),
        ({"sources": (SourceConfig("npy", data_files="a.npy"),)}, "holds tokens"),
        ({"stream": StreamConfig(window_mib=0)}, "data.stream.window_mib is 0"),
        ({"stream": StreamConfig(head_documents=1)}, "data.stream.head_documents is 1"),
        ({"stream": StreamConfig(workers=0)}, "data.stream.workers is 0"),
        ({"streaming": False, "stream": StreamConfig(workers=3)}, "data.streaming=true only"),
    ):
        config = dataclasses.replace(
            DataConfig((text,), TokenizerConfig(), streaming=True), **changed
        )
        assert any(said in problem for problem in config.problems()), (said, config.problems())
    assert not DataConfig((text,), TokenizerConfig(), streaming=True).problems()
