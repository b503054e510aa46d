"""Sources that are tokens already: the same documents whatever holds them, trained on in place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from train.config.data import DataConfig, SourceConfig, TokenizerConfig, ValidationConfig
from train.data import damage
from train.data.prepare import prepare, store_path, train_bpe
from train.data.shards.inspect import inspect
from train.data.store import TokenStore, TrainingSamples, ValidationRows
from train.data.tokens import read

VOCAB, END, SEQ_LEN = 200, 7, 16


def documents(count: int = 120, seed: int = 0) -> list[list[int]]:
    """Different ones, without the id that ends them; the last is a copy of the third."""
    rng = random.Random(seed)
    ids = [i for i in range(VOCAB) if i != END]
    found = [rng.choices(ids, k=rng.randint(1, 40)) for _ in range(count - 1)]
    return [*found, found[2]]


def megatron(path: Path, found: list[list[int]], dtype=np.int32, ended=True) -> str:
    """Written by megatron-core itself."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(path.with_suffix(".bin")), dtype=dtype)
    for ids in found:
        whole = [*ids, END] if ended else ids
        builder.add_document(np.array(whole, dtype=dtype), [len(whole)])
    builder.finalize(str(path.with_suffix(".idx")))
    return str(path.with_suffix(".idx"))


def stream(path: Path, found: list[list[int]], dtype=np.uint16) -> str:
    np.save(path, np.array([i for ids in found for i in (*ids, END)], dtype=dtype))
    return str(path)


def stream_with_ends(path: Path, found: list[list[int]], dtype=np.int64) -> str:
    np.save(path, np.array([i for ids in found for i in ids], dtype=dtype))
    np.save(path.with_suffix(".ends.npy"), np.cumsum([len(ids) for ids in found]))
    return str(path)


def source_of(folder: Path, form: str, found: list[list[int]]) -> SourceConfig:
    """The documents in a form."""
    half = len(found) // 2
    if form == "megatron":
        return SourceConfig("megatron", data_files=megatron(folder / "a", found))
    if form == "megatron without ends":
        file = megatron(folder / "a", found, np.uint16, ended=False)
        return SourceConfig("megatron", data_files=file)
    if form == "two of megatron":
        (folder / "two").mkdir()
        megatron(folder / "two" / "a", found[:half], np.int64)
        megatron(folder / "two" / "b", found[half:], np.uint8, ended=False)
        return SourceConfig("megatron", data_files=str(folder / "two"))
    if form == "stream":
        return SourceConfig("npy", data_files=stream(folder / "a.npy", found))
    assert form == "stream with ends"
    return SourceConfig("npy", data_files=stream_with_ends(folder / "a.npy", found))


FORMS = (
    "megatron",
    "megatron without ends",
    "two of megatron",
    "stream",
    "stream with ends",
)


def config_of(folder: Path, *sources: SourceConfig, **settings) -> DataConfig:
    tokenizer = TokenizerConfig(vocab_size=VOCAB, end_of_document_id=END)
    return dataclasses.replace(
        DataConfig(sources, tokenizer, 0.2, str(folder / "cache")), **settings
    )


def store_of(config: DataConfig, workers: int = 1) -> TokenStore:
    assert not config.problems()
    return TokenStore(prepare(config, lambda line: None, workers))


def key(ids: list[int]) -> int:
    return int.from_bytes(hashlib.sha256(np.array(ids, "<i8").tobytes()).digest()[:8], "big")


def split(found: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Training and held-out documents, each ended: the definition."""
    held = [key(ids) < 0.2 * 2**64 for ids in found]
    return (
        [[*ids, END] for ids, out in zip(found, held, strict=True) if not out],
        [[*ids, END] for ids, out in zip(found, held, strict=True) if out],
    )


def rows_of(store: TokenStore, epochs: int = 2) -> np.ndarray:
    samples = TrainingSamples(store, (1.0,), SEQ_LEN, 1234)
    number = epochs * samples.sources[0].per_epoch
    samples.open(0, number)
    return np.stack([samples.tokens(i) for i in range(number)])


def copied_store(store: TokenStore, folder: Path, trained: list[list[int]]) -> TokenStore:
    """The same as a store of its own tokens, in megatron-core's files."""
    shutil.copytree(store.path, folder)
    for path in folder.glob("train_0*"):
        path.unlink()
    shutil.rmtree(folder / "index_cache", ignore_errors=True)
    megatron(folder / "train_0", [ids[:-1] for ids in trained], np.uint16)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("files", "checksum"):
        manifest.pop(name)
    manifest["sources"][0].pop("files")
    (folder / "manifest.json").write_text(json.dumps(damage.seal(manifest, folder)))
    return TokenStore(folder)


@pytest.mark.parametrize("form", FORMS)
def test_documents_are_the_same_whatever_holds_them(tmp_path, form):
    found = documents()
    store = store_of(config_of(tmp_path, source_of(tmp_path, form, found)))
    trained, held_out = split(found)

    facts = store.manifest["sources"][0]
    assert (facts["documents"], facts["tokens"]) == (len(trained), sum(map(len, trained)))
    assert store.manifest["validation"]["documents"] == len(held_out)
    held = np.fromfile(store.path / "validation.bin", np.uint16).tolist()
    assert held == [i for ids in held_out for i in ids]
    assert not list(store.path.glob("train_0.bin")), "the tokens were copied"

    # megatron-core's own reading of the same training documents
    expected = rows_of(copied_store(store, tmp_path / "copied", trained))
    np.testing.assert_array_equal(rows_of(store), expected)


def test_rows_of_an_array_of_two_dimensions_are_documents(tmp_path):
    found = [[(i * j) % VOCAB for j in range(1, 11)] for i in range(1, 60)]
    np.save(tmp_path / "a.npy", np.array(found, dtype=np.int32))
    config = config_of(tmp_path, SourceConfig("npy", data_files=str(tmp_path / "a.npy")))
    trained, held_out = split([ids[:-1] if ids[-1] == END else ids for ids in found])
    facts = store_of(config).manifest
    assert facts["sources"][0]["documents"] == len(trained)
    assert facts["sources"][0]["tokens"] == sum(map(len, trained))
    assert facts["validation"]["tokens"] == sum(map(len, held_out))


def test_the_store_is_the_same_for_any_number_of_workers_and_goes_on_after_a_kill(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(read, "RANGE_IDS", 300)
    monkeypatch.setattr(damage, "PIECE_BYTES", 64)
    monkeypatch.setattr(read, "PIECE_BYTES", 64)
    config = config_of(tmp_path, source_of(tmp_path, "two of megatron", documents(300)))
    contents = []
    for workers in (1, 3):
        elsewhere = dataclasses.replace(config, cache_dir=str(tmp_path / f"cache{workers}"))
        folder = prepare(elsewhere, lambda line: None, workers)
        contents.append({p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})
    assert contents[0] == contents[1]

    # shards that a killed preparation left are taken over
    parts = tmp_path / "kept"
    broken = dataclasses.replace(config, cache_dir=str(parts))
    with pytest.MonkeyPatch.context() as patch:
        from train.data import prepare as preparing

        patch.setattr(preparing, "_assembled", lambda *_: os._exit(9))
        with pytest.raises(ValueError, match="ended the process"):
            prepare(broken, lambda line: None, 2)
    lines: list[str] = []
    folder = prepare(broken, lines.append, 2)
    assert any("shards of an earlier preparation were kept" in line for line in lines), lines
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == contents[0]


def test_max_documents_takes_the_first_of_all_files(tmp_path):
    found = documents()
    source = source_of(tmp_path, "two of megatron", found)
    for most in (40, 70):
        store = store_of(config_of(tmp_path, dataclasses.replace(source, max_documents=most)))
        trained, held_out = split(found[:most])
        assert store.manifest["sources"][0]["tokens"] == sum(map(len, trained))
        assert rows_of(store).shape[1] == SEQ_LEN + 1
        assert store.manifest["validation"]["documents"] == len(held_out)


def test_validation_documents_are_not_trained_on(tmp_path):
    found = documents()
    (tmp_path / "exam").mkdir()
    exam = source_of(tmp_path / "exam", "stream", [*found[:5], [1, 2, 3]])
    source = source_of(tmp_path, "megatron without ends", found)
    config = config_of(
        tmp_path, source, validation_fraction=0.0, validation=ValidationConfig((exam,))
    )
    facts = store_of(config).manifest
    # found[2] stands twice
    assert facts["sources"][0]["documents"] == len(found) - 6
    assert facts["validation"]["documents"] == 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    texts = (f"one two three {i} four five" for i in range(50))
    train_bpe(texts, TokenizerConfig(vocab_size=300)).save(str(path))
    return str(path)


def test_with_a_tokenizer_there_is_text_and_bits_per_byte(tmp_path, tokenizer):
    from tokenizers import Tokenizer

    made_by = Tokenizer.from_file(tokenizer)
    texts = [f"five four {i} two {'one ' * (i % 5)}" for i in range(80)]
    end = made_by.token_to_id("<|endoftext|>")
    ids = [made_by.encode(text).ids for text in texts]
    np.save(tmp_path / "a.npy", np.array([i for one in ids for i in (*one, end)]))
    (tmp_path / "b.txt").write_text("".join(f"three {i}\n" for i in range(40)))
    config = DataConfig(
        (
            SourceConfig("npy", data_files=str(tmp_path / "a.npy")),
            SourceConfig("text", data_files=str(tmp_path / "b.txt"), sample_by="line"),
        ),
        TokenizerConfig(path=tokenizer),
        0.2,
        str(tmp_path / "cache"),
    )
    store = store_of(config)
    facts = store.manifest
    whole = sum(len(text.encode()) for text in texts)
    parts = [facts["sources"][0], facts["validation"]["sources"][0]]
    assert sum(part["bytes"] for part in parts) == whole
    assert sum(part["documents"] for part in parts) == len(texts)
    rows = ValidationRows(store, SEQ_LEN)
    assert rows.bytes_problem is None and rows.num_bytes(0) is not None

    page, _ = inspect(config, Path(tokenizer))
    assert (page.documents, page.bytes, page.unit) == (len(texts), whole, "tokens")
    assert page.lengths["longest"] == max(map(len, ids)) and page.scripts == {"Latin": 1.0}


def test_without_a_tokenizer_text_is_refused_and_bits_per_byte_are_left_out(tmp_path):
    store = store_of(config_of(tmp_path, source_of(tmp_path, "stream", documents())))
    with pytest.raises(ValueError, match=r"has no tokenizer.*data\.tokenizer\.path"):
        store.tokenizer()
    rows = ValidationRows(store, SEQ_LEN)
    assert rows.num_bytes(0) is None and "there is no tokenizer" in str(rows.bytes_problem)
    (page,) = inspect(config_of(tmp_path, source_of(tmp_path, "stream", documents())), None)
    assert page.duplicates == 1 and page.bytes_per_token is None


# --- what is refused ------------------------------------------------------------------------------


def test_an_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path):
    found = documents()
    found[50][0] = VOCAB
    place = sum(len(ids) + 1 for ids in found[:50])
    config = config_of(tmp_path, source_of(tmp_path, "megatron", found))
    with pytest.raises(ValueError, match=rf"a\.bin: token {place:,} is {VOCAB}.*below {VOCAB}"):
        prepare(config, lambda line: None, 1)
    assert not store_path(config).exists()
    (tmp_path / "n").mkdir()
    np.save(tmp_path / "n" / "a.npy", np.array([3, 4, -1, END], dtype=np.int16))
    config = config_of(tmp_path, SourceConfig("npy", data_files=str(tmp_path / "n")))
    with pytest.raises(ValueError, match="token 2 is -1"):
        prepare(config, lambda line: None, 1)


class Planted:
    def __reduce__(self):
        return os.mkdir, ("planted",)


def test_nothing_in_an_array_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.npy").write_bytes(pickle.dumps(Planted()))
    np.save(tmp_path / "b.npy", np.array([[1, 2], [3]], dtype=object), allow_pickle=True)
    np.save(tmp_path / "c.npy", np.array([1, 2, END], dtype=np.int32))
    (tmp_path / "c.ends.npy").write_bytes(pickle.dumps(Planted()))
    for name in ("a", "b", "c"):
        config = config_of(tmp_path, SourceConfig("npy", data_files=f"{name}.npy"))
        with pytest.raises(ValueError, match="is no array of numbers"):
            prepare(config, lambda line: None, 1)
    assert not (tmp_path / "planted").exists()


def test_what_is_no_store_or_no_array_of_ids_is_named(tmp_path):
    (tmp_path / "m").mkdir()
    good = Path(megatron(tmp_path / "m" / "a", documents()))
    head = good.read_bytes()
    spoilt = {
        "cut": head[:-8],
        "head": b"x" + head[1:],
        "floats": head[:17] + bytes([7]) + head[18:],
        "short": head,
        "kinds": head + bytes(len(documents())),
        "order": head[: 34 + 4 * 120] + bytes(8 * 119) + head[34 + 4 * 120 + 8 * 119 :],
        "alone": head,
    }
    says = {
        "cut": "it is cut short",
        "head": "is no index",
        "floats": "type 7",
        "short": "divides",
        "kinds": "several kinds",
        "order": "one after another",
        "alone": "is missing",
    }
    for name, content in spoilt.items():
        (tmp_path / f"{name}.idx").write_bytes(content)
        tokens = good.with_suffix(".bin").read_bytes()
        if name != "alone":
            (tmp_path / f"{name}.bin").write_bytes(tokens[:-4] if name == "short" else tokens)
        config = config_of(tmp_path, SourceConfig("megatron", data_files=str(tmp_path / name)))
        with pytest.raises(ValueError, match=says[name]):
            prepare(config, lambda line: None, 1)

    for name, array in {
        "float": np.zeros(4),
        "three": np.zeros((2, 2, 2), int),
        "columns": np.asfortranarray(np.ones((3, 4), int)),
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
        config = config_of(tmp_path, SourceConfig("npy", data_files=str(tmp_path / f"{name}.npy")))
        with pytest.raises(ValueError, match=r"ids are whole numbers"):
            prepare(config, lambda line: None, 1)
    np.save(tmp_path / "e.npy", np.ones(9, int))
    np.save(tmp_path / "e.ends.npy", np.array([4, 10]))
    config = config_of(tmp_path, SourceConfig("npy", data_files=str(tmp_path / "e.npy")))
    with pytest.raises(ValueError, match=r"grow up to 9"):
        prepare(config, lambda line: None, 1)


def test_tokens_that_change_later_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(damage, "PIECE_BYTES", 64)
    monkeypatch.setattr(read, "PIECE_BYTES", 64)
    config = config_of(tmp_path, source_of(tmp_path, "megatron", documents()))
    store = store_of(config)
    rows_of(store)
    tokens = tmp_path / "a.bin"
    content = bytearray(tokens.read_bytes())
    for place in (0, len(content) // 2, len(content) - 4):
        content[place] ^= 1
        tokens.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.bin has another checksum.*was changed after"):
            rows_of(TokenStore(store.path))
        content[place] ^= 1
    tokens.write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"a\.bin has \d+ bytes instead of"):
        rows_of(TokenStore(store.path))
    tokens.unlink()
    with pytest.raises(ValueError, match=r"a\.bin is gone"):
        rows_of(TokenStore(store.path))


def test_settings_that_do_nothing_to_tokens_and_missing_ones_are_refused(tmp_path):
    tokens, text = SourceConfig("npy", data_files="a.npy"), SourceConfig("sample")
    none, own = TokenizerConfig(), TokenizerConfig(path="t.json")
    given = TokenizerConfig(end_of_document_id=3)
    for config, said in (
        (DataConfig((tokens,), none), "data.tokenizer.end_of_document_id is null"),
        (DataConfig((tokens, text), none), "data.tokenizer.path is null"),
        (DataConfig((text,), given), "data.tokenizer.end_of_document_id is 3"),
        (
            DataConfig((tokens,), dataclasses.replace(own, end_of_document_id=3)),
            "drop it",
        ),
        (
            DataConfig((tokens,), TokenizerConfig(end_of_document_id=40000)),
            "between 0 and 32767",
        ),
        (
            DataConfig((tokens,), dataclasses.replace(given, max_documents=4)),
            "no tokenizer is trained",
        ),
        (DataConfig((tokens,), own, format="chat"), "holds no conversations"),
        *(
            (
                DataConfig((dataclasses.replace(tokens, **{name: value}),), own),
                f"data.sources[0].{name} is {value!r}, which acts on text only",
            )
            for name, value in (
                ("text_column", "body"),
                ("sample_by", "line"),
                ("split", "x"),
                ("name", "y"),
            )
        ),
    ):
        problems = config.problems()
        assert any(said in problem for problem in problems), (said, problems)
    assert not DataConfig((tokens,), given).problems()
    assert not DataConfig((tokens, text), own).problems()
