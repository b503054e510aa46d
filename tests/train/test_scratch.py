"""Folders made beside their place: whole or absent, and what a killed process leaves does not
stay.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
from pathlib import Path

import pytest

from train.config.data import DataConfig, SourceConfig, TokenizerConfig
from train.data.prepare import prepare, store_path
from train.data.store import TokenStore, TrainingSamples
from train.files import scratch as scratches
from train.files.scratch import make_folder


def killed_while_making(folder: Path) -> None:
    """A process makes the folder and is killed half-way."""
    if (pid := os.fork()) == 0:
        try:

            def half(scratch: Path) -> None:
                (scratch / "half").write_text("x")
                os.kill(os.getpid(), signal.SIGKILL)

            make_folder(folder, half, lambda: False)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def write(scratch: Path) -> None:
    (scratch / "whole").write_text("x")


def test_what_killed_processes_left_is_removed_by_the_next_whichever_folder_it_makes(tmp_path):
    for name in ("one", "one", "two"):
        killed_while_making(tmp_path / name)
        # of the last one alone
        assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]
    make_folder(tmp_path / "three", write, lambda: False)
    assert [path.name for path in tmp_path.iterdir()] == ["three"]


def test_what_a_living_process_makes_is_never_touched(tmp_path):
    def while_it_lives(scratch: Path) -> None:
        write(scratch)
        make_folder(tmp_path / "other", write, lambda: False)
        assert scratch.is_dir()

    make_folder(tmp_path / "one", while_it_lives, lambda: False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


def test_another_machines_scratch_is_left_until_nothing_has_changed_for_long(tmp_path):
    """Its lock may not be seen from here."""
    folder, lock = tmp_path / ".one-abcdefgh", tmp_path / ".one-abcdefgh.lock"
    folder.mkdir()
    lock.write_text('{"host": "elsewhere"}')
    without_lock = tmp_path / ".two-abcdefgh"  # of a version that knew none
    without_lock.mkdir()
    (tmp_path / ".strangers-abcdefgh").mkdir()
    make_folder(tmp_path / "two", write, lambda: False)
    assert folder.is_dir() and without_lock.is_dir()
    for path in (folder, lock, without_lock, tmp_path / ".strangers-abcdefgh"):
        os.utime(path, (0, 0))
    make_folder(tmp_path / "two", write, lambda: False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".strangers-abcdefgh", "two"]


def test_where_there_are_no_locks_nothing_is_taken_for_abandoned(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    killed_while_making(tmp_path / "one")
    make_folder(tmp_path / "one", write, lambda: False)
    assert len(list(tmp_path.iterdir())) == 3 and (tmp_path / "one" / "whole").is_file()


def test_who_finishes_first_stays(tmp_path):
    def late(scratch: Path) -> None:
        write(scratch)
        make_folder(
            tmp_path / "one", lambda other: (other / "first").write_text("x"), lambda: False
        )

    make_folder(tmp_path / "one", late, lambda: (tmp_path / "one" / "first").is_file())
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


# --- what cannot be written -----------------------------------------------------------------------


def data_of(folder: Path) -> DataConfig:
    (folder / "text.txt").write_text("\n".join(f"line {i} of the text" for i in range(60)))
    source = SourceConfig("text", data_files=str(folder / "text.txt"), sample_by="line")
    return DataConfig((source,), TokenizerConfig(vocab_size=300), cache_dir=str(folder / "cache"))


def read_only(monkeypatch: pytest.MonkeyPatch, *places: Path) -> None:
    """New names below these places are refused as on a disk that is mounted read-only."""
    usual = scratches.tempfile.mkstemp

    def mkstemp(*args: object, dir: Path, **options: object) -> tuple[int, str]:
        if any(Path(dir).is_relative_to(place) for place in places):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))
        return usual(*args, dir=dir, **options)

    monkeypatch.setattr(scratches.tempfile, "mkstemp", mkstemp)


def test_a_store_on_a_read_only_disk_trains_with_a_new_seed_from_an_order_in_the_run(
    tmp_path, monkeypatch
):
    store = TokenStore(prepare(data_of(tmp_path), lambda line: None))

    def tokens(seed: int, run_data: Path | None = None) -> list[list[int]]:
        samples = TrainingSamples(store, (1.0,), 16, seed, run_data)
        samples.open(0, 8)
        return [samples.tokens(i).tolist() for i in range(8)]

    first, second = tokens(1), tokens(2)
    shutil.rmtree(store.path / "index_cache" / "2-16-0-0")
    read_only(monkeypatch, store.path)
    run_data = tmp_path / "run" / "data"
    assert tokens(1) == first and tokens(2, run_data) == second == tokens(2, run_data)
    assert [path.name for path in (run_data / "index_cache").iterdir()] == ["2-16-0-0"]
    read_only(monkeypatch, store.path, tmp_path / "run")
    with pytest.raises(
        ValueError,
        match=r"order of the samples cannot be written to .*Read-only file system.* or to .*"
        r"set data.cache_dir",
    ):
        tokens(3, run_data)


def test_a_place_for_stores_that_cannot_be_written_is_named_with_the_setting(tmp_path, monkeypatch):
    config = data_of(tmp_path)
    read_only(monkeypatch, tmp_path / "cache")
    with pytest.raises(
        ValueError,
        match=r"data.cache_dir: .*cache cannot be written \(Read-only file system\); set",
    ):
        prepare(config, lambda line: None)
    monkeypatch.undo()
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        ValueError,
        match=r"data.cache_dir: .* cannot be written \((File exists|Not a directory)\); set",
    ):
        prepare(config, lambda line: None)


def test_a_disk_that_fills_while_the_store_is_written_is_told_as_such(tmp_path, monkeypatch):
    config = data_of(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(
        ValueError, match=r"data.cache_dir: .* cannot be written \(No space left on device\)"
    ):
        prepare(config, lambda line: None)
    assert not list(store_path(config).parent.iterdir())
