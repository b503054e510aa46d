"""Small tensors share entries; where each lies is in the index; an index that errs is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from train.checkpoint import packs
from train.checkpoint.expert_stacks import StackSavePlanner
from train.checkpoint.packs import Member, pack
from train.checkpoint.reader import CheckpointReader
from train.files.manifest import CheckpointError


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "norm/fp32": torch.randn(5, generator=generator),
        "norm/exp_avg": torch.randn(5, generator=generator),
        "projection/fp32": torch.randn(3, 4, generator=generator),
        "scale/fp32": torch.tensor(2.5),
        "none/fp32": torch.empty(0, 7),
        "buffer/count": torch.arange(3),
        "buffer/bias": torch.randn(4, generator=generator),
        "embedding/fp32": torch.randn(packs.PACKED_BYTES // 4 + 1, generator=generator),
    }


def save(folder: Path) -> dict[str, torch.Tensor]:
    entries, members = pack(tensors(), 0)
    dcp.save(
        entries,
        checkpoint_id=folder / "weights",
        planner=StackSavePlanner({}, members),
        no_dist=True,
    )
    return tensors()


def test_small_tensors_of_a_state_and_type_share_an_entry():
    given = tensors()
    entries, members = pack(given, 3)
    assert not given, "nothing is held twice"
    assert {name: tuple(entry.shape) for name, entry in entries.items()} == {
        "packed/3/fp32.float32/0": (5 + 12 + 1,),
        "packed/3/exp_avg.float32/0": (5,),
        "packed/3/buffer.int64/0": (3,),
        "packed/3/buffer.float32/0": (4,),
        "embedding/fp32": (packs.PACKED_BYTES // 4 + 1,),
    }
    for key, tensor in tensors().items():
        stored = members[key].of(entries[members[key].pack]) if key in members else entries[key]
        assert torch.equal(stored, tensor)


def test_packs_are_bounded(monkeypatch):
    monkeypatch.setattr(packs, "PACK_BYTES", 40)
    entries, members = pack({f"p{i}/fp32": torch.full((4,), float(i)) for i in range(5)}, 0)
    assert [entry.numel() for entry in entries.values()] == [8, 8, 4]
    assert members["p3/fp32"] == Member("packed/0/fp32.float32/1", 4, (4,))


@pytest.mark.parametrize("held", [0, 2**28])
def test_tensors_are_asked_for_by_their_own_names(tmp_path, monkeypatch, held):
    monkeypatch.setattr("train.checkpoint.reader.PACKS_HELD_BYTES", held)
    saved = save(tmp_path)
    reader = CheckpointReader(tmp_path)
    assert reader.stored == {key: tuple(tensor.shape) for key, tensor in saved.items()}
    assert reader.num_entries == 5
    want = {key: torch.empty_like(tensor) for key, tensor in saved.items()}
    reader.read(want)
    assert all(torch.equal(want[key], saved[key]) for key in saved)
    for key in reversed(saved):  # and one by one
        alone = torch.empty_like(saved[key])
        reader.read({key: alone})
        assert torch.equal(alone, saved[key])
    with pytest.raises(CheckpointError, match="has norm/fp32 of shape"):
        reader.read({"norm/fp32": torch.empty(4)})
    with pytest.raises(CheckpointError, match=r"has no packed/0/fp32\.float32/0"):
        reader.read({"packed/0/fp32.float32/0": torch.empty(18)})


def test_a_pack_is_read_once(tmp_path, monkeypatch):
    saved = save(tmp_path)
    reader, loads = CheckpointReader(tmp_path), []
    original = reader._load_entries
    monkeypatch.setattr(
        reader,
        "_load_entries",
        lambda plain, stacks: (loads.extend(plain), original(plain, stacks)),
    )
    for key in ("norm/fp32", "projection/fp32", "scale/fp32"):
        reader.read({key: torch.empty_like(saved[key])})
    assert loads == ["packed/0/fp32.float32/0"]


PACK = "packed/0/fp32.float32/0"


@pytest.mark.parametrize(
    "harm",
    [
        lambda notes: notes.update({"norm/fp32": (PACK, 1, (5,))}),
        lambda notes: notes.update({"norm/fp32": (PACK, 0, (4,))}),
        lambda notes: notes.update({"norm/fp32": (PACK, 0, (6,))}),
        lambda notes: notes.update({"norm/fp32": (PACK, 0, (-5,))}),
        lambda notes: notes.update({"norm/fp32": (PACK, True, (5,))}),
        lambda notes: notes.update({"norm/fp32": (PACK, 0, 5)}),
        lambda notes: notes.update({"norm/fp32": (PACK, 0)}),
        lambda notes: notes.update({"norm/fp32": ("embedding/fp32", 0, (5,))}),
        lambda notes: notes.update({"norm/fp32": ("packed/9/fp32.float32/0", 0, (5,))}),
        lambda notes: notes.update({"more/fp32": (PACK, 18, (1,))}),
        lambda notes: notes.update({7: (PACK, 0, (5,))}),
        lambda notes: notes.pop("scale/fp32"),
        lambda notes: notes.pop("projection/fp32"),
        lambda notes: notes.clear(),
    ],
)
def test_an_index_whose_notes_err_is_refused(tmp_path, harm):
    save(tmp_path)
    index = tmp_path / "weights" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    harm(metadata.planner_data)
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointReader(tmp_path)
