"""A file that is hashed while it is written holds, to the byte, what was written to it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from train.files.hashed_file import BLOCK_BYTES, HashedFile
from train.files.manifest import file_facts


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0],
        [1],
        [BLOCK_BYTES],
        [BLOCK_BYTES - 1, 2, BLOCK_BYTES - 1],
        [3 * BLOCK_BYTES + 5],
        [16_384] * 600,
    ],
    ids=str,
)
def test_it_holds_what_was_written(tmp_path, sizes):
    parts = [random.Random(i).randbytes(size) for i, size in enumerate(sizes)]
    path = tmp_path / "file"
    with HashedFile(path.open("wb")) as file:
        for part in parts:
            assert file.write(part) == len(part)
        assert file.tell() == sum(sizes)
        os.fsync(file.fileno())
        assert path.stat().st_size == sum(sizes), "what is synced must be with the system"
    assert file.closed
    assert path.read_bytes() == b"".join(parts)
    assert file.facts() == file_facts(path)


def test_a_block_that_is_filled_again_does_not_change_the_one_before(tmp_path):
    """The writer's buffer is its own again when `write` returns, as torch's is."""
    buffer, path = bytearray(1000), tmp_path / "file"
    with HashedFile(path.open("wb")) as file:
        for value in range(20_000):
            buffer[:] = bytes([value % 251]) * 1000
            file.write(buffer)
    written = path.read_bytes()
    assert all(written[i * 1000] == written[i * 1000 + 999] == i % 251 for i in range(20_000))


def test_tensors_are_read_back(tmp_path):
    saved = {"a": torch.randn(1000, 1000), "b": torch.arange(5)}
    with HashedFile((tmp_path / "file").open("wb")) as file:
        torch.save(saved, file)
    read = torch.load(tmp_path / "file", weights_only=True)
    assert all(torch.equal(saved[key], read[key]) for key in saved)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("size", [10, 5 * BLOCK_BYTES])
def test_a_full_disk_is_said(size):
    with (
        pytest.raises(OSError, match="No space"),
        Path("/dev/full").open("wb") as full,
        HashedFile(full) as file,
    ):
        for _ in range(3):
            file.write(bytes(size))
        file.close()


def test_an_error_of_the_writer_stays_the_error(tmp_path):
    with (
        pytest.raises(KeyError),
        (tmp_path / "file").open("wb") as opened,
        HashedFile(opened) as file,
    ):
        file.write(bytes(3 * BLOCK_BYTES))
        raise KeyError
