"""The connection between supervisor and agents: whole messages, limits, proof on both ends, and
what an attacker can do.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.job.supervisor import HANDSHAKE_SECONDS, MAX_STRANGERS, Supervisor, connection_limit
from launch.job.wire import (
    MAX_GREETING,
    MAX_LINE,
    Closed,
    JobFile,
    Line,
    Stranger,
    join,
    new_nonce,
    new_token,
)
from train.config.launching import LaunchConfig, WatchdogConfig
from train.config.training import CheckpointConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pair():
    """Two ends of a connection before any greeting."""
    ends = socket.socketpair(socket.AF_UNIX)
    yield [Line(end) for end in ends]
    for end in ends:
        end.close()


@pytest.fixture
def sealed(pair):
    """The two ends after their greeting: the supervisor's, the agent's."""
    token, ours, theirs = new_token(), new_nonce(), new_nonce()
    for line, is_supervisor in zip(pair, (True, False), strict=True):
        line.seal(token, ours, theirs, is_supervisor=is_supervisor)
    return pair


@pytest.fixture
def supervisor(tmp_path):
    """A supervisor of two ranks that listens, without a launcher."""

    class Config:
        launch, watchdog, checkpoint = (
            LaunchConfig("deepspeed", num_devices=2),
            WatchdogConfig(5, 10),
            CheckpointConfig(),
        )

    made = Supervisor(Config(), tmp_path, [], lambda size: [], {})
    server = socket.create_server(("127.0.0.1", 0), backlog=512)
    server.setblocking(False)
    made.selector.register(server, 1)
    made.port = server.getsockname()[1]
    yield made
    for peer in list(made.peers):
        made.forget(peer)
    server.close()


def listen(supervisor: Supervisor, rounds: int = 5) -> None:
    for _ in range(rounds):
        supervisor.listen(0.05)


def started(supervisor: Supervisor) -> Supervisor:
    """As one_attempt leaves it once its ranks may join."""
    from launch.job.judge import Judge
    from launch.launchers.start import Rendezvous

    supervisor.judge = Judge(2, supervisor.limits, time.monotonic())
    supervisor.rendezvous = Rendezvous("127.0.0.1", 29500)
    return supervisor


def joined(supervisor: Supervisor, **hello) -> tuple[Line, dict]:
    """What an agent of the supervisor's job has after join(), while the supervisor listens."""
    answer: list = []
    job = JobFile("127.0.0.1", supervisor.port, supervisor.token)

    def agent() -> None:
        try:
            answer.append(join(job, 5.0, **hello))
        except OSError as error:
            answer.append(error)

    thread = threading.Thread(target=agent)
    thread.start()
    while thread.is_alive():
        supervisor.listen(0.05)
    if isinstance(answer[0], OSError):
        raise answer[0]
    return answer[0]


def test_messages_arrive_whole_and_in_order(pair):
    left, right = pair
    for i in range(3):
        left.send({"i": i, "text": "ü\n"})
    assert right.receive() == [{"i": i, "text": "ü\n"} for i in range(3)]
    assert right.receive() == []


def test_a_message_in_pieces_waits_for_its_end(pair):
    left, right = pair
    left.socket.send(b'{"a": ')
    assert right.receive() == []
    left.socket.send(b"1}\n")
    assert right.receive() == [{"a": 1}]


def test_what_was_sent_before_the_end_is_still_read(pair):
    left, right = pair
    left.send({"exit_code": 0})
    left.close()
    assert right.receive() == [{"exit_code": 0}]
    with pytest.raises(Closed):
        right.receive()


@pytest.mark.parametrize("bad", [b"hello\n", b"[1]\n", b"\xff\xfe\n", b"x" * (MAX_LINE + 1)])
def test_what_is_no_message_ends_the_connection(pair, bad):
    left, right = pair
    left.socket.setblocking(True)
    left.socket.settimeout(5)
    with pytest.raises(Closed):
        sent = 0
        while sent < len(bad):
            sent += left.socket.send(bad[sent : sent + 60000])
            right.receive()
        raise AssertionError("accepted")


def test_a_reader_that_never_reads_is_given_up(pair):
    left, _ = pair
    with pytest.raises(Closed):
        while True:
            left.send({"text": "x" * 10000})


def test_what_starts_the_ranks_is_for_its_owner_alone(tmp_path):
    job = JobFile("127.0.0.1", 1234, new_token(), ("a=1",), {"X": "1"}, "secrets", "folder")
    path = tmp_path / "supervisor.json"
    path.write_text("old")
    path.chmod(0o644)
    job.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert JobFile.load(path) == job
    for mode in (0o640, 0o604, 0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(PermissionError, match="mode 600"):
            JobFile.load(path)
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError):
        JobFile.load(tmp_path / "link")
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
        with pytest.raises(PermissionError, match="65534"):
            JobFile.load(path)


# --- sealed lines ---------------------------------------------------------------------------------


def test_sealed_messages_arrive_whole_and_in_order(sealed):
    supervisor, agent = sealed
    for i in range(3):
        supervisor.send({"i": i, "text": "ü\n"})
        agent.send({"back": i})
    assert agent.receive() == [{"i": i, "text": "ü\n"} for i in range(3)]
    assert supervisor.receive(at_most=1) == [{"back": 0}]
    assert supervisor.receive() == [{"back": 1}, {"back": 2}]
    assert supervisor.proved and agent.proved


@pytest.mark.parametrize("token, nonces", [("another", "right"), ("right", "another")])
def test_a_seal_belongs_to_its_token_and_nonces(pair, token, nonces):
    right, ours, theirs = new_token(), new_nonce(), new_nonce()
    pair[0].seal(right, ours, theirs, is_supervisor=True)
    pair[1].seal(
        right if token == "right" else new_token(),
        ours,
        theirs if nonces == "right" else new_nonce(),
        is_supervisor=False,
    )
    pair[1].send({"rank": 0})
    with pytest.raises(Stranger):
        pair[0].receive()
    assert not pair[0].proved


def lines_of(line: Line, *messages: dict) -> list[bytes]:
    """Each message as it goes over the wire."""
    captured = []
    for message in messages:
        line._unsent = b""
        line.flush = lambda: None
        line.send(message)
        captured.append(line._unsent)
    line._unsent = b""
    return captured


@pytest.mark.parametrize(
    "attack", ["sent twice", "left out", "swapped", "changed", "sent back", "without a seal"]
)
def test_a_line_out_of_its_place_ends_the_connection(sealed, attack):
    supervisor, agent = sealed
    first, second = lines_of(agent, {"order": "ping"}, {"order": "abort"})
    sent = {
        "sent twice": first + first,
        "left out": second,
        "swapped": second + first,
        "changed": first.replace(b"ping", b"stop"),
        "without a seal": b'{"order": "abort"}\n',
        "sent back": lines_of(supervisor, {"order": "ping"})[0],
    }[attack]
    agent.socket.send(sent)
    with pytest.raises(Stranger):
        supervisor.receive()


# --- attacks on the supervisor --------------------------------------------------------------------

GREETING = json.dumps({"nonce": new_nonce()}).encode() + b"\n"
SEALED_BY_NOBODY = b"0" * 64 + b" "
ATTACKS = {
    "not ascii": '{"proof": "é"}\n'.encode(),
    "nested": b"[" * 200000 + b"\n",
    "nested briefly": b"[" * 4000 + b"\n",
    "no nonce": b'{"rank": 0}\n',
    "nonce of another kind": b'{"nonce": ["x"]}\n',
    "endless": b"x" * 10 * MAX_GREETING,
    "binary": bytes(range(256)) * 8 + b"\n",
    "a number": b"1" * 5000 + b"\n",
    "not a number": b"NaN\n",
    "empty": b"\n" * 4000,
    "hello without a seal": GREETING + b'{"rank": 0, "attempt": 0, "host": "x"}\n',
    "a wrong seal": GREETING + SEALED_BY_NOBODY + b'{"rank": 0, "attempt": 0, "host": "x"}\n',
    "a seal that is not ascii": GREETING + b"\xc3\xa9" * 32 + b" {}\n",
    "half a seal": GREETING + b"00\n",
    "nested under a wrong seal": GREETING + SEALED_BY_NOBODY + b"[" * 3000 + b"\n",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_whatever_a_stranger_sends_costs_his_connection_alone(supervisor, attack):
    started(supervisor)
    with socket.create_connection(("127.0.0.1", supervisor.port)) as stranger:
        stranger.setblocking(False)
        listen(supervisor)
        left = ATTACKS[attack]
        for _ in range(40):
            try:
                left = left[stranger.send(left) :] if left else left
            except BlockingIOError:
                pass
            except OSError:
                break  # the supervisor has closed
            supervisor.listen(0.02)
        assert not any(peer.known or peer.line.proved for peer in supervisor.peers)
        # the job goes on
        line, welcome = joined(supervisor, rank=1, host="h", attempt=0)
        assert welcome["timeout"] == 5 and [p.rank for p in supervisor.peers if p.known] == [1]
        line.close()


def test_what_an_agent_is_told_starts_nothing(supervisor):
    started(supervisor)
    line, welcome = joined(supervisor, rank=0, host="h", attempt=0)
    assert set(welcome) == {"timeout", "grace", "rendezvous"}
    line.close()


def test_a_message_of_the_wrong_form_costs_its_sender_alone(supervisor, capsys):
    started(supervisor)
    first, _ = joined(supervisor, rank=0, host="h", attempt=0)
    second, _ = joined(supervisor, rank=1, host="h", attempt=0)
    first.send({"silent": "not a number", "idle": {}, "beats": [], "step": None, "phase": 3})
    second.send(
        {
            "step": 3,
            "phase": "forward",
            "beats": 1,
            "silent": 0.0,
            "idle": 0.0,
            "usual": None,
            "state": "R",
            "orphaned": False,
        }
    )
    listen(supervisor)
    assert {p.rank for p in supervisor.peers} == {1}
    assert (
        supervisor.judge.ranks[0].step == 0 and supervisor.judge.verdict(time.monotonic()) is None
    )
    assert supervisor.judge.ranks[1].step == 3
    for hello in ({"rank": "x", "host": "h", "attempt": 0}, {"host": "h"}, {"node": None}):
        with pytest.raises(OSError):
            joined(supervisor, **hello)
    assert "message cannot be read" in capsys.readouterr().err
    first.close()
    second.close()


def test_silent_connections_do_not_keep_a_rank_out(supervisor):
    """Four times as many as the supervisor keeps, all mute: the oldest make room, and those who
    stay too long go.
    """
    started(supervisor)
    mute = []
    for _ in range(4 * MAX_STRANGERS):
        mute.append(socket.create_connection(("127.0.0.1", supervisor.port)))
        supervisor.listen(0.0)
    assert len(supervisor.peers) <= supervisor.max_connections
    line, _ = joined(supervisor, rank=0, host="h", attempt=0)
    for peer in supervisor.peers:
        peer.since = time.monotonic() - HANDSHAKE_SECONDS - 1
    listen(supervisor, 1)
    assert [p.rank for p in supervisor.peers] == [0]
    for connection in (*mute, line):
        connection.close()


def test_connections_stay_below_the_limit_on_open_files(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    assert connection_limit(3) == 3 + MAX_STRANGERS
    assert connection_limit(170) == 256 - 64
    with pytest.raises(ValueError, match="ulimit -n"):
        connection_limit(2000)


# --- attacks on an agent --------------------------------------------------------------------------


def test_a_listener_that_says_nothing_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as server:
        begun = time.monotonic()
        with pytest.raises(Closed, match="no word"):
            join(JobFile(*server.getsockname(), new_token()), 1.0, rank=0)
        assert time.monotonic() - begun < 10
    with pytest.raises(ConnectionRefusedError):
        join(JobFile("127.0.0.1", 1, new_token()), 1.0, rank=0)


WELCOME = {
    "welcome": {
        "timeout": 20,
        "grace": 5,
        "rendezvous": {},
        "env": {"ANY": "thing"},
        "secrets_file": None,
        "failures": "none",
        "command": ["timeit", "-n1", "-r1", "open({mark!r}, 'w')"],
    }
}


@pytest.mark.parametrize("answer", ["plain", "sealed with another token", "reflected"])
def test_an_agent_does_not_obey_a_listener_without_the_token(tmp_path, answer):
    """Somebody else got the port of a supervisor that has ended, and says what to run."""
    mark = tmp_path / "executed"
    words = json.loads(json.dumps(WELCOME).replace("{mark!r}", repr(str(mark))))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def impostor() -> None:
            connection, _ = server.accept()
            line, nonce = Line(connection), new_nonce()
            line.send({"nonce": nonce})
            heard = b""
            connection.settimeout(5)
            while heard.count(b"\n") < 2:
                heard += connection.recv(4096)
            agent_nonce, hello = heard.split(b"\n")[:2]
            if answer == "sealed with another token":
                line.seal(new_token(), nonce, json.loads(agent_nonce)["nonce"], is_supervisor=True)
            if answer == "reflected":
                connection.sendall(hello + b"\n")
            else:
                line.send(words)
            time.sleep(0.5)
            connection.close()

        thread = threading.Thread(target=impostor)
        thread.start()
        with pytest.raises(Stranger):
            join(JobFile(*server.getsockname(), new_token()), 5.0, rank=0, host="h", attempt=0)
        thread.join()
    assert not mark.exists()


def test_an_agent_starts_nothing_of_a_file_that_others_could_write(tmp_path):
    path = tmp_path / "supervisor.json"
    JobFile("127.0.0.1", 1, new_token(), ("x",)).save(path)
    path.chmod(0o622)
    done = subprocess.run(
        [sys.executable, "-m", "launch.job.agent", str(path), "0"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        check=False,
        timeout=60,
    )
    assert done.returncode != 0 and "mode 600" in done.stderr


def test_what_watches_the_ranks_imports_none_of_their_libraries():
    code = (
        "import sys, launch.job.agent, train.rank.lock; print({'torch', 'deepspeed'} & "
        "set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], text=True, capture_output=True, check=True
        ).stdout
        == "set()\n"
    )
