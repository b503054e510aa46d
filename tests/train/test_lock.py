"""One process at a time in a run directory; a lock whose owner is gone stands in nobody's way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from train.rank.lock import (
    REFRESH_SECONDS,
    RunLock,
    RunLocked,
    SignOfLife,
    _alone_in,
    _Found,
    _process_start,
)

ROOT = Path(__file__).resolve().parent.parent.parent
DEAD_PID = 2**22 + 1  # above what Linux gives out
CONTEND = """
import sys, time
from pathlib import Path
from train.rank.lock import RunLock, RunLocked
go = Path(sys.argv[1]) / "go"
while not go.exists():
    pass
try:
    lock = RunLock(Path(sys.argv[1])).acquire()
    print("won", flush=True)
    sys.stdin.read()
except RunLocked as error:
    print("refused:", error, flush=True)
"""


def contender(run: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CONTEND, str(run)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def write_lock(run: Path, age: float = 0.0, **changes) -> Path:
    """The lock of a process of this machine that is gone, but for the changes; last refreshed `age`
    seconds ago.
    """
    with RunLock(run):
        record = json.loads((run / "lock").read_text())
    path = run / "lock"
    path.write_text(json.dumps({**record, "pid": DEAD_PID, "token": "other", **changes}))
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def owner(run: Path) -> dict:
    return json.loads((run / "lock").read_text())


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.01)


def test_a_lock_names_its_owner_and_goes_with_it(tmp_path):
    with RunLock(tmp_path) as lock:
        record = owner(tmp_path)
        assert record["pid"] == os.getpid() and record["token"] == lock.token
        assert record["process_start"] == _process_start(os.getpid()) > 0
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
        assert lock.lost is None
    assert list(tmp_path.iterdir()) == []


def test_a_second_owner_is_refused_with_name_and_age(tmp_path):
    with RunLock(tmp_path) as lock:
        with pytest.raises(RunLocked, match=rf"process {os.getpid()} on .* was refreshed \d s ago"):
            RunLock(tmp_path).acquire()
        assert isinstance(RunLocked(), ValueError) and owner(tmp_path)["token"] == lock.token


@pytest.mark.parametrize("stale", [False, True])
def test_of_several_contenders_exactly_one_wins(tmp_path, stale):
    if stale:
        write_lock(tmp_path)
    processes = [contender(tmp_path) for _ in range(4)]
    time.sleep(1.0)  # all are waiting for the start
    (tmp_path / "go").touch()
    words = [process.stdout.readline() for process in processes]
    won = [process for process, word in zip(processes, words, strict=True) if word == "won\n"]
    for process in processes:
        process.kill()
        process.communicate()
    assert len(won) == 1, words
    assert sum("is in use by process" in word or "just starting" in word for word in words) == 3
    assert owner(tmp_path)["pid"] == won[0].pid


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    (tmp_path / "go").touch()
    process = contender(tmp_path)
    assert process.stdout.readline() == "won\n"
    with pytest.raises(RunLocked, match=f"process {process.pid} on"):
        RunLock(tmp_path).acquire()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with RunLock(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()


def test_a_killed_process_that_nobody_has_reaped_is_gone(tmp_path):
    (tmp_path / "go").touch()
    process = contender(tmp_path)
    assert process.stdout.readline() == "won\n"
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: _process_start(process.pid) == -1)
    RunLock(tmp_path).acquire().release()
    process.communicate()


def test_a_reused_process_id_is_not_the_owner(tmp_path):
    write_lock(tmp_path, pid=os.getpid(), process_start=_process_start(os.getpid()) - 1)
    with RunLock(tmp_path):
        assert owner(tmp_path)["token"] != "other"


@pytest.mark.parametrize(
    "elsewhere", [{"host": "elsewhere"}, {"boot_id": "another"}, {"pid_namespace": "pid:[1]"}]
)
def test_an_owner_that_cannot_be_seen_counts_by_age_alone(tmp_path, elsewhere):
    write_lock(tmp_path, age=20, **elsewhere)
    with pytest.raises(RunLocked, match=r"refreshed 2\d s ago"):
        RunLock(tmp_path).acquire()
    (tmp_path / "lock").unlink()
    write_lock(tmp_path, age=31, **elsewhere)
    RunLock(tmp_path).acquire().release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"pid": "x"}', b"[" * 100_000, b"9" * 5000]
)
def test_a_damaged_lock_counts_by_age_alone(tmp_path, content):
    path = tmp_path / "lock"
    path.write_bytes(content)
    with pytest.raises(RunLocked, match="damaged lock file"):
        RunLock(tmp_path).acquire()
    os.utime(path, (time.time() - 31,) * 2)
    RunLock(tmp_path).acquire().release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_place_of_the_lock_is_a_damaged_lock(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(RunLocked, match="damaged lock file"):
        RunLock(tmp_path).acquire()
    os.utime(tmp_path / "lock", (time.time() - 31,) * 2)
    with RunLock(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()


def test_the_age_is_told_by_the_file_system_and_not_by_this_machine(tmp_path, monkeypatch):
    write_lock(tmp_path, host="elsewhere")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with pytest.raises(RunLocked, match=r"refreshed 0 s ago"):
        RunLock(tmp_path).acquire()


def test_the_owner_refreshes(tmp_path):
    with RunLock(tmp_path, refresh_seconds=0.02):
        then = time.time() - 100
        os.utime(tmp_path / "lock", (then, then))
        wait_until(lambda: (tmp_path / "lock").stat().st_mtime > then + 50)


def test_an_owner_whose_lock_was_taken_over_is_told_and_leaves_the_new_one(tmp_path):
    told: list[str] = []
    first = RunLock(tmp_path, on_lost=told.append, refresh_seconds=0.02).acquire()
    (tmp_path / "lock").unlink()
    second = RunLock(tmp_path).acquire()
    wait_until(lambda: told)
    assert (
        first.lost == told[0]
        and f"taken over by process {os.getpid()}" in told[0]
        and len(told) == 1
    )
    first.release()
    assert owner(tmp_path)["token"] == second.token and second.lost is None
    second.release()


def test_an_owner_whose_lock_was_deleted_is_told(tmp_path):
    told = threading.Event()
    with RunLock(tmp_path, on_lost=lambda reason: told.set(), refresh_seconds=0.02) as lock:
        (tmp_path / "lock").unlink()
        assert told.wait(10) and "was deleted" in lock.lost
    assert not (tmp_path / "lock").exists()


def win_in_between(run: Path) -> RunLock:
    """Another contender has taken the abandoned lock over."""
    (run / "lock").unlink()
    return RunLock(run).acquire()


@pytest.mark.parametrize("late", ["before it looks again", "before it moves it away"])
def test_a_lock_that_changes_hands_while_it_is_judged_is_left_or_put_back(
    tmp_path, monkeypatch, late
):
    """As on file systems without flock."""
    write_lock(tmp_path)
    loser, winner, is_still = RunLock(tmp_path), [], _Found.is_still

    def slow(found, path):
        first = is_still(found, path) if late == "before it moves it away" else None
        if not winner:
            winner.append(win_in_between(tmp_path))
        return is_still(found, path) if first is None else first

    monkeypatch.setattr(_Found, "is_still", slow)
    with pytest.raises(RunLocked, match=f"process {os.getpid()}"):
        loser.acquire()
    assert owner(tmp_path)["token"] == winner[0].token
    winner[0].release()
    assert list(tmp_path.iterdir()) == []


def test_a_winner_that_is_replaced_at_once_gives_way(tmp_path, monkeypatch):
    """Two others on a file system without flock: one has moved the new lock away, another has made
    its own.
    """
    write_lock(tmp_path)
    winner = []
    monkeypatch.setattr(
        time, "sleep", lambda seconds: winner or winner.append(win_in_between(tmp_path))
    )
    with pytest.raises(RunLocked, match=f"process {os.getpid()}"):
        RunLock(tmp_path).acquire()
    assert owner(tmp_path)["token"] == winner[0].token
    winner[0].release()


def test_starting_side_by_side_is_refused_rather_than_waited_for(tmp_path, monkeypatch):
    write_lock(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with _alone_in(tmp_path), pytest.raises(RunLocked, match="just starting"):
        RunLock(tmp_path).acquire()


def test_a_directory_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be written \(No such file"):
        RunLock(tmp_path / "nowhere").acquire()


# --- ranks that outlive their supervisor ----------------------------------------------------------


@pytest.mark.parametrize("lock", ["abandoned", "gone"])
def test_nobody_takes_over_while_a_rank_lives(tmp_path, lock):
    if lock == "abandoned":
        write_lock(tmp_path)
    life = SignOfLife(tmp_path, 3)
    life.show()
    with pytest.raises(RunLocked, match=f"rank 3 .* still lives .process {os.getpid()}"):
        RunLock(tmp_path).acquire()
    life.end()
    assert not (tmp_path / "alive").exists()
    with RunLock(tmp_path):
        pass


def test_a_rank_whose_agent_is_gone_does_not_count(tmp_path):
    code = (
        "import sys; from pathlib import Path; from train.rank.lock import SignOfLife; "
        "SignOfLife(Path(sys.argv[1]), 0).show()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
    assert (tmp_path / "alive" / "0").exists()
    with RunLock(tmp_path):
        pass


def test_a_rank_elsewhere_counts_by_age_alone(tmp_path):
    SignOfLife(tmp_path, 0).show()
    path = tmp_path / "alive" / "0"
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": "elsewhere", "pid": 1}))
    with pytest.raises(RunLocked, match="elsewhere"):
        RunLock(tmp_path).acquire()
    long_ago = time.time() - 100
    os.utime(path, (long_ago, long_ago))
    with RunLock(tmp_path):
        pass


def test_a_sign_of_life_is_refreshed(tmp_path):
    life = SignOfLife(tmp_path, 0)
    life.show()
    os.utime(life.path, (1, 1))
    life.show()
    assert life.path.stat().st_mtime == 1  # not more often than others can tell
    life._shown -= REFRESH_SECONDS
    life.show()
    assert time.time() - life.path.stat().st_mtime < 60


def test_a_job_that_stood_still_learns_that_it_lost_the_directory(tmp_path):
    lock = RunLock(tmp_path, refresh_seconds=1000)
    with lock:
        assert lock.still_ours()
        (tmp_path / "lock").unlink()
        assert not lock.still_ours()


def test_the_launcher_can_import_it_without_torch():
    code = "import sys, train.rank.lock; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
