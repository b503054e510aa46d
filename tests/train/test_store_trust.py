"""A token store is read only when it is ours, and only those of its tokens that are what was
written.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from train.config.data import DataConfig, SourceConfig, TokenizerConfig
from train.data import damage
from train.data.prepare import prepare
from train.data.store import TokenStore, TrainingSamples, ValidationRows

SEQ_LEN = 32


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """A store whose token files count as large, with pieces of 64 bytes."""
    monkeypatch.setattr(damage, "SMALL_BYTES", 64)
    monkeypatch.setattr(damage, "PIECE_BYTES", 64)
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(
            json.dumps({"text": f"document {i} " + "abc xyz " * (i % 7 + 1)}) + "\n"
            for i in range(60)
        )
    )
    config = DataConfig(
        (SourceConfig("json", data_files=str(text)),),
        TokenizerConfig(vocab_size=300),
        0.2,
        str(tmp_path / "cache"),
    )
    return prepare(config, lambda _: None)


def samples(store: Path) -> TrainingSamples:
    found = TrainingSamples(TokenStore(store), (1.0,), SEQ_LEN, 1234)
    found.open(0, found.sources[0].per_epoch)
    return found


def rows(store: Path, split: str) -> list[np.ndarray]:
    if split == "validation":
        held_out = ValidationRows(TokenStore(store), SEQ_LEN)
        return [held_out.tokens(i) for i in range(len(held_out))]
    found = samples(store)
    return [found.tokens(i) for i in range(found.sources[0].per_epoch)]


@pytest.mark.parametrize("split", ["train_0", "validation"])
def test_no_flipped_bit_of_a_large_token_file_is_read(store, split):
    before = rows(store, split)
    path = store / f"{split}.bin"
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(
            ValueError, match=f"{path.name} has another checksum between bytes {at // 64 * 64} "
        ):
            rows(store, split)
    path.write_bytes(whole)
    assert all(np.array_equal(a, b) for a, b in zip(before, rows(store, split), strict=True))


def test_rows_away_from_the_damage_are_still_read(store):
    path = store / "validation.bin"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 128
    path.write_bytes(damaged)
    held_out = ValidationRows(TokenStore(store), SEQ_LEN)
    held_out.tokens(0)
    with pytest.raises(ValueError, match="another checksum"):
        held_out.tokens(len(held_out) - 1)


def test_the_table_of_checksums_is_verified_itself(store):
    path = store / "train_0.bin.crc"
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(ValueError, match=r"train_0\.bin\.crc has another checksum"):
        samples(store)


@pytest.mark.parametrize("split", ["train_0", "validation"])
def test_ids_beyond_the_vocabulary_are_refused_in_stores_without_checksums(store, split):
    manifest = json.loads((store / "manifest.json").read_text())
    for key in ("files", "checksum"):
        del manifest[key]
    (store / "manifest.json").write_text(json.dumps(manifest))
    rows(store, split)
    path = store / f"{split}.bin"
    tokens = np.fromfile(path, dtype=np.uint16)
    tokens[len(tokens) // 2] = manifest["vocab_size"]
    tokens.tofile(path)
    with pytest.raises(ValueError, match="outside of the vocabulary of 300"):
        rows(store, split)


class Planted:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def plant(cache: Path, name: str, mark: Path) -> None:
    """A pickle for one file of an index cache, in a manifest that fits it."""
    (cache / name).write_bytes(pickle.dumps(Planted(mark)))
    files = {
        p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in cache.iterdir()
        if p.name != "manifest.json"
    }
    (cache / "manifest.json").write_text(json.dumps({"files": files}))


def test_nothing_in_an_index_cache_is_executed(store, tmp_path):
    samples(store)
    cache, mark = next((store / "index_cache").iterdir()), tmp_path / "executed"
    names = sorted(path.name for path in cache.glob("*.npy"))
    assert len(names) == 3
    for name in names:
        honest = (cache / name).read_bytes()
        plant(cache, name, mark)
        with pytest.raises(ValueError, match="no plain array of numbers"):
            samples(store)
        (cache / name).write_bytes(honest)
    array_of_objects = np.array([Planted(mark)], dtype=object)
    np.save(cache / names[0], array_of_objects, allow_pickle=True)
    plant(cache, names[1], mark)
    with pytest.raises(ValueError, match="no plain array of numbers"):
        samples(store)
    assert not mark.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_store_of_another_user_is_not_read(store):
    os.chown(store, 65534, 65534)
    with pytest.raises(ValueError, match="belongs to user 65534"):
        TokenStore(store)
    os.chown(store, 0, 0)
    os.chown(store / "train_0.bin", 65534, 65534)
    with pytest.raises(ValueError, match=r"train_0\.bin belongs to user 65534"):
        samples(store)


def test_a_store_that_everybody_can_write_is_not_read(store):
    store.chmod(0o777)
    with pytest.raises(ValueError, match="chmod -R o-w"):
        TokenStore(store)
    store.chmod(0o755)
    (store / "tokenizer.json").chmod(0o666)
    with pytest.raises(ValueError, match=r"tokenizer\.json can be written by everybody"):
        TokenStore(store).tokenizer()


def test_an_index_cache_of_another_user_is_made_again(store):
    samples(store)
    cache = next((store / "index_cache").iterdir())
    cache.chmod(0o777)
    (cache / "left-by-a-stranger.npy").write_bytes(b"x")
    samples(store)
    assert not (cache / "left-by-a-stranger.npy").exists()
