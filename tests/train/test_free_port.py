"""The port of a job's rendezvous: free for the seconds until its server starts."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from train.rank.ports import free_port


@pytest.mark.parametrize(
    ("handed_out", "allowed"),
    [("32768\t60999\n", range(10000, 32768)), ("1024\t65535\n", range(10000, 65536))],
)
def test_it_is_none_that_the_kernel_hands_out_if_there_are_others(monkeypatch, handed_out, allowed):
    monkeypatch.setattr(Path, "read_text", lambda self: handed_out)
    assert all(free_port() in allowed for _ in range(100))


def test_one_that_is_taken_is_not_chosen(monkeypatch):
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        taken.listen()
        answers = iter([port, port + 1])
        monkeypatch.setattr(random.SystemRandom, "choice", lambda self, ports: next(answers))
        assert free_port() == port + 1


def test_jobs_with_the_same_seed_do_not_share_it():
    found = []
    for _ in range(8):
        random.seed(0)
        found.append(free_port())
    assert len(set(found)) > 1
