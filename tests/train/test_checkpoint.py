"""Damaged checkpoints are named and passed over; nothing pickled in them is executed."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist

from model.attention.dense import DenseAttention
from model.config import BalanceConfig, ModelConfig
from model.dispatch import AllToAllDispatcher
from model.moe import ModelParts
from model.parallel import initialize_parallel
from model.routers.top_k import TopKRouter
from model.transformer import Transformer
from train.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    damage,
    find_checkpoint,
    load_weights,
    read_state,
    restore_rng,
)
from train.config import CheckpointConfig, OptimConfig, TrainConfig
from train.engine import Engine
from train.runtime import process_group

CONFIG = ModelConfig(vocab_size=32, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=16,
                     num_experts=4, expert_intermediate_size=8, max_seq_len=16)
PARTS = ModelParts(functools.partial(TopKRouter, top_k=2), DenseAttention, AllToAllDispatcher, BalanceConfig())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with checkpoints of steps 1..4 (two kept), and the trained weights."""
    run = tmp_path_factory.mktemp("checkpoints") / "run"
    with process_group(60):
        groups = initialize_parallel(1)
        engine = Engine(Transformer(CONFIG, PARTS, groups), groups,
                        TrainConfig(num_steps=4, seq_len=8, micro_batch_size=1, global_batch_size=1),
                        OptimConfig(lr=0.1), {"zero_optimization": {"stage": 1}})
        writer = CheckpointWriter(run, CheckpointConfig(keep_last=2), groups, "config: {}\n")
        ids = torch.arange(8).unsqueeze(0)
        cu_seqlens = torch.tensor([0, 8], dtype=torch.int32)
        for step in range(1, 5):
            output = engine.forward(input_ids=ids, targets=ids + 1, positions=ids, cu_seqlens=cu_seqlens, max_seqlen=8)
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
    shutil.copytree(run / "checkpoints" / "step-00000004", run / "checkpoints" / ".step-00000009.partial")
    half = run / "checkpoints" / "step-00000008"
    half.mkdir()
    assert find_checkpoint(run).name == "step-00000004"


def test_no_usable_checkpoint_is_an_error_with_the_place(tmp_path):
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        find_checkpoint(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(run):
    other = Transformer(ModelConfig(**{**vars(CONFIG), "hidden_size": 16}), PARTS)
    with pytest.raises(CheckpointError, match="has shape"):
        load_weights(other, find_checkpoint(run))
    deeper = Transformer(ModelConfig(**{**vars(CONFIG), "num_layers": 3}), PARTS)
    with pytest.raises(CheckpointError, match="another shape"):
        load_weights(deeper, find_checkpoint(run))


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_in_the_index_is_not_executed(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = run / "checkpoints" / "step-00000004"
    (checkpoint / "weights" / ".metadata").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(CheckpointError, match="refusing to load"):
        load_weights(Transformer(CONFIG, PARTS), checkpoint)
    assert not (tmp_path / "exploded").exists()


def test_random_streams_continue(run):
    checkpoint = find_checkpoint(run)
    torch.manual_seed(5)
    assert restore_rng(checkpoint, 0, 1, 1)
    first = torch.rand(3)
    torch.manual_seed(6)
    assert restore_rng(checkpoint, 0, 1, 1)
    assert torch.equal(first, torch.rand(3))
    assert not restore_rng(checkpoint, 0, 2, 1)


def test_a_newer_format_is_refused(run):
    path = run / "checkpoints" / "step-00000004" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        read_state(path.parent)


def test_process_group_leaves_no_trace_in_the_environment():
    before = dict(os.environ)
    with process_group(60):
        assert dist.get_world_size() == 1
    assert dict(os.environ) == before
