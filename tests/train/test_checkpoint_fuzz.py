"""Whatever happens to the files, a load gives what was saved or says in one line why not; nothing
in them is executed.

Hypothesis draws up to three damages for each case, the same ones in every run.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from model.attention.config.dense import DenseAttentionConfig
from model.config import BalanceConfig, ModelConfig
from model.dispatch.config import AllToAllConfig
from model.moe.layer import ModelParts
from model.parallel.groups import initialize_parallel
from model.request import TokenBatch
from model.routers.config import TopKConfig
from model.transformer import Transformer
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.writer import (
    CheckpointWriter,
    find_checkpoint,
    load_weights,
    read_state,
    restore_rng,
)
from train.config.data import DataConfig, SourceConfig, TokenizerConfig
from train.config.training import CheckpointConfig, OptimConfig, TrainConfig
from train.data.prepare import prepare
from train.data.store import TokenStore, TrainingSamples, ValidationRows
from train.engine.deepspeed import Engine
from train.files.manifest import file_facts
from train.rank.runtime import process_group

CONFIG = ModelConfig(
    vocab_size=1024,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=16,
    num_experts=4,
    expert_intermediate_size=8,
    max_seq_len=16,
)
PARTS = ModelParts(TopKConfig(top_k=2), DenseAttentionConfig(), AllToAllConfig(), BalanceConfig())
RUNS = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
"""No shrinking: three damages are few, and a failure should take no longer than a pass."""


# --- damages --------------------------------------------------------------------------------------


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


BOMB = pickle.dumps(_Bomb())
NAME, MODULE = b"os.mkdir", b"torch.distributed.checkpoint.filesystem"
DOTTED_BOMB = (
    b"\x80\x04\x8c"
    + bytes([len(MODULE)])
    + MODULE
    + b"\x8c"
    + bytes([len(NAME)])
    + NAME
    + b"\x93\x8c\x08exploded\x85R."
)
OTHER_JSON = (
    b"null",
    b"[]",
    b"{}",
    b'"text"',
    b"1e999",
    b"-1",
    b"9" * 5000,
    b"[" * 20_000,
    b"\xff\xfe\xfd",
    b'{"a":',
)
VALUES = (None, [], {}, "text", -1, 0, 10**30, 1e308, float("nan"), True, [{}], {"size": -1})


def replace(path: Path, content: bytes) -> None:
    remove(path)
    path.write_bytes(content)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flip(path: Path, place: float, mask: int) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[int(place * len(content))] ^= mask
        path.write_bytes(content)


def change_value(path: Path, place: float, value: object) -> None:
    """One value somewhere in a JSON file becomes another; keys stay. Other files are left alone."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    places: list[tuple[dict | list, str | int]] = []

    def walk(node):
        for key in (
            node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        ):
            places.append((node, key))
            walk(node[key])

    walk(data)
    if places:
        node, key = places[int(place * len(places))]
        node[key] = value
        path.write_text(json.dumps(data))


def swap(first: Path, second: Path) -> None:
    if first != second and first.is_file() and second.is_file():
        between = first.with_name("between")
        first.rename(between)
        second.rename(first)
        between.rename(second)


DAMAGES: dict[str, Callable[[Path, float, int, Path], None]] = {
    "truncate": lambda path, place, number, other: os.truncate(
        path, int(place * path.stat().st_size)
    ),
    "flip": lambda path, place, number, other: flip(path, place, 1 << number % 8),
    "delete": lambda path, place, number, other: remove(path),
    "empty": lambda path, place, number, other: replace(path, b""),
    "append": lambda path, place, number, other: replace(
        path, path.read_bytes() + bytes([number % 256])
    ),
    "swap": lambda path, place, number, other: swap(path, other),
    "copy": lambda path, place, number, other: (
        replace(path, other.read_bytes()) if other.is_file() else None
    ),
    "other JSON": lambda path, place, number, other: replace(
        path, OTHER_JSON[number % len(OTHER_JSON)]
    ),
    "other value": lambda path, place, number, other: change_value(
        path, place, VALUES[number % len(VALUES)]
    ),
    "folder": lambda path, place, number, other: (remove(path), path.mkdir()),
    "pickle": lambda path, place, number, other: replace(path, BOMB if number % 2 else DOTTED_BOMB),
    "link to nothing": lambda path, place, number, other: (
        remove(path),
        path.symlink_to("nowhere"),
    ),
    "stranger": lambda path, place, number, other: (
        path.parent / f"__{number}_0.distcp"
    ).write_bytes(BOMB),
}
PLACE = st.integers(0, 999).map(lambda n: n / 1000)
KINDS = [*sorted(DAMAGES), *["flip"] * 8]  # in most files most bits are not looked at
DAMAGE = st.tuples(st.sampled_from(KINDS), PLACE, PLACE, st.integers(0, 255), PLACE)


def spoil(folder: Path, damages: list[tuple[str, float, float, int, float]]) -> None:
    """Each damage hits one file of the folder: chosen by its first number, with the last choosing a
    second one.
    """
    for kind, which, place, number, which_other in damages:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if files:
            DAMAGES[kind](
                files[int(which * len(files))], place, number, files[int(which_other * len(files))]
            )


@pytest.fixture
def nothing_explodes(tmp_path, monkeypatch):
    """Nothing is executed, and no damaged size takes the machine's memory (a pickle may name a
    place 2**31).
    """
    monkeypatch.chdir(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert not (tmp_path / "exploded").exists()


def assert_one_line(error: ValueError) -> None:
    assert str(error) and "\n" not in str(error), error
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    assert "/train/" in last.tb_frame.f_code.co_filename, f"not ours: {error!r}"


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory with checkpoints of steps 1 and 2, and the weights and random numbers that
    follow each.
    """
    folder = tmp_path_factory.mktemp("fuzz")
    known = {}
    with process_group(60):
        groups = initialize_parallel(1)
        engine = Engine(
            Transformer(CONFIG, PARTS, groups),
            groups,
            TrainConfig(num_steps=2, seq_len=8, micro_batch_size=1, global_batch_size=1),
            OptimConfig(lr=0.1),
            {"zero_optimization": {"stage": 1}},
        )
        writer = CheckpointWriter(folder / "run", CheckpointConfig(), groups, "config: {}\n")
        ids, cu_seqlens = torch.arange(8).unsqueeze(0), torch.tensor([0, 8], dtype=torch.int32)
        for step in (1, 2):
            output = engine.forward(TokenBatch(ids, ids + 1, ids, cu_seqlens, max_seqlen=8))
            engine.backward(output.loss_sum, is_last=True)
            engine.step()
            writer.save(engine, {"step": step, "tokens": 8 * step})
            writer.mark_best(step, 1.0)
            weights = {
                name: parameter.detach().clone()
                for name, parameter in engine.module.named_parameters()
            }
            known[step] = (
                weights,
                torch.rand(3),
                everything_in(folder / "run" / "checkpoints" / f"step-0000000{step}"),
            )
        engine.close()
    model = Transformer(CONFIG, PARTS)
    return folder, known, model


def everything_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor, moments and buffers included."""
    reader = CheckpointReader(checkpoint)
    tensors = {key: torch.empty(shape) for key, shape in reader.shapes.items()}
    reader.read(tensors)
    return tensors


def load(run: Path, prefer: str, model: Transformer, known: dict) -> int:
    """Load as a resume does; the step, after comparing every tensor and the random stream with what
    was saved.
    """
    checkpoint = find_checkpoint(run, prefer)
    state = read_state(checkpoint)
    for parameter in model.parameters():
        parameter.data.fill_(9.0)
    load_weights(model, checkpoint)
    assert restore_rng(checkpoint, 0, 1, state["world_size"])
    weights, numbers, tensors = known[state["step"]]
    assert state["tokens"] == 8 * state["step"]
    assert all(
        torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters()
    )
    assert torch.equal(torch.rand(3), numbers)
    assert all(
        torch.equal(tensor, tensors[key]) for key, tensor in everything_in(checkpoint).items()
    )
    return state["step"]


def fresh_copy(folder: Path, name: str) -> Path:
    shutil.rmtree(folder / "copy", ignore_errors=True)
    shutil.copytree(folder / name, folder / "copy")
    return folder / "copy"


def test_every_damage_in_a_run_directory_is_survived_or_named(trained, nothing_explodes):
    folder, known, model = trained
    seen = set()

    @RUNS
    @given(st.lists(DAMAGE, min_size=1, max_size=3), st.sampled_from(["latest", "best"]))
    def check(damages, prefer):
        run = fresh_copy(folder, "run")
        spoil(run, damages)
        try:
            seen.add(load(run, prefer, model, known))
        except ValueError as error:
            assert_one_line(error)
            seen.add("refused")

    check()
    assert seen == {1, 2, "refused"}


def test_every_damage_to_the_newest_checkpoint_gives_the_one_before(trained, nothing_explodes):
    folder, known, model = trained
    seen = set()

    @RUNS
    @given(st.lists(DAMAGE, min_size=1, max_size=3))
    def check(damages):
        run = fresh_copy(folder, "run")
        spoil(run / "checkpoints" / "step-00000002", damages)
        try:
            seen.add(load(run, "latest", model, known))
        except ValueError as error:  # a format that may be a later one's
            assert_one_line(error)
            assert "has format" in str(error)

    check()
    # a damage may come to nothing: an empty truncation, a swap with itself
    assert seen == {1, 2}


def test_tensors_are_not_trusted_even_if_the_manifest_agrees(trained, nothing_explodes):
    """Somebody who can write the manifest too gets a refusal or other numbers, never anything
    executed.
    """
    folder, _, model = trained

    @RUNS
    @given(st.lists(DAMAGE, min_size=1, max_size=2))
    def check(damages):
        run = fresh_copy(folder, "run")
        checkpoint = run / "checkpoints" / "step-00000002"
        spoil(checkpoint / "weights", damages)
        files = {
            str(path.relative_to(checkpoint)): file_facts(path)
            for path in checkpoint.rglob("*")
            if path.is_file() and path.name != "manifest.json"
        }
        (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
        try:
            load_weights(model, find_checkpoint(run))
        except ValueError as error:
            assert_one_line(error)

    check()


# --- token stores ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A token store whose epochs have been opened once, and everything that is read from it."""
    import datasets

    folder = tmp_path_factory.mktemp("store")
    words = ["owl", "oak", "river", "fox", "dog", "seven", "wise"]
    lines = [" ".join(words[(i * j) % 7] for j in range(1, 9)) + f" {i}" for i in range(50)]
    (folder / "text.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
        path = prepare(
            DataConfig(
                (SourceConfig("text", data_files=str(folder / "text.txt"), sample_by="line"),),
                TokenizerConfig(vocab_size=270),
                0.2,
                str(folder / "cache"),
            ),
            report=lambda line: None,
        )
    path.rename(folder / "store")
    fresh_copy(folder, "store")
    expected = read_everything(folder / "copy")
    shutil.rmtree(folder / "store")
    shutil.copytree(folder / "copy", folder / "store")
    return folder, expected


def read_everything(path: Path) -> list:
    store = TokenStore(path)
    samples, rows = TrainingSamples(store, (1.0,), 16, seed=0), ValidationRows(store, 16)
    samples.open(0, 8)
    return [
        store.vocab_size,
        store.end_of_document,
        store.unigram_entropy,
        store.token_bytes().tolist(),
        store.tokenizer().encode("owl 3").ids,
        [samples.tokens(i).tolist() for i in range(8)],
        [rows.tokens(i).tolist() for i in range(len(rows))],
    ]


def test_every_damage_to_a_token_store_is_named(prepared, nothing_explodes):
    folder, expected = prepared
    seen = set()

    @RUNS
    @given(st.lists(DAMAGE, min_size=1, max_size=3))
    def check(damages):
        store = fresh_copy(folder, "store")
        spoil(store, damages)
        try:
            assert read_everything(store) == expected
            seen.add("whole")  # what is cached is made again
        except ValueError as error:
            assert_one_line(error)
            assert f"delete the folder {store}" in str(error)
            seen.add("named")

    check()
    assert seen == {"whole", "named"}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("manifest.json", "is no JSON"),
        ("tokenizer.json", r"has \d+ bytes instead of \d+"),
        ("token_bytes.npy", r"has \d+ bytes instead of \d+"),
        ("train_0.bin", r"has \d+ bytes instead of \d+"),
        ("train_0.idx", r"has \d+ bytes instead of \d+"),
        ("validation.bin", r"has \d+ bytes instead of \d+"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong_and_the_fix(prepared, name, what):
    store = fresh_copy(prepared[0], "store")
    os.truncate(store / name, 20)
    with pytest.raises(
        ValueError, match=rf"{name} {what}.*; delete the folder {store}: it is made again"
    ):
        read_everything(store)


def test_a_store_of_before_the_checksums_is_read_and_its_sizes_are_checked(prepared):
    folder, expected = prepared
    store = fresh_copy(folder, "store")
    manifest = json.loads((store / "manifest.json").read_text())
    del manifest["files"], manifest["checksum"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    assert read_everything(store) == expected
    os.truncate(store / "train_0.bin", 20)
    with pytest.raises(
        ValueError,
        match=r"train_0\.bin has 20 bytes instead of \d+ for \d+ tokens; delete the folder",
    ):
        read_everything(store)


def test_a_damaged_order_of_samples_is_made_again(prepared):
    folder, expected = prepared
    store = fresh_copy(folder, "store")
    [shuffle] = store.glob("index_cache/*/*shuffle_index.npy")
    flip(shuffle, 0.99, 1)
    assert read_everything(store) == expected
    [again] = store.glob("index_cache/*/*shuffle_index.npy")
    assert again.name == shuffle.name and len(list((store / "index_cache").iterdir())) == 1


def test_the_fuzz_reads_what_was_prepared(prepared):
    folder, expected = prepared
    assert read_everything(fresh_copy(folder, "store")) == expected
    assert len(expected[5][0]) == 17 and np.isfinite(expected[2])
