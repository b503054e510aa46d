"""Writing a teacher's words: a kill at any moment costs one file's rows and no byte differs, under
any size of a micro-batch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from train.data.loader import TrainingLoader
from train.objectives import cache
from train.objectives.cache import Facts, partial_of, read_manifest, write_cache

VOCAB, SEQ_LEN, END = 50, 6, 0
FACTS = Facts(
    vocab_size=VOCAB,
    num_ids=4,
    seq_len=SEQ_LEN,
    seed=1,
    temperature=1.0,
    content="text",
    num_rows=20,
)
TOLD = {"from": "run/checkpoints/step-00000006", "files": "a"}


class Rows:
    """Row i of a run, and how often rows were asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def open(self, start: int, stop: int) -> None:
        pass

    def row(self, i: int) -> np.ndarray:
        self.asked += 1
        return np.random.default_rng(i).integers(1, VOCAB, SEQ_LEN + 1)


class Teacher:
    """What it says depends on a token alone."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCAB, VOCAB, generator=generator)
        self.model: Any = self

    def last_hidden(self, inputs: Any) -> torch.Tensor:
        return self.table[inputs.input_ids]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(cache, "ROWS_OF_A_FILE", 8)


def written(
    to: Path, micro_batch: int = 2, rows: int | None = None, **changes: Any
) -> tuple[int, list[str]]:
    """Write a cache, or until so many rows are done; how many rows were read, and what was said."""
    samples, said = Rows(), list[str]()
    loader = TrainingLoader(samples, SEQ_LEN, micro_batch, END, 0, 1)  # type: ignore[arg-type]
    told = TOLD | changes.pop("told", {})
    facts = dataclasses.replace(FACTS, **changes)
    teacher: Any = Teacher()
    for done in write_cache(to, teacher, loader, facts, told, torch.device("cpu"), said.append):
        if rows is not None and done >= rows:
            break
    return samples.asked, said


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def undisturbed(tmp_path) -> dict[str, bytes]:
    written(tmp_path / "whole")
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 8, 16])
def test_no_row_depends_on_the_size_of_a_micro_batch(undisturbed, tmp_path, micro_batch):
    written(tmp_path / "words", micro_batch)
    assert contents(tmp_path / "words") == undisturbed
    manifest = read_manifest(tmp_path / "words")
    assert len(manifest["files"]) == 9 and manifest["num_rows"] == 20


@pytest.mark.parametrize(("rows", "kept"), [(2, 0), (8, 0), (10, 8), (16, 8), (18, 16), (20, 16)])
def test_after_a_kill_the_same_command_goes_on_and_no_byte_differs(
    undisturbed, tmp_path, rows, kept
):
    """Ended where rows are counted, before the file of the last of them is written."""
    words = tmp_path / "words"
    written(words, rows=rows)
    assert not words.exists()
    read, said = written(words)
    assert said == [f"goes on in {partial_of(words)}, {kept // 8} files of 8 rows are there"]
    assert read == 20 - kept
    assert contents(words) == undisturbed and not partial_of(words).exists()


@pytest.mark.parametrize("name", ["ids-00000.npy", "done-00000.json", "rows-00000.npy"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_what_a_kill_has_damaged_is_written_again(undisturbed, tmp_path, name, damage):
    words = tmp_path / "words"
    written(words, rows=18)
    broken = partial_of(words) / name
    if damage == "gone":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:-3])
    read, _ = written(words)
    assert read == 20 - 8 and contents(words) == undisturbed


@pytest.mark.parametrize("change", [{"seed": 2}, {"num_ids": 5}, {"told": {"files": "b"}}])
def test_what_was_begun_for_something_else_is_begun_anew_and_said(tmp_path, change):
    words = tmp_path / "words"
    written(words, rows=18)
    read, said = written(words, **change)
    assert read == 20 and "was begun for other rows or by another teacher" in said[0]
    begun = {"seed": 1, "num_ids": 4} | {k: v for k, v in change.items() if k != "told"}
    manifest = read_manifest(words)
    assert {name: manifest[name] for name in begun} == begun
