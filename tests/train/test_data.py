"""Data: from files to a token store, from the store to batches, and the order of it all."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from model.loss import IGNORE_INDEX
from model.request import TokenBatch
from train.config.data import DataConfig, SourceConfig, TokenizerConfig, ValidationConfig
from train.data.loader import Batch, TrainingLoader, pack, validation_batches
from train.data.prepare import fingerprint, prepare, store_path, train_bpe, unigram_entropy
from train.data.sources import documents
from train.data.store import TokenStore, TrainingSamples, ValidationRows

EOD = 0  # of hand-made rows
SEQ_LEN = 16


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets"))
        )
        yield


def make_texts(count: int, seed: int = 0, letters: str = "abcdefghijklmé€😀") -> list[str]:
    """Different documents of 5 to 40 words, some characters of several bytes."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(letters, k=rng.randint(1, 7))) for _ in range(60)]
    return [
        f"{' '.join(rng.choices(words, k=rng.randint(5, 40)))} {letters[0] * i}"
        for i in range(count)
    ]


def write(path: Path, texts: list[str], column: str = "text") -> str:
    """Write one document per row (json, parquet) or line (txt)."""
    if path.suffix == ".json":
        path.write_text(
            "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))
        )
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(
            pyarrow.table({"id": list(range(len(texts))), column: texts}), path
        )
    else:
        path.write_text("".join(text + "\n" for text in texts))
    return str(path)


def data_config(
    folder: Path, *sources: SourceConfig, fraction: float = 0.2, **tokenizer
) -> DataConfig:
    return DataConfig(
        sources,
        TokenizerConfig(**{"vocab_size": 300, **tokenizer}),
        fraction,
        str(folder / "cache"),
    )


def lines(path: Path, texts: list[str], **options) -> SourceConfig:
    return SourceConfig("text", data_files=write(path, texts), sample_by="line", **options)


def make_store(config: DataConfig) -> TokenStore:
    return TokenStore(prepare(config, report=lambda line: None))


def stored_ids(store: TokenStore, name: str) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [ids.tolist() for ids in IndexedDataset(str(store.path / name))]


def stored_texts(store: TokenStore, name: str) -> list[str]:
    tokenizer = store.tokenizer()
    for ids in stored_ids(store, name):
        assert ids.index(store.end_of_document) == len(ids) - 1
    return [tokenizer.decode(ids[:-1]) for ids in stored_ids(store, name)]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    folder = tmp_path_factory.mktemp("store")
    return make_store(data_config(folder, lines(folder / "a.txt", make_texts(60))))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> TokenStore:
    """Two sources that share no letter; the first is smaller."""
    folder = tmp_path_factory.mktemp("mixture")
    return make_store(
        data_config(
            folder,
            lines(folder / "a.txt", make_texts(90, letters="abcdefg")),
            lines(folder / "n.txt", make_texts(120, 1, letters="nopqrst")),
        )
    )


# --- prepare --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "json", "parquet"])
def test_a_store_holds_every_document_once_and_counts_it(tmp_path, kind):
    texts = make_texts(40)
    path = write(
        tmp_path / f"data.{kind.replace('text', 'txt')}",
        texts,
        column="body" if kind == "json" else "text",
    )
    source = SourceConfig(
        kind, data_files=path, sample_by="line", text_column="body" if kind == "json" else "text"
    )
    store = make_store(data_config(tmp_path, source))
    kept, held_out = stored_texts(store, "train_0"), stored_texts(store, "validation")
    assert sorted(kept + held_out) == sorted(texts)
    for name, found, count in (
        ("train_0", kept, store.manifest["sources"][0]),
        ("validation", held_out, store.manifest["validation"]),
    ):
        assert count["documents"] == len(found) > 0
        assert count["bytes"] == sum(len(text.encode()) for text in found)
        assert count["tokens"] == sum(len(ids) for ids in stored_ids(store, name))
    # the order of the source
    assert [text for text in texts if text in set(kept)] == kept
    assert store.vocab_size == store.tokenizer().get_vocab_size() == len(store.token_bytes()) <= 300
    assert store.tokenizer().id_to_token(store.end_of_document) == "<|endoftext|>"


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("line", {"one", "two", "three", "four", "five"}),
        ("paragraph", {"one\ntwo", "three", "four", "five"}),
        ("document", {"one\ntwo\n\nthree\n", "four\n\nfive\n"}),
    ],
)
def test_sample_by_says_what_a_document_of_a_text_file_is(tmp_path, sample_by, expected):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "b.txt").write_text("four\n\nfive\n")
    (tmp_path / "c.md").write_text("not asked for")
    found = list(
        documents(SourceConfig("text", data_files=str(tmp_path / "*.txt"), sample_by=sample_by))
    )
    assert {text.strip() for text in found} == {text.strip() for text in expected} and len(
        found
    ) == len(expected)


def test_empty_documents_are_left_out_and_max_documents_counts_the_rest(tmp_path):
    path = write(tmp_path / "data.json", ["", "one", "  \n", "two", "three"])
    assert list(documents(SourceConfig("json", data_files=path))) == ["one", "two", "three"]
    assert list(documents(SourceConfig("json", data_files=path, max_documents=2))) == ["one", "two"]


def test_preparing_again_does_nothing(tmp_path):
    config, reports = data_config(tmp_path, lines(tmp_path / "a.txt", make_texts(10))), []
    first = prepare(config, report=reports.append)
    assert reports
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    reports.clear()
    assert prepare(config, report=reports.append) == first == store_path(config)
    assert not reports and {p: p.stat().st_mtime_ns for p in first.rglob("*")} == before


def test_a_changed_file_makes_a_new_store_and_keeps_the_old(tmp_path):
    texts = make_texts(20)
    config = data_config(tmp_path, lines(tmp_path / "a.txt", texts))
    old = make_store(config)
    write(tmp_path / "a.txt", [*texts, "one more"])
    new = make_store(config)
    assert new.path != old.path and new.manifest["fingerprint"] == new.path.name
    assert "one more" in stored_texts(new, "train_0") + stored_texts(new, "validation")
    assert sorted(stored_texts(old, "train_0") + stored_texts(old, "validation")) == sorted(texts)


def test_an_edit_of_the_same_size_within_a_second_is_seen(tmp_path):
    config = data_config(tmp_path, lines(tmp_path / "a.txt", make_texts(5)))
    os.utime(tmp_path / "a.txt", ns=(10**18, 10**18))
    before = fingerprint(config)
    os.utime(tmp_path / "a.txt", ns=(10**18, 10**18 + 5 * 10**8))
    assert fingerprint(config) != before


def test_the_fingerprint_covers_what_a_store_is_made_from_and_nothing_else(tmp_path):
    source = lines(tmp_path / "a.txt", make_texts(5))

    def key(folder: str = "x", fraction: float = 0.2, vocab_size: int = 300, **options) -> str:
        return fingerprint(
            data_config(
                tmp_path / folder,
                dataclasses.replace(source, **options),
                fraction=fraction,
                vocab_size=vocab_size,
            )
        )

    assert key() == key(folder="elsewhere") == key(weight=3.0)
    assert len({key(), key(fraction=0.3), key(vocab_size=310), key(max_documents=3)}) == 4


def test_a_failed_preparation_leaves_nothing_behind(tmp_path):
    config = data_config(tmp_path, lines(tmp_path / "a.txt", ["one", "another"]), fraction=0.999999)
    with pytest.raises(
        ValueError, match=r"left no training document; lower data\.validation_fraction"
    ):
        prepare(config, report=lambda line: None)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_incomplete_folder_is_replaced(tmp_path):
    config = data_config(tmp_path, lines(tmp_path / "a.txt", make_texts(10)))
    store_path(config).mkdir(parents=True)
    (store_path(config) / "train_0.bin").write_text("half")
    store = make_store(config)
    assert (
        store.manifest["sources"][0]["documents"] + store.manifest["validation"]["documents"] == 10
    )


# --- the held-out split ---------------------------------------------------------------------------


def test_held_out_documents_never_stand_in_training(tmp_path):
    shared, own = make_texts(60), make_texts(30, seed=1)
    store = make_store(
        data_config(
            tmp_path,
            lines(tmp_path / "a.txt", shared + shared[:20]),
            lines(tmp_path / "b.txt", own + shared[10:40]),
            fraction=0.3,
        )
    )
    held_out = stored_texts(store, "validation")
    kept = stored_texts(store, "train_0") + stored_texts(store, "train_1")
    assert held_out and not set(held_out) & set(kept)
    assert sorted(held_out + kept) == sorted(shared + shared[:20] + own + shared[10:40])
    assert len(held_out) > len(set(held_out))  # duplicates went along


def test_the_one_forced_held_out_document_stands_in_no_other_source(tmp_path):
    shared = make_texts(10)
    store = make_store(
        data_config(
            tmp_path,
            lines(tmp_path / "a.txt", shared),
            lines(tmp_path / "b.txt", shared),
            fraction=1e-12,
        )
    )
    held_out = stored_texts(store, "validation")
    assert held_out and not set(held_out) & set(
        stored_texts(store, "train_0") + stored_texts(store, "train_1")
    )


def test_the_share_held_out_is_the_one_asked_for_and_at_least_one(tmp_path):
    source = lines(tmp_path / "a.txt", make_texts(400))
    manifest = make_store(data_config(tmp_path, source, fraction=0.25)).manifest
    assert 70 <= manifest["validation"]["documents"] <= 130
    assert manifest["validation"]["documents"] + manifest["sources"][0]["documents"] == 400
    assert (
        make_store(data_config(tmp_path, source, fraction=1e-12)).manifest["validation"][
            "documents"
        ]
        == 1
    )


def test_a_source_that_holds_nothing_out_is_told(tmp_path):
    many = lines(tmp_path / "a.txt", make_texts(400), label="many")
    few = lines(tmp_path / "b.txt", make_texts(1, seed=1), label="few")
    told = []
    config = data_config(tmp_path, many, few, fraction=0.05)
    manifest = json.loads((prepare(config, told.append) / "manifest.json").read_text())
    documents = manifest["validation"]["documents"]
    line = f"held out: {documents} documents ({documents} of many, 0 of few), "
    assert any(text.startswith(line) for text in told), told
    without = [text for text in told if "holds nothing out" in text]
    assert len(without) == 1 and without[0].startswith("source few holds nothing out, so the ")

    # where it is meant, nothing is said
    exam = lines(tmp_path / "c.txt", make_texts(5, seed=2), label="exam")
    meant = dataclasses.replace(
        config, validation_fraction=0.0, validation=ValidationConfig((exam,))
    )
    told.clear()
    prepare(meant, told.append)
    assert any("(0 of many, 0 of few, 5 of exam)" in text for text in told)
    assert not any("holds nothing out" in text for text in told)


def test_new_documents_do_not_move_old_ones_across_the_split(tmp_path):
    texts = make_texts(60)
    before = make_store(data_config(tmp_path, lines(tmp_path / "a.txt", texts[:30])))
    after = make_store(data_config(tmp_path, lines(tmp_path / "b.txt", texts)))
    assert set(stored_texts(before, "validation")) == set(stored_texts(after, "validation")) & set(
        texts[:30]
    )


# --- tokenizer and its statistics -----------------------------------------------------------------


def test_token_bytes_add_up_to_the_bytes_of_the_text(store):
    lengths = store.token_bytes()
    assert lengths[store.end_of_document] == 0
    for name, count in (
        ("train_0", store.manifest["sources"][0]),
        ("validation", store.manifest["validation"]),
    ):
        ids = np.concatenate(stored_ids(store, name))
        assert lengths[ids].sum() == count["bytes"]
        assert (ids == store.end_of_document).sum() == count["documents"]


def test_a_text_that_spells_the_end_token_stays_one_document(tmp_path):
    text = "before <|endoftext|> after"
    store = make_store(
        data_config(tmp_path, lines(tmp_path / "a.txt", [*make_texts(10), text]), fraction=1e-12)
    )
    assert text in stored_texts(store, "train_0") + stored_texts(store, "validation")


def test_unigram_entropy_is_that_of_the_held_out_tokens(store):
    assert unigram_entropy(np.array([2, 1, 1, 0])) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy(np.array([0, 7])) == 0.0 and math.isnan(
        unigram_entropy(np.zeros(3, dtype=np.int64))
    )
    ids = [i for document in stored_ids(store, "validation") for i in document]
    shares = [n / len(ids) for n in collections.Counter(ids).values()]
    assert store.unigram_entropy == pytest.approx(-sum(p * math.log(p) for p in shares))


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_given_tokenizer_is_used_as_it_is(tmp_path, store, as_folder):
    path = store.path if as_folder else store.path / "tokenizer.json"
    other = make_store(
        data_config(tmp_path, lines(tmp_path / "b.txt", make_texts(20, seed=5)), path=str(path))
    )
    assert other.vocab_size == store.vocab_size and other.end_of_document == store.end_of_document
    assert other.tokenizer().to_str() == store.tokenizer().to_str()


def test_a_tokenizer_without_the_end_token_is_refused(tmp_path, store):
    source = lines(tmp_path / "b.txt", make_texts(20))
    with pytest.raises(ValueError, match=r"no token '<eot>'; set data.tokenizer.end_of_document"):
        prepare(
            data_config(tmp_path, source, path=str(store.path), end_of_document="<eot>"),
            report=print,
        )


def test_a_missing_tokenizer_is_named(tmp_path):
    config = data_config(
        tmp_path, lines(tmp_path / "b.txt", make_texts(20)), path=str(tmp_path / "nowhere.json")
    )
    with pytest.raises(ValueError, match=r"data.tokenizer.path: .*nowhere.json does not exist"):
        prepare(config)


def test_training_a_tokenizer_is_deterministic():
    first, second = (
        train_bpe(iter(make_texts(30)), TokenizerConfig(vocab_size=280)) for _ in range(2)
    )
    assert first.to_str() == second.to_str() and first.get_vocab_size() == 280


# --- sources that cannot be read ------------------------------------------------------------------


def refused(source: SourceConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(documents(source))


def test_missing_files_are_named(tmp_path):
    refused(
        SourceConfig("text", data_files=str(tmp_path / "none.txt")), r"no file matches .*none.txt"
    )
    refused(SourceConfig("json", data_files=str(tmp_path / "*.json")), r"no file matches .*\*.json")


def test_a_wrong_text_column_is_answered_with_the_columns_there_are(tmp_path):
    path = write(tmp_path / "data.json", make_texts(3))
    wrong = SourceConfig("json", data_files=path, text_column="body")
    refused(wrong, r"columns \['id', 'text'\], not text_column 'body'")
    refused(SourceConfig("json", data_files=path, text_column="id"), "'id' holds int, not text")


def test_a_broken_file_is_refused_with_its_source(tmp_path):
    (tmp_path / "bad.json").write_text('{"text": "ok"}\n{"text": ')
    refused(
        SourceConfig("json", data_files=str(tmp_path / "bad.json")), "source 'bad' cannot be read"
    )
    path = write(tmp_path / "data.json", make_texts(3))
    refused(
        SourceConfig("json", data_files=path, split="test"),
        "source 'data-test' cannot be read: .*test",
    )


def test_an_unreachable_hub_name_points_to_the_offline_ways():
    refused(
        SourceConfig("nobody-at-all/no-such-dataset"),
        r"cannot reach .*Offline, use data=sample, or data=files",
    )


def test_a_source_shorter_than_a_sample_is_refused(store):
    tokens = store.manifest["sources"][0]["tokens"]
    with pytest.raises(
        ValueError, match=f"has {tokens} training tokens, fewer than train.seq_len {tokens} \\+ 1"
    ):
        TrainingSamples(store, (1.0,), tokens, seed=0)
    with pytest.raises(ValueError, match=f"data source plays has {tokens} training tokens"):
        TrainingSamples(store, (1.0,), tokens, seed=0, names=("plays",))
    assert TrainingSamples(store, (1.0,), tokens - 1, seed=0).sources[0].per_epoch == 1


# --- packing --------------------------------------------------------------------------------------


def check_batch(batch: Batch) -> None:
    """What holds for every batch: cu_seqlens and positions tell the same story."""
    lengths = batch.cu_seqlens.diff()
    assert (
        batch.cu_seqlens[0] == 0
        and batch.cu_seqlens[-1] == batch.input_ids.numel()
        and (lengths > 0).all()
    )
    assert torch.equal(torch.cat([torch.arange(n) for n in lengths]), batch.positions.flatten())
    assert batch.max_seqlen == int(lengths.max()) and batch.cu_seqlens.dtype == torch.int32
    assert (batch.positions[:, 0] == 0).all()  # no document crosses rows


def test_positions_restart_after_end_of_document_and_the_next_token_is_no_target():
    batch = pack(
        [np.array([5, 6, EOD, 7, 8, 9, EOD, 4, 3]), np.array([EOD, EOD, 5, 6, 7, 8, 9, 1, EOD])],
        8,
        EOD,
    )
    check_batch(batch)
    assert batch.input_ids.tolist() == [[5, 6, 0, 7, 8, 9, 0, 4], [0, 0, 5, 6, 7, 8, 9, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 0, 1, 2, 3, 4, 5]]
    ignore = IGNORE_INDEX
    assert batch.targets.tolist() == [
        [6, 0, ignore, 8, 9, 0, ignore, 3],
        [ignore, ignore, 6, 7, 8, 9, 1, 0],
    ]
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 8, 9, 10, 16] and batch.max_seqlen == 6
    assert batch.token_mask is None and batch.num_tokens == 16 and batch.num_targets == 12


def test_short_rows_are_padded_and_masked():
    batch = pack(
        [
            np.array([5, 6, 7, 8, 9]),
            np.array([5, EOD, 7]),
            np.array([5, 6, EOD]),
            np.array([7]),
            np.empty(0, dtype=np.int64),
        ],
        4,
        EOD,
    )
    check_batch(batch)
    assert batch.token_mask.tolist() == [
        [True] * 4,
        [True, True, False, False],
        [True, True, False, False],
        [False] * 4,
        [False] * 4,
    ]
    assert batch.positions.tolist() == [
        [0, 1, 2, 3],
        [0, 1, 0, 1],
        [0, 1, 0, 1],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]
    ignore = IGNORE_INDEX
    assert batch.targets.tolist() == [
        [6, 7, 8, 9],
        [EOD, ignore, ignore, ignore],
        [6, EOD, ignore, ignore],
        [ignore] * 4,
        [ignore] * 4,
    ]
    assert (batch.input_ids[~batch.token_mask] == EOD).all()
    assert batch.num_tokens == 8 and batch.num_targets == 7


def test_random_rows_pack_by_the_same_rules():
    rng = np.random.default_rng(0)
    for _ in range(30):
        rows = [rng.integers(0, 4, rng.integers(0, 14)) for _ in range(4)]
        batch = pack(rows, 13, EOD)
        check_batch(batch)
        for row, inputs, targets, positions in zip(
            rows,
            batch.input_ids.tolist(),
            batch.targets.tolist(),
            batch.positions.tolist(),
            strict=True,
        ):
            position, length = 0, max(0, len(row) - 1)
            for i in range(length):
                assert inputs[i] == row[i] and positions[i] == position
                assert targets[i] == (IGNORE_INDEX if row[i] == EOD else row[i + 1])
                position = 0 if row[i] == EOD else position + 1
            assert targets[length:] == [IGNORE_INDEX] * (13 - length)


def test_a_batch_moves_to_the_device_as_the_model_takes_it():
    inputs = pack([np.arange(1, 6)], 4, EOD).inputs(torch.device("cpu"))
    assert isinstance(inputs, TokenBatch) and inputs.input_ids.tolist() == [[1, 2, 3, 4]]
    assert inputs.targets.tolist() == [[2, 3, 4, 5]] and inputs.positions.tolist() == [[0, 1, 2, 3]]
    assert inputs.cu_seqlens.tolist() == [0, 4] and inputs.cu_seqlens.dtype == torch.int32
    assert inputs.token_mask is None and inputs.token_ids is None and inputs.max_seqlen == 4


def test_the_parts_of_rows_that_ranks_share_are_the_rows():
    rows = [np.array([5, 6, EOD, 7, 8, 9, EOD, 4, 3]), np.array([4, 5, 6])]
    whole = pack(rows, 8, EOD)
    parts = [whole.part(rank, 4) for rank in range(4)]
    assert whole.part(0, 1) is whole

    # Targets were settled before the cut: the last token of a part is asked for the first of the
    # next one, and a document that goes on is one document.
    for name in ("input_ids", "targets", "positions", "token_mask"):
        together = torch.cat([getattr(part, name) for part in parts], 1)
        assert torch.equal(together, getattr(whole, name)), name
    assert parts[0].targets[0].tolist() == [6, EOD] and parts[1].targets[0, -1] == 8
    assert sum(part.num_targets for part in parts) == whole.num_targets
    assert sum(part.num_tokens for part in parts) == whole.num_tokens
    for ahead in (1, 2, 3):
        assert sum(part.num_targets_ahead(ahead) for part in parts) == whole.num_targets_ahead(
            ahead
        )

    # What the model gets is of this part, and attention's tables of whole rows.
    inputs = parts[2].inputs(torch.device("cpu"))
    assert inputs.input_ids.tolist() == whole.input_ids[:, 4:6].tolist() and inputs.first == 4
    assert torch.equal(inputs.rows.input_ids, whole.input_ids)
    assert torch.equal(inputs.cu_seqlens, whole.cu_seqlens)
    assert torch.equal(inputs.own(whole.positions), parts[2].positions)


# --- training order -------------------------------------------------------------------------------

# data_size, micro_batch_size, micro-batches: 8 samples a step
LAYOUTS = ((1, 4, 2), (2, 2, 2), (4, 1, 2), (2, 1, 4), (1, 8, 1), (8, 1, 1))


def samples_of(
    store: TokenStore, weights: tuple[float, ...] = (1.0,), seed: int = 0
) -> TrainingSamples:
    return TrainingSamples(store, weights, SEQ_LEN, seed)


def run_steps(
    store: TokenStore,
    layout: tuple[int, int, int],
    steps: int,
    consumed: int = 0,
    weights: tuple[float, ...] = (1.0,),
) -> list[list[int]]:
    """Inputs of all samples of `steps` steps, slice by slice and rank by rank."""
    data_size, micro_batch_size, num_micro_batches = layout
    loaders = [
        TrainingLoader(
            samples_of(store, weights),
            SEQ_LEN,
            micro_batch_size,
            store.end_of_document,
            rank,
            data_size,
        )
        for rank in range(data_size)
    ]
    rows = []
    for loader in loaders:
        loader.consumed_samples = consumed
    for _ in range(steps):
        shares = [loader.next_step(num_micro_batches) for loader in loaders]
        assert {len(share) for share in shares} == {num_micro_batches}
        for micro in range(num_micro_batches):
            for share in shares:
                check_batch(share[micro])
                assert share[micro].input_ids.shape == (micro_batch_size, SEQ_LEN)
                rows += share[micro].input_ids.tolist()
    assert {loader.consumed_samples for loader in loaders} == {consumed + len(rows)}
    return rows


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_takes_the_same_samples_in_the_same_order(mixture, layout):
    expected = run_steps(mixture, LAYOUTS[0], 3, weights=(1.0, 2.0))
    assert run_steps(mixture, layout, 3, weights=(1.0, 2.0)) == expected
    assert len({tuple(row) for row in expected}) == 24


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resuming_on_other_ranks_repeats_and_skips_nothing(store, layout):
    whole = run_steps(store, (1, 4, 2), 4)
    assert run_steps(store, (1, 4, 2), 2) + run_steps(store, layout, 2, consumed=16) == whole


def test_the_order_does_not_depend_on_how_much_will_be_read(mixture):
    patient, hasty = samples_of(mixture, (1.0, 2.0)), samples_of(mixture, (1.0, 2.0))
    # looks far ahead first: the blend is laid out for more samples
    hasty.open(5000, 5001)
    for index in range(0, 40, 8):
        patient.open(index, index + 8)
    hasty.open(0, 40)
    assert all(np.array_equal(patient.tokens(i), hasty.tokens(i)) for i in range(40))


def test_the_order_follows_the_seed(store):
    first, same, other = (samples_of(store, seed=s) for s in (0, 0, 1))
    for samples in (first, same, other):
        samples.open(0, 12)
    orders = [[samples.tokens(i).tolist() for i in range(12)] for samples in (first, same, other)]
    assert orders[0] == orders[1] != orders[2]


def test_epochs_differ_in_order_and_hold_the_same_tokens(store):
    """But for what does not fill a last sample."""
    samples, epochs = samples_of(store), []
    per_epoch = samples.sources[0].per_epoch
    everything = collections.Counter(
        i for document in stored_ids(store, "train_0") for i in document
    )
    assert per_epoch == (everything.total() - 1) // SEQ_LEN > 20
    for epoch in range(2):
        samples.open(epoch * per_epoch, (epoch + 1) * per_epoch)
        rows = [samples.tokens(i) for i in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        assert all(row.shape == (SEQ_LEN + 1,) and row.dtype == np.int64 for row in rows)
        seen = collections.Counter(int(i) for row in rows for i in row[:-1])
        assert not seen - everything and (everything - seen).total() <= SEQ_LEN
        epochs.append([row.tolist() for row in rows])
    assert epochs[0] != epochs[1]


def test_samples_are_consecutive_text(store):
    """Within a document, a sample's tokens follow each other as in the source."""
    samples = samples_of(store)
    samples.open(0, 20)
    texts = [" ".join(map(str, ids)) for ids in stored_ids(store, "train_0")]
    for i in range(20):
        pieces = np.split(
            row := samples.tokens(i), np.flatnonzero(row == store.end_of_document) + 1
        )
        for piece in filter(len, pieces):
            assert any(f" {' '.join(map(str, piece))} " in f" {text} " for text in texts)


def test_a_step_may_span_more_than_two_epochs(store):
    samples = TrainingSamples(
        store, (1.0,), store.manifest["sources"][0]["tokens"] // 2 - 1, seed=0
    )
    assert samples.sources[0].per_epoch == 2
    samples.open(0, 8)
    assert all(len(samples.tokens(i)) == samples.sources[0].seq_len + 1 for i in range(8))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.1, 0.9)])
def test_sources_are_mixed_by_weight(mixture, weights):
    samples, letters = samples_of(mixture, weights), set("nopqrst")
    tokenizer, from_second = mixture.tokenizer(), []
    for index in range(400):
        samples.open(index, index + 1)
        from_second.append(bool(letters & set(tokenizer.decode(samples.tokens(index).tolist()))))
    share = weights[1] / sum(weights)
    for stop in (100, 200, 400):  # at every point of the run
        assert sum(from_second[:stop]) / stop == pytest.approx(share, abs=0.02)


# --- held-out rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("data_size", [1, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_validation_predicts_every_held_out_token_once(store, data_size, micro_batch_size):
    rows = ValidationRows(store, SEQ_LEN)
    shares = [
        list(validation_batches(rows, micro_batch_size, store.end_of_document, r, data_size, None))
        for r in range(data_size)
    ]
    # or ranks would wait for each other
    assert len({len(share) for share in shares}) == 1
    inputs, targets = [], []
    for step in range(len(shares[0])):
        for share in shares:
            check_batch(share[step])
            assert share[step].input_ids.shape == (micro_batch_size, SEQ_LEN)
            mask = share[step].token_mask
            mask = (
                torch.ones_like(share[step].input_ids, dtype=torch.bool) if mask is None else mask
            )
            assert (share[step].targets[~mask] == IGNORE_INDEX).all()
            inputs += share[step].input_ids[mask].tolist()
            targets += share[step].targets[share[step].targets != IGNORE_INDEX].tolist()
    held_out = stored_ids(store, "validation")
    assert inputs == [i for document in held_out for i in document][:-1]
    assert targets == [i for document in held_out for i in document[1:]]
    assert sum(b.num_targets for share in shares for b in share) == len(targets)
    assert sum(b.num_tokens for share in shares for b in share) == len(inputs)


@pytest.mark.parametrize("data_size", [1, 3])
def test_max_sequences_takes_the_first_rows(store, data_size):
    rows = ValidationRows(store, SEQ_LEN)
    assert len(rows) > 5

    def num_tokens(max_sequences: int | None) -> int:
        return sum(
            batch.num_tokens
            for rank in range(data_size)
            for batch in validation_batches(
                rows, 2, store.end_of_document, rank, data_size, max_sequences
            )
        )

    assert num_tokens(5) == 5 * SEQ_LEN
    assert num_tokens(10**6) == num_tokens(None) == rows.num_tokens - 1


@pytest.mark.parametrize("context_size", [2, 4])
def test_ranks_that_share_rows_have_every_held_out_target_and_its_bytes_once(store, context_size):
    rows = ValidationRows(store, SEQ_LEN)

    def totals(context_size: int) -> tuple[int, int, list[int]]:
        found = [
            list(validation_batches(rows, 3, store.end_of_document, 0, 1, None, r, context_size))
            for r in range(context_size)
        ]
        batches = [batch for of_rank in zip(*found, strict=True) for batch in of_rank]
        targets = [torch.cat([b.targets for b in same], 1) for same in zip(*found, strict=True)]
        return (
            sum(b.num_targets for b in batches),
            sum(b.target_bytes or 0 for b in batches),
            torch.cat(targets).flatten().tolist(),
        )

    assert totals(context_size) == totals(1)
    assert totals(1)[1] > 0


def test_ranks_that_share_rows_read_the_same_ones(store):
    whole, *parts = (
        TrainingLoader(
            samples_of(store), SEQ_LEN, 2, store.end_of_document, 1, 2, *place
        ).next_step(2)
        for place in ((), (0, 2), (1, 2))
    )
    for batch, *own in zip(whole, *parts, strict=True):
        for name in ("input_ids", "targets", "token_ids"):
            assert torch.equal(
                torch.cat([getattr(part, name) for part in own], 1), getattr(batch, name)
            )
