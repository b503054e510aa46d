"""Preparing in parallel: the same bytes whoever makes them, nothing lost and nothing made twice
when it is killed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from train.config.data import (
    DataConfig,
    SourceConfig,
    TokenizerConfig,
    ValidationConfig,
    labels,
)
from train.data import prepare as preparing
from train.data.prepare import prepare, store_path, train_bpe
from train.data.shards import encode, make, parts
from train.data.shards.assemble import HeldOut, TokenFile, _stream
from train.data.shards.encode import Encoded, Encoder, Shard, document_key, in_windows
from train.data.shards.pool import Pool
from train.data.worker import doing

WORDS = ["one", "two", "three", "é€", "😀", "a b", "\n", "12345", "x" * 30]


def texts_of(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) + f" {i}" for i in range(count)]


@pytest.fixture
def config(tmp_path, monkeypatch) -> DataConfig:
    """Two sources of some forty shards."""
    monkeypatch.setattr(make, "SHARD_CHARACTERS", 2_000)
    monkeypatch.setattr(make, "LOOK_CHARACTERS", 500)
    for name, count in (("a", 400), ("b", 300)):
        rows = [json.dumps({"text": text}) for text in texts_of(count, count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return DataConfig(
        tuple(SourceConfig("json", data_files=str(tmp_path / f"{n}.jsonl")) for n in "ab"),
        TokenizerConfig(vocab_size=300),
        0.1,
        str(tmp_path / "cache"),
    )


def content(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


def made_elsewhere(config: DataConfig, place: Path, workers: int) -> dict[str, str]:
    elsewhere = dataclasses.replace(config, cache_dir=str(place))
    return content(prepare(elsewhere, lambda line: None, workers))


def shards_on_disk(config: DataConfig) -> dict[str, int]:
    folder = store_path(config).with_name(f".{store_path(config).name}.parts")
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("*/*/*.npz")}


def killed_at(config: DataConfig, shards: int) -> None:
    """A preparation that is killed when so many shards are on disk."""
    if (pid := os.fork()) == 0:
        try:
            prepare(config, lambda line: None, 2)
        finally:
            os._exit(0)
    while len(shards_on_disk(config)) < shards:
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    # its children follow it, and hold the lock until they are gone
    store = store_path(config)
    lock = parts._locked(store.with_name(f".{store.name}.parts"), 60.0)
    assert lock is not None
    os.close(lock)


def test_the_store_is_the_same_for_any_number_of_workers_and_any_kills(config, tmp_path):
    one = made_elsewhere(config, tmp_path / "one", 1)
    assert made_elsewhere(config, tmp_path / "three", 3) == one
    for shards in (1, 9, 25):
        killed_at(config, shards)
    kept, lines = shards_on_disk(config), []
    assert len(kept) >= 25 and not store_path(config).exists()
    during: dict[str, int] = {}

    def report(line: str) -> None:
        lines.append(line)
        during.update(shards_on_disk(config))

    assert content(prepare(config, report, 2)) == one
    # none of what was there was made again, nor the tokenizer trained, and all of it is gone now
    assert kept.items() <= during.items()
    assert any(line.endswith("shards of an earlier preparation were kept") for line in lines)
    assert not any("training a byte-level BPE" in line for line in lines)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [store_path(config).name]


def test_a_damaged_shard_and_one_of_other_text_are_made_again(config, tmp_path):
    one = made_elsewhere(config, tmp_path / "one", 1)
    killed_at(config, 8)
    first, second, *_ = (Path(path) for path in sorted(shards_on_disk(config)))
    first.write_bytes(first.read_bytes()[:100])
    other = parts.Parts(tmp_path / "other")
    with np.load(second) as arrays:
        fields = {name: arrays[name] for name in Shard._fields}
    other.write(0, 0, b"x" * 32, Shard(**fields))
    second.write_bytes(other.path(0, 0).read_bytes())
    assert content(prepare(config, lambda line: None, 2)) == one


def test_a_shard_that_breaks_while_the_store_is_made_is_named_and_the_others_stay(tmp_path):
    place = parts.Parts(tmp_path)
    shard = an_encoder().shard(["one", "two"], "x")
    for number in (0, 1):
        place.write(0, number, b"x" * 32, shard)
    data = bytearray(place.path(0, 0).read_bytes())
    data[len(data) // 2] ^= 1
    place.path(0, 0).write_bytes(data)
    with pytest.raises(parts.DamagedShard, match=r"0\.npz is damaged .*prepare again"):
        place.read(0, 0)
    assert not place.path(0, 0).exists()
    assert all(np.array_equal(a, b) for a, b in zip(place.read(0, 1), shard, strict=True))


def test_while_another_process_makes_the_store_this_one_makes_its_own(
    config, tmp_path, monkeypatch
):
    one = made_elsewhere(config, tmp_path / "one", 1)
    monkeypatch.setattr(parts, "WAIT_SECONDS", 0.0)
    folder = store_path(config).with_name(f".{store_path(config).name}.parts")
    folder.mkdir(parents=True)
    lock = parts._locked(folder, 0)
    lines: list[str] = []
    assert content(prepare(config, lines.append, 1)) == one
    assert any("this one makes its own shards" in line for line in lines)
    assert lock is not None and (folder / parts.LOCK).exists()  # the other's stay
    os.close(lock)


def test_a_lock_that_was_removed_and_made_again_meanwhile_is_not_the_folders(tmp_path, monkeypatch):
    folder, flock, others = tmp_path / "parts", parts.fcntl.flock, []
    folder.mkdir()

    def slow(descriptor, how):
        if not others:
            (folder / parts.LOCK).unlink()
            others.append(os.open(folder / parts.LOCK, os.O_RDWR | os.O_CREAT))
            flock(others[0], how)
        flock(descriptor, how)

    monkeypatch.setattr(parts.fcntl, "flock", slow)
    assert parts._locked(folder, 0) is None
    os.close(others[0])
    os.close(parts._locked(folder, 0))


def test_shards_that_nobody_comes_back_for_are_removed_after_long(config, tmp_path):
    killed_at(config, 2)
    old = store_path(config).with_name(f".{store_path(config).name}.parts")
    other = dataclasses.replace(config, validation_fraction=0.2)
    prepare(other, lambda line: None, 1)
    assert old.is_dir()
    for path in (*old.rglob("*"), old):
        os.utime(path, (0, 0))
    third = dataclasses.replace(config, validation_fraction=0.3)
    prepare(third, lambda line: None, 1)
    assert not old.exists()


def test_progress_counts_what_is_read(config, monkeypatch):
    monkeypatch.setattr(make, "SHOW_SECONDS", -1.0)
    seen: list[make.Progress] = []
    prepare(config, lambda line: None, 1, seen.append)
    sizes = [os.path.getsize(source.data_files or "") for source in config.sources]
    assert {progress.total for progress in seen} <= set(sizes)
    assert all(0 <= progress.done <= (progress.total or 0) for progress in seen)
    assert seen[-1].documents == 700
    assert [p.documents for p in seen] == sorted(p.documents for p in seen)


# --- shards ---------------------------------------------------------------------------------------


def an_encoder(fraction: float = 0.5) -> Encoder:
    from train.data.tokenizer import token_bytes

    tokenizer = train_bpe(iter(texts_of(50)), TokenizerConfig(vocab_size=300))
    below = fraction * 2**64
    return Encoder(tokenizer, "the tokenizer", 0, token_bytes(tokenizer), np.uint16, below)


def test_shards_end_where_the_documents_say(monkeypatch):
    monkeypatch.setattr(make, "SHARD_DOCUMENTS", 3)
    monkeypatch.setattr(make, "SHARD_CHARACTERS", 10)
    monkeypatch.setattr(make, "LOOK_CHARACTERS", 4)
    texts = ["a", "b", "c", "d" * 10, "e", "f" * 4, "g" * 5, "h"]
    found = list(make.in_shards(texts))
    assert [shard for shard in found if shard is not None] == [
        ["a", "b", "c"],
        ["d" * 10],
        ["e", "f" * 4, "g" * 5],
        ["h"],
    ]
    assert found.count(None) == 1


@pytest.mark.parametrize("fraction", [0.5, 1e-18])
def test_a_shard_is_its_documents_one_by_one(fraction):
    texts = texts_of(30)
    encoder = an_encoder(fraction)
    shard = encoder.shard(texts, "x")
    keys = [document_key(text) for text in texts]
    assert shard.keys.tolist() == keys
    assert shard.is_candidate.tolist() == [
        key < fraction * 2**64 or key == min(keys) for key in keys
    ]
    begin = 0
    for text, length, size in zip(texts, shard.lengths, shard.text_bytes, strict=True):
        ids = encoder.tokenizer.encode(text, add_special_tokens=False).ids
        assert shard.tokens[begin : begin + length].tolist() == [*ids, 0]
        assert size == len(text.encode())
        begin += length
    held = [
        size for size, chosen in zip(shard.text_bytes, shard.is_candidate, strict=True) if chosen
    ]
    assert shard.token_bytes.sum() == sum(held)


@pytest.mark.parametrize("seed", range(4))
def test_a_long_document_in_windows_has_the_tokens_of_the_whole(monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(encode, "LONGEST", rng.choice((700, 1000, 1500)))
    monkeypatch.setattr(encode, "OVERLAP", 300)
    text = " ".join(texts_of(60, seed))
    encoder = an_encoder()
    whole = encoder._window(text)
    calls: list[int] = []

    def window(part: str) -> Encoded:
        calls.append(len(part))
        return encoder._window(part)

    found = in_windows(text, window)
    assert len(calls) > 2 and max(calls) <= encode.LONGEST < len(text)
    assert np.array_equal(found.ids, whole.ids) and whole.offsets is not None
    assert np.array_equal(found.offsets, whole.offsets)


def test_windows_that_never_agree_lose_no_text(monkeypatch):
    monkeypatch.setattr(encode, "LONGEST", 50)
    monkeypatch.setattr(encode, "OVERLAP", 20)
    text = "0123456789" * 30
    encoder = an_encoder()
    found = in_windows(text, encoder._window)
    assert encoder.tokenizer.decode(found.ids.tolist()) == text


def test_what_is_hashed_is_a_byte_and_the_ids_of_every_document():
    shard = an_encoder().shard(texts_of(20), "x")
    is_held_out = shard.is_candidate
    expected = b""
    begin = 0
    for length, held in zip(shard.lengths, is_held_out, strict=True):
        ids = shard.tokens[begin : begin + length].astype(np.int64)
        expected += bytes([int(held)]) + ids.tobytes()
        begin += length
    assert bytes(_stream(shard, is_held_out)) == expected


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("lengths", [[], [3], [1, 4, 2]])
def test_a_file_of_tokens_is_the_one_that_megatron_core_writes(tmp_path, dtype, lengths):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    ours = TokenFile(tmp_path / "ours.bin", dtype)
    for i, length in enumerate(lengths):
        theirs.add_document(torch.arange(i, i + length), [length])
    joined = [np.arange(i, i + length) for i, length in enumerate(lengths)]
    ours.add(np.concatenate([np.empty(0, np.int64), *joined]), np.array(lengths, dtype=np.int64))
    theirs.finalize(str(tmp_path / "theirs.idx"))
    ours.close()
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (
            tmp_path / f"theirs.{kind}"
        ).read_bytes()


def test_the_smallest_key_is_held_out_where_none_is_below_the_share():
    keys = np.array([2**63, 7, 2**64 - 1, 7], dtype=np.uint64)
    assert HeldOut.of(iter([keys]), 0.6).among(keys).tolist() == [True, True, False, True]
    assert HeldOut.of(iter([keys[:2], keys[2:]]), 1e-19).among(keys).tolist() == [
        False,
        True,
        False,
        True,
    ]
    with pytest.raises(ValueError, match="fewer than two different documents"):
        HeldOut.of(iter([keys[1:2], keys[3:]]), 0.5)


# --- processes ------------------------------------------------------------------------------------


def test_a_pool_does_every_task_once_and_starts_no_more_children_than_tasks():
    with Pool(lambda task: (task, os.getpid()), 3) as pool:
        results = list(pool.map([1, None, 2]))
        assert sorted(task for task, _ in results) == [1, 2] and len(pool._children) <= 2
    with Pool(lambda task: (task, os.getpid()), 3) as pool:
        results = list(pool.map(iter(range(50))))
    assert sorted(task for task, _ in results) == list(range(50))
    assert os.getpid() not in {pid for _, pid in results}


def test_a_child_that_dies_or_fails_ends_the_map_with_what_it_did():
    def work(task: int) -> int:
        with doing(f"task {task}"):
            if task == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            if task == 7:
                raise MemoryError
        return task

    for last, said in ((5, "task 5 ended the process that did it by SIGKILL"), (7, "more memory")):
        with pytest.raises(ValueError, match=said), Pool(work, 2) as pool:
            list(pool.map(iter([1, 2, 3, last])))


# --- held-out text of its own ---------------------------------------------------------------------


def texts_in(folder: Path, name: str, end: int) -> list[str]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from train.data.store import TokenStore

    tokenizer = TokenStore(folder).tokenizer()
    found = [ids.tolist() for ids in IndexedDataset(str(folder / name))]
    assert all(ids[-1] == end for ids in found)
    return [tokenizer.decode(ids[:-1]) for ids in found]


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_validation_sources_are_held_out_whole_and_never_trained_on(config, tmp_path, fraction):
    from train.data.store import TokenStore, ValidationRows

    shared = texts_of(400, 400)[:5]
    for name, texts in (("v", [*shared, "only here"]), ("w", ["another one", shared[0]])):
        rows = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    sources = tuple(SourceConfig("json", data_files=str(tmp_path / f"{n}.jsonl")) for n in "vw")
    config = dataclasses.replace(
        config, validation_fraction=fraction, validation=ValidationConfig(sources)
    )
    assert not config.problems()
    lines: list[str] = []
    store = TokenStore(prepare(config, lines.append, 2))
    trained = [texts_in(store.path, f"train_{i}", store.end_of_document) for i in (0, 1)]
    held = texts_in(store.path, "validation", store.end_of_document)
    own = [*shared, "only here", "another one", shared[0]]
    assert held[-len(own) :] == own and not set(held) & {*trained[0], *trained[1]}
    assert sorted({*trained[0], *trained[1], *held}) == sorted(
        {*texts_of(400, 400), *texts_of(300, 300), *own}
    )
    assert (len(held) == len(own)) == (fraction == 0)
    assert any("for being validation text: 5 documents" in line for line in lines)

    # each source's rows are its own tokens, each predicted once
    tokens = np.fromfile(store.path / "validation.bin", dtype=np.uint16).tolist()
    rows_of = ValidationRows(store, 16).by_source
    assert list(rows_of) == ([2, 3] if fraction == 0 else [0, 1, 2, 3])
    joined: list[int] = []
    for rows in rows_of.values():
        parts_of_it = [rows.tokens(i).tolist() for i in range(len(rows))]
        assert all(a[-1] == b[0] for a, b in itertools.pairwise(parts_of_it))
        joined += parts_of_it[0] + [t for part in parts_of_it[1:] for t in part[1:]]
    assert joined == tokens


def test_nothing_held_out_and_weights_of_held_out_text_are_told(config):
    nothing = dataclasses.replace(config, validation_fraction=0.0)
    assert "so nothing is held out" in nothing.problems()[0]
    weighted = ValidationConfig((SourceConfig("sample", weight=2.0, max_epochs=3.0),))
    assert len(dataclasses.replace(config, validation=weighted).problems()) == 2


def test_sources_have_different_names_that_metrics_can_bear():
    sources = (
        SourceConfig("json", data_files="/data/web/*.jsonl"),
        SourceConfig("json", data_files="/data/books.jsonl.zst"),
        SourceConfig("json", data_files="/other/books.jsonl"),
        SourceConfig("HuggingFaceFW/fineweb-edu", name="sample-10BT"),
        SourceConfig("sample", label="plays"),
        SourceConfig("sample", split="test[:10%]"),
    )
    assert labels(sources) == [
        "web",
        "books",
        "books-2",
        "fineweb-edu-sample-10BT",
        "plays",
        "sample-test-10",
    ]
    (problem,) = SourceConfig("sample", label="a/b").problems("data.sources[0]")
    assert "data.sources[0].label is 'a/b'" in problem


# --- a sample for the tokenizer -------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "validation"), [(0.3, False), (1e-18, False), (0.0, True)])
def test_a_tokenizer_of_a_sample_sees_so_many_documents_and_nothing_held_out(
    config, tmp_path, fraction, validation
):
    own = ValidationConfig()
    if validation:
        rows = [json.dumps({"text": text}) for text in texts_of(400, 400)[:100]]
        (tmp_path / "v.jsonl").write_text("\n".join(rows))
        own = ValidationConfig((SourceConfig("json", data_files=str(tmp_path / "v.jsonl")),))
    config = dataclasses.replace(
        config,
        validation_fraction=fraction,
        validation=own,
        tokenizer=TokenizerConfig(vocab_size=300, max_documents=50),
    )
    texts = list(preparing._texts_of_tokenizer(config))
    everything = [*texts_of(400, 400), *texts_of(300, 300)]
    assert len(set(texts)) == len(texts) == 50
    assert texts == [text for text in everything if text in set(texts)]
    store = prepare(config, lambda line: None, 2)
    held = texts_in(store, "validation", 0)
    assert held and not set(texts) & set(held)

    # another order of the sources is another order of the same sample
    turned = dataclasses.replace(config, sources=config.sources[::-1])
    assert set(preparing._texts_of_tokenizer(turned)) == set(texts)
    # all there is where the sample may be larger
    large = dataclasses.replace(config.tokenizer, max_documents=10**6)
    all_of_it = list(preparing._texts_of_tokenizer(dataclasses.replace(config, tokenizer=large)))
    assert set(all_of_it) == set(everything) - set(held)


def test_a_sample_for_a_tokenizer_that_is_given_or_of_nothing_is_told():
    assert "so none is trained" in TokenizerConfig("x", max_documents=5).problems()[0]
    assert "it must be at least 1" in TokenizerConfig(max_documents=0).problems()[0]
