"""Files are hashed by all ranks together, never again while unchanged, and nothing damaged is gone
on with.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_checkpoint import CONFIG, PARTS
from test_expert_stacks import make_engine, step

import train.checkpoint.verification as verification
from model.transformer import Transformer
from train.checkpoint.restore import restore
from train.checkpoint.verification import (
    RECORD,
    Outcome,
    remember,
    share,
    split,
    unverified,
    verify,
    verify_alone,
)
from train.checkpoint.writer import (
    CheckpointError,
    CheckpointWriter,
    damage,
    find_checkpoint,
    load_weights,
)
from train.config.training import CheckpointConfig
from train.files.manifest import file_facts, read_manifest
from train.rank.runtime import process_group


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of three listed files."""
    monkeypatch.setattr(verification, "SETTLED_NS", 0)
    (tmp_path / "c" / "weights").mkdir(parents=True)
    for name in ("state.json", "weights/__0_0.distcp", "weights/__1_0.distcp"):
        (tmp_path / "c" / name).write_bytes(name.encode() * 100)
    return tmp_path / "c"


def listed(folder: Path) -> dict:
    return {
        str(path.relative_to(folder)): file_facts(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are hashed from now on."""
    names, original = [], verification.file_facts
    monkeypatch.setattr(
        verification, "file_facts", lambda path: (names.append(path.name), original(path))[1]
    )
    return names


@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_ranks_share_the_files_out_and_start_with_their_own(ranks):
    names = [
        "rng-00000.json",
        *(f"weights/__{rank}_0.distcp" for rank in (10, 2, 0, 1, *range(3, 10), *range(11, 16))),
        "weights/.metadata",
    ]
    small, shared = split(names)
    assert small == ["rng-00000.json", "weights/.metadata"]
    shares = [share(shared, rank, ranks) for rank in range(ranks)]
    assert sorted(name for part in shares for name in part) == sorted(shared)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(part[0] == f"weights/__{rank}_0.distcp" for rank, part in enumerate(shares))


def test_what_was_verified_is_not_hashed_again(folder, hashed):
    files = listed(folder)
    assert verify_alone(folder, files) is None
    assert len(hashed) == 3
    assert verify_alone(folder, files) is None
    assert len(hashed) == 3 and unverified(folder, files) == []


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    with path.open("r+b") as file:
        file.write(data)


def flipped_with_its_times_put_back(path: Path) -> None:
    before = path.stat()
    flipped(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    before = path.stat()
    data = path.read_bytes()
    other = path.with_name("other")
    other.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [flipped, flipped_with_its_times_put_back, replaced])
def test_any_change_through_the_file_system_is_seen(folder, change):
    files = listed(folder)
    assert verify_alone(folder, files) is None
    change(folder / "weights" / "__1_0.distcp")
    assert verify_alone(folder, files) == "weights/__1_0.distcp has another checksum"
    assert verify_alone(folder, files) == "weights/__1_0.distcp has another checksum"


@pytest.mark.parametrize(
    "change",
    [
        {"time": 0},
        {"time": 1e12},
        {"time": None},
        {"time": True},
        {"sha256": "x"},
        {"file": []},
        {"file": None},
    ],
)
def test_a_record_that_does_not_fit_is_not_believed(folder, hashed, change):
    files = listed(folder)
    verify_alone(folder, files)
    record = json.loads((folder / RECORD).read_text())
    record["state.json"].update(change)
    (folder / RECORD).write_text(json.dumps(record))
    hashed.clear()
    assert verify_alone(folder, files) is None and hashed == ["state.json"]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"state.json": 3}', b"[" * 20_000, "folder", None]
)
def test_a_damaged_record_stops_nothing(folder, hashed, content):
    files = listed(folder)
    verify_alone(folder, files)
    (folder / RECORD).unlink()
    if content == "folder":
        (folder / RECORD).mkdir()
    elif content is not None:
        (folder / RECORD).write_bytes(content)
    hashed.clear()
    assert verify_alone(folder, files) is None and len(hashed) == 3


def test_a_copy_is_hashed(folder, hashed, tmp_path):
    files = listed(folder)
    verify_alone(folder, files)
    shutil.copytree(folder, tmp_path / "copy")
    hashed.clear()
    assert verify_alone(tmp_path / "copy", files) is None and len(hashed) == 3


def test_a_file_that_has_just_been_written_is_not_recorded(folder, monkeypatch):
    """One more change within the clock's grain would leave the same times."""
    monkeypatch.setattr(verification, "SETTLED_NS", 3600 * 10**9)
    files = listed(folder)
    assert verify_alone(folder, files) is None
    assert unverified(folder, files) == list(files)


def test_what_several_ranks_have_hashed_is_one_record(folder):
    files = listed(folder)
    names = list(files)
    remember(
        folder,
        files,
        [verify(folder, files, names[:1]), Outcome(), verify(folder, files, names[1:])],
    )
    assert unverified(folder, files) == []


# --- a run that resumes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints of steps 1 and 2, and the loss of the step after each."""
    run = tmp_path_factory.mktemp("restore") / "run"
    losses = {}
    with process_group(60):
        engine, groups = make_engine(1)
        writer = CheckpointWriter(run, CheckpointConfig(keep_last=5), groups, "config: {}\n")
        losses[0] = step(engine)
        for number in (1, 2):
            writer.save(engine, {"step": number})
            losses[number] = step(engine)
        engine.close()
    return run, losses


def spoil_tensors(newest: Path) -> None:
    [path] = (newest / "weights").glob("*.distcp")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def spoil_headers(newest: Path) -> None:
    """So that reading fails as well: that is damage, not another model."""
    [path] = (newest / "weights").glob("*.distcp")
    path.write_bytes(bytes(path.stat().st_size))


def spoil_index(newest: Path) -> None:
    flipped(newest / "weights" / ".metadata")


def spoil_state(newest: Path) -> None:
    (newest / "state.json").write_text(
        (newest / "state.json").read_text().replace('"step": 2', '"step": 7')
    )


@pytest.mark.parametrize(
    ("spoil", "number"),
    [(None, 2), (spoil_tensors, 1), (spoil_headers, 1), (spoil_index, 1), (spoil_state, 1)],
)
def test_a_run_goes_on_from_the_newest_whole_checkpoint(saved, tmp_path, caplog, spoil, number):
    shutil.copytree(saved[0], tmp_path / "run")
    if spoil is not None:
        spoil(tmp_path / "run" / "checkpoints" / "step-00000002")
    with process_group(60):
        engine, _ = make_engine(1)
        checkpoint, state = restore(engine, tmp_path / "run")
        assert checkpoint.name == f"step-0000000{number}" and state["step"] == number
        assert step(engine) == saved[1][number]
        engine.close()
    assert ("has another checksum" in caplog.text) == (spoil is not None)


def test_whole_files_of_another_model_are_an_error_not_damage(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    (newest / "weights" / ".metadata").write_bytes(b"no index")
    files = read_manifest(newest)
    files["weights/.metadata"] = file_facts(newest / "weights" / ".metadata")
    (newest / "manifest.json").write_text(json.dumps({"format": 2, "files": files}))
    with process_group(60):
        engine, _ = make_engine(1)
        with pytest.raises(CheckpointError, match="step-00000002/weights cannot be read"):
            restore(engine, tmp_path / "run")
        engine.close()


def test_the_checksums_that_the_writer_computes_on_the_way_are_those_of_the_files(saved):
    newest = saved[0] / "checkpoints" / "step-00000002"
    assert damage(newest) is None
    assert {name: file_facts(newest / name) for name in read_manifest(newest)} == read_manifest(
        newest
    )


def test_evaluating_twice_hashes_once(saved, tmp_path, monkeypatch, hashed):
    monkeypatch.setattr(verification, "SETTLED_NS", 0)
    shutil.copytree(saved[0], tmp_path / "run")
    for _ in range(2):
        load_weights(Transformer(CONFIG, PARTS), find_checkpoint(tmp_path / "run"))
    assert len(hashed) == len(set(hashed)) == len(read_manifest(find_checkpoint(tmp_path / "run")))
    assert torch.isfinite(torch.tensor(list(saved[1].values()))).all()
