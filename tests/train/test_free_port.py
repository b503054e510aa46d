"""The port of a job's rendezvous: free for the seconds until its server starts."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from train.runtime import free_port


def test_it_is_none_that_the_kernel_hands_out():
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if low <= 11000:
        pytest.skip(f"this machine hands out ports from {low}: there are hardly any below")
    assert all(not low <= free_port() <= high for _ in range(100))


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
