"""Experts are stored in stacks and asked for one by one, whatever layout wrote them; checkpoints of
before still load.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parent))
from test_checkpoint import CONFIG, PARTS

from model.parallel.groups import initialize_parallel
from model.request import TokenBatch
from model.transformer import Transformer
from train.checkpoint.expert_stacks import (
    PIECE_BYTES,
    Rows,
    StackLoadPlanner,
    StackSavePlanner,
    row_of_expert,
    rows_per_piece,
)
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.writer import (
    CheckpointError,
    CheckpointWriter,
    damage,
    find_checkpoint,
    load_engine,
    load_weights,
)
from train.config.training import CheckpointConfig, OptimConfig, TrainConfig
from train.engine.deepspeed import Engine
from train.rank.runtime import process_group

OLD = Path(__file__).parent / "fixtures" / "key_per_expert.tar.xz"
"""A run of two steps (ZeRO 1, one rank) as it was saved before the stacks: format 1, an entry per
expert.
"""
OLD_SHA256 = "c4a3e9b13c9de06d0d5c29dda75afd6165ba8f313dc6a6a4ee52a76169a37fc4"
FORMER = Path(__file__).parent / "fixtures" / "entry_per_parameter.tar.xz"
"""The same state as it was saved before small tensors were packed: format 2."""
OLD_LOSSES = (20.037919998168945, 17.484264373779297)
"""Of steps 3 and 4, as the run that was not interrupted had them."""


def everything_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(checkpoint)
    tensors = {key: torch.empty(shape) for key, shape in reader.shapes.items()}
    reader.read(tensors)
    return tensors


def make_engine(stage: int) -> tuple[Engine, object]:
    groups = initialize_parallel(1)
    settings = TrainConfig(num_steps=4, seq_len=8, micro_batch_size=1, global_batch_size=1)
    return Engine(
        Transformer(CONFIG, PARTS, groups),
        groups,
        settings,
        OptimConfig(lr=0.1),
        {"zero_optimization": {"stage": stage}},
    ), groups


def step(engine: Engine) -> float:
    ids = torch.arange(8).unsqueeze(0)
    cu_seqlens = torch.tensor([0, 8], dtype=torch.int32)
    output = engine.forward(TokenBatch(ids, ids + 1, ids, cu_seqlens, max_seqlen=8))
    engine.backward(output.loss_sum, is_last=True)
    engine.step()
    return float(output.loss_sum.detach())


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The old checkpoint, resumed under two ZeRO stages, saved again as soon as it was loaded, and
    trained on.
    """
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(OLD) as archive:
        archive.extractall(folder, filter="data")
    old = find_checkpoint(folder / "run")
    losses, saved = {}, {}
    for stage in (1, 0):
        with process_group(60):
            engine, groups = make_engine(stage)
            load_engine(engine, old, 2)
            writer = CheckpointWriter(
                folder / f"stage{stage}", CheckpointConfig(), groups, "config: {}\n"
            )
            saved[stage] = writer.save(engine, {"step": 2})
            losses[stage] = [step(engine), step(engine)]
            load_engine(engine, saved[stage], 2)
            losses[stage, "again"] = [step(engine), step(engine)]
            engine.close()
    return old, saved, losses


def test_a_checkpoint_of_before_the_stacks_is_read_to_the_last_bit(resumed):
    digest = hashlib.sha256()
    for key, tensor in sorted(everything_in(resumed[0]).items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == OLD_SHA256
    load_weights(Transformer(CONFIG, PARTS), resumed[0])


def test_a_checkpoint_of_before_the_packs_is_read_to_the_last_bit(resumed, tmp_path):
    with tarfile.open(FORMER) as archive:
        archive.extractall(tmp_path, filter="data")
    former = find_checkpoint(tmp_path / "run")
    before, after = everything_in(resumed[0]), everything_in(former)
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    load_weights(Transformer(CONFIG, PARTS), former)


def test_a_run_of_before_the_stacks_goes_on_and_its_next_checkpoint_holds_the_same(resumed):
    old, saved, losses = resumed
    before = everything_in(old)
    for stage, checkpoint in saved.items():
        after = everything_in(checkpoint)
        assert list(after) and set(after) == set(before), "a reader asks for the same keys"
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert losses[stage] == losses[stage, "again"]
        # made on another machine, perhaps
        assert losses[stage] == pytest.approx(OLD_LOSSES, rel=1e-5)


def test_the_index_has_an_entry_per_parameter_not_per_expert(resumed):
    old, saved, _ = resumed
    stored = CheckpointReader(saved[1]).stored
    stacks = [key.removesuffix("/expert_ids") for key in stored if key.endswith("/expert_ids")]
    assert all(stored[f"{name}/fp32"][0] == CONFIG.num_experts for name in stacks)
    num_stacks = len(stacks)
    per_expert = 3 * num_stacks * CONFIG.num_experts
    assert (
        len(stored) == len(CheckpointReader(old).stored) - per_expert + 3 * num_stacks + num_stacks
    )


def test_one_expert_can_be_asked_for_and_one_that_is_not_there_is_named(resumed):
    reader = CheckpointReader(resumed[1][1])
    key = next(key for key in reader.shapes if key.endswith(".down.3/exp_avg"))
    value = torch.empty(reader.shapes[key])
    reader.read({key: value})
    assert torch.equal(value, everything_in(resumed[0])[key])
    with pytest.raises(CheckpointError, match=r"it has no .*\.down\.4/exp_avg"):
        reader.read({key.replace(".3/", ".4/"): value})


# --- the layout itself ----------------------------------------------------------------------------


def write(folder: Path, order: list[int], pieces: list[int]) -> torch.Tensor:
    """A stack of experts in this order, cut into pieces of these many rows; returns the values by
    expert.
    """
    values = torch.randn(len(order), 3, 2)
    rows, start = [], 0
    for size in pieces:
        rows.append(Rows(start, len(order), values[order[start : start + size]].clone()))
        start += size
    stacks = {
        "layer.down/fp32": rows,
        "layer.down/expert_ids": [Rows(0, len(order), torch.tensor(order))],
    }
    dcp.save(
        {"other": torch.ones(2)},
        checkpoint_id=folder / "weights",
        planner=StackSavePlanner(stacks),
        no_dist=True,
    )
    return values


@pytest.mark.parametrize("pieces", [[8], [3, 3, 2], [1] * 8])
@pytest.mark.parametrize(
    "order", [list(range(8)), [5, 2, 7, 0, 1, 6, 3, 4]], ids=["in order", "placed"]
)
def test_any_rank_reads_its_experts_from_what_any_ranks_wrote(tmp_path, order, pieces):
    values = write(tmp_path, order, pieces)
    reader = CheckpointReader(tmp_path)
    for size in (1, 2, 8):
        for first in range(0, 8, size):
            for ids in (tuple(range(first, first + size)), tuple(order[first : first + size])):
                want = torch.empty(size, 3, 2)
                reader.read_parameters({"layer.down/fp32": want}, {"layer.down": ids})
                assert torch.equal(want, values[list(ids)])
    single = {f"layer.down.{expert}/fp32": torch.empty(3, 2) for expert in (6, 1)}
    reader.read(single)
    assert all(
        torch.equal(single[f"layer.down.{expert}/fp32"], values[expert]) for expert in (6, 1)
    )


def test_each_piece_is_read_once(tmp_path, monkeypatch):
    """Experts in any order must not read a piece again for each of them."""
    write(tmp_path, [5, 2, 7, 0, 1, 6, 3, 4], [4, 4])
    loads, original = [], StackLoadPlanner.commit_tensor
    monkeypatch.setattr(
        StackLoadPlanner,
        "commit_tensor",
        lambda self, item, tensor: (loads.append(item.storage_index), original(self, item, tensor)),
    )
    reader = CheckpointReader(tmp_path)
    loads.clear()
    reader.read_parameters(
        {"layer.down/fp32": torch.empty(8, 3, 2)}, {"layer.down": tuple(range(8))}
    )
    assert len(loads) == 2


def change(folder: Path, harm) -> None:
    index = folder / "weights" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    harm(metadata.state_dict_metadata["layer.down/fp32"].chunks)
    index.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    "harm",
    [
        lambda chunks: chunks.pop(),
        lambda chunks: chunks.append(chunks[0]),
        lambda chunks: chunks.__setitem__(1, chunks[0]),
    ],
)
def test_pieces_that_do_not_cover_the_experts_are_refused(tmp_path, harm):
    write(tmp_path, list(range(8)), [4, 4])
    change(tmp_path, harm)
    with pytest.raises(CheckpointError, match="do not cover its 8 rows"):
        CheckpointReader(tmp_path).read_parameters(
            {"layer.down/fp32": torch.empty(2, 3, 2)}, {"layer.down": (0, 1)}
        )


@pytest.mark.parametrize("ids", [[0, 0, 1], [1, 2, 3], [-1, 0, 1]])
def test_expert_ids_name_every_expert_once(ids):
    with pytest.raises(ValueError, match="every expert once"):
        row_of_expert(torch.tensor(ids))


@pytest.mark.parametrize(
    ("num_local", "row_bytes", "num_stacks", "replicas", "rows"),
    [
        (1024, 1536, 384, 1, 1024),  # one rank, tiny experts: one piece each
        (16, 2**25, 384, 16, 8),  # at most PIECE_BYTES
        (16, 2**30, 384, 16, 1),  # or one row
        # few layers, many replicas: small pieces, so that all of them write
        (16, 2**20, 24, 64, 1),
        (16, 2**20, 384, 16, 16),
    ],
)
def test_pieces_are_bounded_and_shared_out(num_local, row_bytes, num_stacks, replicas, rows):
    assert rows_per_piece(num_local, row_bytes, num_stacks, replicas) == rows
    assert rows == 1 or rows * row_bytes <= PIECE_BYTES


def test_what_was_saved_is_whole(resumed):
    assert all(damage(checkpoint) is None for checkpoint in resumed[1].values())
