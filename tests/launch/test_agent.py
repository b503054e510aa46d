"""An agent at both ends of its life: without a supervisor, and ended by a launcher because another
has died.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from launch.job import agent as module
from launch.job.agent import Agent
from launch.job.wire import JobFile, new_token
from launch.process.exits import NO_HOSTS


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """An agent whose supervisor is gone, and whose rank is a process of the test's choice."""
    monkeypatch.setenv("RANK", "0")
    JobFile("127.0.0.1", 1, new_token()).save(tmp_path / "supervisor.json")
    made = Agent(tmp_path / "supervisor.json", 0)
    made.sent = []
    monkeypatch.setattr(made, "send", lambda **message: made.sent.append(message))
    before = {number: signal.getsignal(number) for number in module.ASKING}
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)
    if made.child is not None:
        made.child.kill()
        made.child.wait()


def with_rank(agent: Agent, code: str) -> Agent:
    agent.child = subprocess.Popen([sys.executable, "-c", code], process_group=0)
    agent.pipe = os.open(os.devnull, os.O_RDONLY)
    agent.welcome = {"timeout": 20.0, "grace": 60.0}
    agent.memory_kills = 0
    return agent


def test_without_a_supervisor_it_starts_nothing_and_ends_at_once(agent):
    """A supervisor listens before it starts a launcher: nobody there means that it was killed."""
    started = time.monotonic()
    assert agent.run() == NO_HOSTS and agent.child is None
    assert time.monotonic() - started < module.CONNECT_SECONDS / 2


def test_a_rank_that_has_nothing_to_save_ends_with_its_supervisor(agent):
    with_rank(agent, "import time; time.sleep(600)")
    agent.refused = time.monotonic() - module.REFUSED_SECONDS - 1
    for phase in module.NOTHING_TO_SAVE:
        agent.facts["phase"] = phase
        assert agent._must_end(time.monotonic()) and agent.stopping is None
    agent.facts["phase"] = "forward"
    # it saves
    assert not agent._must_end(time.monotonic()) and agent.stopping is not None


@pytest.mark.parametrize(("asked", "told"), [(True, True), (False, False)])
def test_a_rank_ended_by_its_launcher_is_no_cause(agent, asked, told):
    """The launcher's signal reaches a rank that cannot save yet, and its agent; another's reaches
    the rank alone.
    """
    with_rank(agent, "import time; time.sleep(600)")
    if asked:
        agent._asked(signal.SIGTERM, None)
    agent.child.terminate()
    agent.child.wait()
    agent.heard = time.monotonic() - 100  # do not wait for the supervisor
    assert agent._after_exit() == 128 + signal.SIGTERM
    assert agent.sent[-1]["told"] is told and agent.sent[-1]["exit_code"] == -signal.SIGTERM


def test_the_end_of_a_rank_is_seen_at_once(agent, monkeypatch):
    with_rank(agent, "pass")
    agent.exited = os.pidfd_open(agent.child.pid)
    # it must not even wait for that
    monkeypatch.setattr(module, "BURST_SECONDS", 1000.0)
    started = time.monotonic()
    agent.pipe, _write = os.pipe()
    agent._wait(300)
    assert time.monotonic() - started < 120 and agent.child.wait() == 0


def test_a_signal_while_it_starts_is_no_death_of_its_own(agent, monkeypatch):
    """Dead by it, it would look like the cause of what its launcher ends it for."""

    def connect() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        agent.refused = time.monotonic() - 10

    monkeypatch.setattr(agent, "connect", connect)
    assert agent.run() == NO_HOSTS and agent.asked
