"""The supervisor's connections: who does not know the token stays out, and what is no message ends the connection."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
import time

import pytest

from launch.wire import MAX_LINE, Address, Closed, Line, join, new_token, proof


@pytest.fixture
def pair():
    left, right = socket.socketpair(socket.AF_UNIX)
    lines = []
    for end in (left, right):
        line = Line.__new__(Line)  # a socket pair has no TCP options
        line.socket, line._received, line._unsent = end, b"", b""
        end.setblocking(False)
        lines.append(line)
    yield lines
    left.close()
    right.close()


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
            sent += left.socket.send(bad[sent:sent + 60000])
            right.receive()
        raise AssertionError("accepted")


def test_a_reader_that_never_reads_is_given_up(pair):
    left, _ = pair
    with pytest.raises(Closed):
        while True:
            left.send({"text": "x" * 10000})


def test_the_address_file_is_for_its_owner_alone(tmp_path):
    address = Address("127.0.0.1", 1234, new_token())
    path = tmp_path / "supervisor.json"
    path.write_text("old")
    path.chmod(0o644)
    address.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Address.load(path) == address


def test_a_proof_belongs_to_its_token_and_nonce():
    token = new_token()
    assert proof(token, "a") == proof(token, "a")
    assert len({proof(token, "a"), proof(token, "b"), proof(new_token(), "a")}) == 3
    assert token not in proof(token, "a")


def test_a_stranger_is_not_welcomed(tmp_path):
    """A connection without the proof is closed, one that says nothing as well; the supervisor goes on listening."""
    from launch.supervisor import HANDSHAKE_SECONDS, Supervisor
    from train.config import CheckpointConfig, LaunchConfig, WatchdogConfig

    class Config:
        launch, watchdog, checkpoint = LaunchConfig("deepspeed"), WatchdogConfig(5, 10), CheckpointConfig()

    supervisor = Supervisor(Config(), tmp_path, [], lambda size: [], {})
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    supervisor.selector.register(server, 1)
    with socket.create_connection(server.getsockname()) as stranger, socket.create_connection(server.getsockname()) as mute:
        stranger.settimeout(5)
        for _ in range(3):
            supervisor.listen(0.2)
        assert b"nonce" in stranger.recv(1000)
        stranger.send(b'{"proof": "guess", "rank": 0, "attempt": 0, "host": "x"}\n')
        for _ in range(3):
            supervisor.listen(0.2)
        assert stranger.recv(1000) == b"" and len(supervisor.peers) == 1
        supervisor.peers[0].since = time.monotonic() - HANDSHAKE_SECONDS - 1
        supervisor.listen(0.1)
        assert supervisor.peers == [] and mute.fileno() >= 0
    server.close()


def test_a_listener_that_says_nothing_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.monotonic()
        with pytest.raises(Closed, match="no nonce"):
            join(Address(*server.getsockname(), new_token()), 1.0, rank=0)
        assert time.monotonic() - started < 10
    with pytest.raises(ConnectionRefusedError):
        join(Address("127.0.0.1", 1, new_token()), 1.0, rank=0)


def test_what_watches_the_ranks_imports_none_of_their_libraries():
    code = "import sys, launch.agent, train.lock; print({'torch', 'deepspeed'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout == "set()\n"
