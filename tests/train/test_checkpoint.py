"""A checkpoint is whole or absent, whatever happens while it is written; what is read is ours,
whole, and of this model.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path, PosixPath

import pytest
import torch
import torch.distributed as dist

from model.attention.config.dense import DenseAttentionConfig
from model.attention.config.sparse import SparseAttentionConfig
from model.config import BalanceConfig, ModelConfig
from model.dispatch.config import AllToAllConfig
from model.moe.layer import ModelParts
from model.parallel.groups import initialize_parallel
from model.request import TokenBatch
from model.routers.config import TopKConfig
from model.transformer import Transformer
from train.checkpoint.folder import (
    CheckpointsGoneError,
    begins_anew,
    point_best,
    point_latest,
    read_best,
    remove_leftovers,
    remove_old,
    steps,
)
from train.checkpoint.writer import (
    CheckpointError,
    CheckpointWriter,
    damage,
    find_checkpoint,
    load_weights,
    read_state,
    restore_rng,
    set_newer_aside,
)
from train.config.training import CheckpointConfig, OptimConfig, TrainConfig
from train.engine.deepspeed import Engine
from train.files.manifest import NewerFormatError, file_facts
from train.rank.runtime import process_group

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=16,
    num_experts=4,
    expert_intermediate_size=8,
    max_seq_len=16,
)
PARTS = ModelParts(TopKConfig(top_k=2), DenseAttentionConfig(), AllToAllConfig(), BalanceConfig())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with checkpoints of steps 1..4 (two kept), and the trained weights."""
    run = tmp_path_factory.mktemp("checkpoints") / "run"
    with process_group(60):
        groups = initialize_parallel(1)
        engine = Engine(
            Transformer(CONFIG, PARTS, groups),
            groups,
            TrainConfig(num_steps=4, seq_len=8, micro_batch_size=1, global_batch_size=1),
            OptimConfig(lr=0.1),
            {"zero_optimization": {"stage": 1}},
        )
        writer = CheckpointWriter(run, CheckpointConfig(keep_last=2), groups, "config: {}\n")
        ids = torch.arange(8).unsqueeze(0)
        cu_seqlens = torch.tensor([0, 8], dtype=torch.int32)
        for step in range(1, 5):
            output = engine.forward(TokenBatch(ids, ids + 1, ids, cu_seqlens, max_seqlen=8))
            engine.backward(output.loss_sum, is_last=True)
            engine.step()
            engine.module.routers()[0].balance_bias += 1
            writer.save(engine, {"step": step, "wandb_id": None})
            if step == 1:
                writer.mark_best(step, 1.0)
        torch.manual_seed(99)
        weights = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
        engine.close()
    return run, weights


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


def names(run):
    return sorted(p.name for p in (run / "checkpoints").glob("step-*"))


def test_retention_keeps_the_last_two_and_the_best(run):
    assert names(run) == ["step-00000001", "step-00000003", "step-00000004"]
    assert find_checkpoint(run, "best").name == "step-00000001"
    assert find_checkpoint(run, "latest").name == "step-00000004"


def test_weights_and_buffers_come_back(saved):
    run, weights = saved
    model = Transformer(CONFIG, PARTS, seed=123)
    load_weights(model, find_checkpoint(run))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert torch.equal(model.routers()[0].balance_bias, torch.full((4,), 4.0))
    assert read_state(find_checkpoint(run))["step"] == 4


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "manifest"])
def test_damage_is_named_and_the_previous_checkpoint_used(run, harm, caplog):
    newest = run / "checkpoints" / "step-00000004"
    victim = max((newest / "weights").glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = victim.read_bytes()
    if harm == "truncate":
        victim.write_bytes(data[:-7])
    elif harm == "flip":
        victim.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif harm == "remove":
        victim.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    found = damage(newest)
    assert found is not None and (harm == "manifest" or victim.name in found)
    assert find_checkpoint(run).name == "step-00000003"
    assert "step-00000004" in caplog.text


def test_unfinished_saves_are_never_taken(run):
    shutil.copytree(
        run / "checkpoints" / "step-00000004", run / "checkpoints" / ".step-00000009.partial"
    )
    half = run / "checkpoints" / "step-00000008"
    half.mkdir()
    assert find_checkpoint(run).name == "step-00000004"


def test_no_usable_checkpoint_is_an_error_with_the_place(tmp_path):
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        find_checkpoint(tmp_path)


def test_a_model_comes_back_at_the_stage_of_its_attention(saved):
    """Saved after step 4: within four dense steps it is dense no longer, within five it still
    is.
    """
    for dense_steps, dense in ((4, False), (5, True)):
        attention = SparseAttentionConfig(
            block_size=2,
            coarse_block_size=2,
            top_k=1,
            window_size=2,
            dense_steps=dense_steps,
        )
        model = Transformer(CONFIG, dataclasses.replace(PARTS, attention=attention))
        load_weights(model, find_checkpoint(saved[0], "latest"))
        layers = model.sparse_attentions()
        assert layers and all((layer.step < layer.dense_steps) == dense for layer in layers)


def other_model(**changes):
    return Transformer(ModelConfig(**{**vars(CONFIG), **changes}), PARTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"hidden_size": 16},
            r"it has embedding\.weight of shape \(32, 8\), this model needs shape \(32, 16\)",
        ),
        ({"num_layers": 3}, r"it has no blocks\.2\..*, this model needs shape \(8,\)"),
        (
            {"num_layers": 1},
            r"it has blocks\.1\..* of shape \(.*\), this model has no such parameter",
        ),
        ({"num_experts": 2}, r"router.* of shape \(4, 8\), this model needs shape \(2, 8\)"),
        ({"num_experts": 8}, r"router.* of shape \(4, 8\), this model needs shape \(8, 8\)"),
        ({"num_experts": 0}, r"it has no blocks\.0\.mlp\..*, this model needs shape \(32, 8\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_the_first_difference(run, changes, words):
    with pytest.raises(
        CheckpointError, match=f"step-00000004 belongs to another model: .*{words}"
    ) as caught:
        load_weights(other_model(**changes), find_checkpoint(run))
    assert "\n" not in str(caught.value)


def test_only_attention_may_need_fewer_parameters_than_there_are(run):
    model = other_model()
    del model.blocks[0].attention.o_proj
    load_weights(model, find_checkpoint(run))
    del model.blocks[0].attention_norm
    with pytest.raises(CheckpointError, match=r"it has blocks\.0\.attention_norm\.weight of shape"):
        load_weights(model, find_checkpoint(run))


# --- what is read and what is not -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights/__1_0.distcp", "weights/deeper/x", "rng-00001.json"])
def test_a_file_that_the_manifest_does_not_list_is_damage(run, name):
    path = run / "checkpoints" / "step-00000004" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    assert damage(run / "checkpoints" / "step-00000004") == f"{name} is not listed in manifest.json"
    assert find_checkpoint(run).name == "step-00000003"


@pytest.mark.parametrize("name", ["state.json", "weights/.metadata", "rng-00000.json"])
def test_a_manifest_that_leaves_out_what_loading_needs_is_damage(run, name):
    newest = run / "checkpoints" / "step-00000004"
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["files"][name]
    (newest / name).unlink()
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert damage(newest) == f"manifest.json does not list {name}"


def test_a_checkpoint_under_the_name_of_another_is_damage(run):
    newest = run / "checkpoints" / "step-00000004"
    newest.rename(newest.with_name("step-00000009"))
    assert damage(newest.with_name("step-00000009")) == "it holds the state of step 4"
    assert find_checkpoint(run).name == "step-00000003"


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_a_manifest_cannot_point_outside_its_folder(run, name):
    path = run / "checkpoints" / "step-00000004" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"size": 1, "sha256": "x"}
    path.write_text(json.dumps(manifest))
    assert "damaged entry" in damage(path.parent)


def test_folders_of_other_users_are_not_read(run, monkeypatch):
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(
        CheckpointError,
        match=rf"belongs to user {owner}, this is user {owner + 1}: .*chown -R {owner + 1}",
    ):
        find_checkpoint(run)
    with pytest.raises(CheckpointError, match=f"step-00000004 belongs to user {owner}"):
        load_weights(other_model(), run / "checkpoints" / "step-00000004")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/step-00000004"])
def test_every_folder_on_the_way_must_be_ours_even_for_root(run, name):
    os.chown(run / name, 12345, 12345)
    with pytest.raises(CheckpointError, match="belongs to user 12345, this is user 0"):
        find_checkpoint(run)


@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
def test_a_newer_format_is_refused_and_no_older_checkpoint_taken(run, file):
    newest = run / "checkpoints" / "step-00000004"
    path, manifest = newest / file, newest / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    if file == "state.json":
        files = json.loads(manifest.read_text())["files"]
        files[file] = file_facts(path)
        manifest.write_text(json.dumps({"format": 1, "files": files}))
        with pytest.raises(NewerFormatError, match="format 99"):
            read_state(newest)
    with pytest.raises(
        NewerFormatError, match="has format 99, this version reads up to format 3: use a version of"
    ):
        find_checkpoint(run)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"step-00000077",
        b"../..",
        b"null",
        b"[1]",
        b'{"checkpoint": 3}',
        b'{"checkpoint": "step-00000001", "val_loss": NaN}',
        "folder",
        None,
    ],
)
@pytest.mark.parametrize("pointer", ["latest", "best.json"])
def test_a_damaged_pointer_stops_nothing(run, pointer, content, caplog):
    folder = run / "checkpoints"
    path = folder / pointer
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert find_checkpoint(run).name == "step-00000004"
    assert find_checkpoint(run, "best").name == (
        "step-00000004" if pointer == "best.json" else "step-00000001"
    )
    assert content is None or f"{path} is ignored" in caplog.text
    set_newer_aside(folder / "step-00000004")
    remove_old(folder, 2, True)
    point_latest(folder, "step-00000004")
    point_best(folder, "step-00000003", 0.5)
    assert (folder / "latest").read_text() == "step-00000004"
    assert read_best(folder) == {"checkpoint": "step-00000003", "val_loss": 0.5}


# --- pickles --------------------------------------------------------------------------------------


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def dotted_bomb(module: str) -> bytes:
    """Protocol 4 resolves dotted names: os.mkdir by way of a module that imports os."""
    name = b"os.mkdir"
    return (
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name
        + b"\x93\x8c\x08exploded\x85R."
    )


BOMBS = {
    "plain": pickle.dumps(_Bomb()),
    "dotted": dotted_bomb("torch.distributed.checkpoint.filesystem"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_pickle_in_the_index_is_not_executed(run, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    pickle.loads(BOMBS[kind])
    (tmp_path / "exploded").rmdir()
    checkpoint = run / "checkpoints" / "step-00000004"
    (checkpoint / "weights" / ".metadata").write_bytes(BOMBS[kind])
    with pytest.raises(CheckpointError, match="refusing to load"):
        load_weights(Transformer(CONFIG, PARTS), checkpoint)
    assert not (tmp_path / "exploded").exists()


def poisoned(attribute: str) -> bytes:
    """BUILD on a class that the index may name: it would change for the whole process."""
    return (
        b"\x80\x04\x8c\x07pathlib\x8c\x09PosixPath\x93N}\x8c"
        + bytes([len(attribute)])
        + attribute.encode()
        + b"\x8c\x05torch\x8c\x04Size\x93s\x86b."
    )


@pytest.mark.parametrize("attribute", ["is_file", "a_new_one", "__init__"])
def test_an_index_changes_no_class(run, attribute):
    checkpoint = run / "checkpoints" / "step-00000004"
    (checkpoint / "weights" / ".metadata").write_bytes(poisoned(attribute))
    before = dict(vars(PosixPath))
    with pytest.raises(CheckpointError, match=f"changes PosixPath.{attribute}"):
        load_weights(Transformer(CONFIG, PARTS), checkpoint)
    assert dict(vars(PosixPath)) == before


@pytest.mark.parametrize(
    "place", ["../../step-00000001/weights/__0_0.distcp", "/etc/hostname", "sub/x.distcp", "..", ""]
)
def test_an_index_points_to_no_file_outside_its_folder(run, place):
    checkpoint = run / "checkpoints" / "step-00000004"
    path = checkpoint / "weights" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    key = next(iter(metadata.storage_data))
    metadata.storage_data[key] = dataclasses.replace(
        metadata.storage_data[key], relative_path=place
    )
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        load_weights(Transformer(CONFIG, PARTS), checkpoint)


# --- gone -----------------------------------------------------------------------------------------


def test_a_restart_never_begins_anew_once_something_was_saved(run, tmp_path):
    """As when the disk of the checkpoints is not mounted: training from step 0 would throw the run
    away.
    """
    # by the writer, at the first checkpoint
    assert (run / "saved").read_text() == "step-00000001"
    assert not begins_anew(run)
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointsGoneError, match="is a disk not mounted"):
        begins_anew(run)
    (run / "checkpoints").mkdir()
    with pytest.raises(CheckpointsGoneError):
        begins_anew(run)
    assert begins_anew(tmp_path / "a run that never saved")


# --- retention ------------------------------------------------------------------------------------


def test_retention_counts_only_checkpoints_that_look_whole(run):
    folder = run / "checkpoints"
    victim = max(
        (folder / "step-00000004" / "weights").glob("*.distcp"),
        key=lambda path: path.stat().st_size,
    )
    victim.write_bytes(victim.read_bytes()[:-7])
    (folder / "step-00000003" / "manifest.json").unlink()
    remove_old(folder, 1, keep_best=False)
    # the only whole one stays
    assert names(run) == ["step-00000001", "step-00000003", "step-00000004"]
    assert find_checkpoint(run).name == "step-00000001"


def test_retention_keeps_one_whatever_it_is_told(run):
    remove_old(run / "checkpoints", 0, keep_best=False)
    assert names(run) == ["step-00000004"] and not list((run / "checkpoints").glob(".step-*"))


def test_steps_are_ordered_by_number(run):
    folder = run / "checkpoints"
    for step in (99999999, 100000000):
        shutil.copytree(folder / "step-00000003", folder / f"step-{step}")
    assert steps(folder) == [
        "step-00000001",
        "step-00000003",
        "step-00000004",
        "step-99999999",
        "step-100000000",
    ]
    set_newer_aside(folder / "step-00000004")
    assert names(run) == ["step-00000001", "step-00000003", "step-00000004"]


def test_a_replacement_cut_short_is_put_back(run):
    folder = run / "checkpoints"
    (folder / "step-00000004").rename(folder / ".replaced-step-00000004")
    shutil.copytree(folder / "step-00000003", folder / ".replaced-step-00000003")
    (folder / ".step-00000007.partial").mkdir()
    remove_leftovers(folder)
    assert find_checkpoint(run).name == "step-00000004"
    assert not list(folder.glob(".*"))


# --- random states --------------------------------------------------------------------------------


def test_random_streams_continue(run):
    checkpoint = find_checkpoint(run)
    torch.manual_seed(5)
    assert restore_rng(checkpoint, 0, 1, 1)
    first = torch.rand(3)
    torch.manual_seed(6)
    assert restore_rng(checkpoint, 0, 1, 1)
    assert torch.equal(first, torch.rand(3))
    assert not restore_rng(checkpoint, 0, 2, 1)


@pytest.mark.parametrize(
    "content", ["{}", '{"python": 1}', '{"python": [3, [1], null]}', "[]", "{", None]
)
def test_a_damaged_random_state_is_an_error_and_no_other_stream(run, content):
    checkpoint = find_checkpoint(run)
    path = checkpoint / "rng-00000.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=r"rng-00000\.json"):
        restore_rng(checkpoint, 0, 1, 1)


# --- saving under faults, on two ranks ------------------------------------------------------------


@pytest.fixture(scope="module")
def cases(run_ranks, tmp_path_factory):
    """Case -> what each of two ranks saw of it (checkpoint_worker.py)."""
    folder = tmp_path_factory.mktemp("ranks")
    return {
        line["case"]: line["ranks"]
        for line in run_ranks("train/checkpoint_worker.py", 2, str(folder))
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["False", "True"], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize(
    ("case", "rank", "code", "words"),
    [
        ("tensors", 1, errno.EFBIG, "step-00000002.partial/weights: File too large"),
        ("last tensor", 1, errno.EFBIG, "File too large"),
        ("records", 1, errno.EIO, r"rng-00001\.json"),
        ("hash", 1, errno.EIO, "Input/output error"),
        ("space", 0, errno.ENOSPC, "bytes are needed and 12,288 are free"),
        ("manifest", 0, errno.ENOSPC, "No space left on device"),
        ("rename", 0, errno.EROFS, "Read-only file system"),
        ("bug", 1, None, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_rank_that_cannot_write_takes_all_with_it_and_costs_that_checkpoint_only(
    cases, mode, case, rank, code, words
):
    first, second = cases[f"{case}/{mode}/stop"]
    assert first == second
    assert first["rank"] == rank and first["errno"] == code and re.search(words, first["error"])
    assert (
        first["error"].startswith(f"rank {rank} could not write /")
        and "step-00000002" in first["error"]
    )
    assert (
        first["left"] == ["latest", "step-00000001"]
        and first["damage"] is None
        and first["step"] == 1
    )
    assert (
        first["after"] == ["latest", "step-00000001", "step-00000003"]
        and first["newest"] == "step-00000003"
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["False", "True"], ids=["synchronous", "asynchronous"])
def test_training_may_go_on_without_the_checkpoint(cases, mode):
    for seen in cases[f"records/{mode}/continue"]:
        assert seen["error"] is None and seen["saved"] is False and seen["step"] == 1
        assert seen["left"] == ["latest", "step-00000001"] and seen["newest"] == "step-00000003"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["False", "True"], ids=["synchronous", "asynchronous"])
def test_what_is_saved_is_what_was_true_when_save_was_called(cases, mode):
    for seen in cases[f"snapshot/{mode}"]:
        assert seen == {
            "there_at_once": mode == "False",
            "same": True,
            "tokens": 5,
            "same_rng": True,
            "latest": "step-00000002",
        }


@pytest.mark.slow
def test_saves_wait_for_each_other_and_the_best_for_its_own(cases):
    for seen in cases["queue"]:
        assert (
            seen["marked"] == ["best.json", "latest", "step-00000001"]
            and seen["second"] == "step-00000002"
        )
        assert (
            seen["left"] == ["best.json", "latest", "step-00000001", "step-00000003"]
            and seen["best"] == 2.5
        )


@pytest.mark.slow
def test_a_run_directory_that_ranks_do_not_share_is_named(cases):
    assert all(
        "rank 1 could not write" in seen["error"]
        and "file system that all ranks share" in seen["error"]
        for seen in cases["unshared"]
    )


@pytest.mark.slow
def test_everything_is_on_disk_before_it_gets_its_name(cases):
    """As rank 0 does it; the others sync what they write."""
    first, second = cases["durable"]
    done = [tuple(event) for event in first["done"]]
    named = done.index(("rename", "step-00000001"))
    scratch = ".step-00000001.partial"
    synced = {
        path
        for what, path in done[:named] + [tuple(event) for event in second["done"]]
        if what == "sync"
    }
    assert synced == {
        f"{scratch}{'/' * bool(name)}{name}"
        for name in (
            "",
            "weights",
            "weights/__0_0.distcp",
            "weights/__1_0.distcp",
            "weights/.metadata.tmp",
            "rng-00000.json.tmp",
            "rng-00001.json.tmp",
            "state.json.tmp",
            "config.yaml.tmp",
            "manifest.json.tmp",
        )
    } | {".."}
    renamed = [path for what, path in done if what == "rename"]
    assert renamed[-4:] == [f"{scratch}/manifest.json", "step-00000001", "../saved", "latest"]
    assert done[named + 1 :] == [
        ("sync", "."),
        ("sync", "../saved.tmp"),
        ("rename", "../saved"),
        ("sync", "latest.tmp"),
        ("rename", "latest"),
        ("sync", "."),
    ]


@pytest.mark.slow
def test_another_layout_resumes_from_what_is_whole_with_every_bit(cases):
    for seen in cases["layout"]:
        assert seen == {"step": 1, "keys": True, "same": True, "damage": None}


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path):
    worker = Path(__file__).parent / "checkpoint_worker.py"
    root = worker.parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(worker), str(tmp_path), "kill"],
        cwd=root,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    folder = tmp_path / "killed" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        ".step-00000002.partial",
        "latest",
        "step-00000001",
    ]
    assert find_checkpoint(tmp_path / "killed").name == "step-00000001"
    load_weights(Transformer(CONFIG, PARTS), find_checkpoint(tmp_path / "killed"))
    remove_leftovers(folder)
    assert not list(folder.glob(".*"))


def test_process_group_leaves_no_trace_in_the_environment():
    before = dict(os.environ)
    with process_group(60):
        assert dist.get_world_size() == 1
    assert dict(os.environ) == before
