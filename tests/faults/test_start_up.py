"""Killed while the ranks start: the verdict names who died, and nothing outlives a supervisor.

On this machine, with a launcher that does what DeepSpeed's does when an agent dies: end the trees
of all others, leaves first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.job import supervisor
from launch.job.supervisor import Supervisor
from launch.launchers import start as spawn
from train.config.launching import LaunchConfig, WatchdogConfig
from train.config.training import CheckpointConfig

pytestmark = [pytest.mark.faults]
ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = """
import os, subprocess, sys, time
import psutil
victim, moment, *arguments = sys.argv[1:]
line = [sys.executable, "-u", "-m", "launch.job.agent", *arguments]
ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"} for r in range(2)]
agents = [subprocess.Popen(line, env={**os.environ, **rank}) for rank in ranks]
if moment == "agent":
    agents[int(victim)].kill()
starting = agents if victim.isdigit() else []
if starting and moment != "rank":
    starting = [agent for agent in agents if agent is not agents[int(victim)]]
while not all(psutil.Process(agent.pid).children() for agent in starting):
    time.sleep(0.01)
if moment == "rank" and victim.isdigit():
    agents[int(victim)].kill()
while all(agent.poll() in (None, 0) for agent in agents):
    time.sleep(0.05)
for agent in [agent for agent in agents if agent.poll() is None]:
    tree = [*psutil.Process(agent.pid).children(recursive=True), psutil.Process(agent.pid)]
    for process in tree:
        process.terminate()
    for process in psutil.wait_procs(tree, timeout=20)[1]:
        process.kill()
sys.exit(1)
"""


class Config:
    launch, watchdog, checkpoint = (
        LaunchConfig("deepspeed", num_devices=2),
        WatchdogConfig(4, 60),
        CheckpointConfig(),
    )


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", ["agent", "rank"])
def test_the_agent_that_was_killed_is_named(tmp_path, monkeypatch, victim, moment):
    """moment: before the agent can report, or while its rank imports."""
    monkeypatch.setattr(
        supervisor.spawn,
        "command",
        lambda launch, num_nodes, rendezvous, agent, *more: [
            sys.executable,
            "-c",
            LAUNCHER,
            str(victim),
            moment,
            *agent,
        ],
    )
    job = Supervisor(
        Config(), tmp_path, ["+saved_config=none"], lambda size: [], spawn.environment()
    )
    assert job.run() == 70
    events = [json.loads(line) for line in (tmp_path / "supervisor.jsonl").read_text().splitlines()]
    (verdict,) = [event for event in events if event["event"] == "verdict"]
    if moment == "agent":
        assert (
            verdict["kind"] == "startup" and f"ranks {victim} did not report" in verdict["message"]
        ), verdict
    else:
        assert (verdict["kind"], verdict["ranks"]) == ("lost", [victim]), verdict


PARENT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_start_up import LAUNCHER, Config, Supervisor, spawn
line = [sys.executable, "-c", LAUNCHER, "none", sys.argv[2]]
spawn.command = lambda launch, num_nodes, rendezvous, agent, *more: [*line, *agent]
run_dir, overrides = Path(sys.argv[1]), ["+saved_config=none"]
Supervisor(Config(), run_dir, overrides, lambda size: [], spawn.environment()).run()
"""


@pytest.mark.parametrize("moment", ["launcher", "rank"])
def test_nothing_outlives_a_supervisor_that_is_killed_while_its_ranks_start(tmp_path, moment):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), moment], cwd=ROOT)
    us = psutil.Process(parent.pid)
    # the launcher; it, two agents, two ranks
    depth = {"launcher": 1, "rank": 5}[moment]
    while len(family := us.children(recursive=True)) < depth:
        assert parent.poll() is None
        time.sleep(0.02)
    us.kill()
    parent.wait()
    started = time.monotonic()
    # Those that the launcher still starts are its children as long as it lives.
    while living := [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() - started < 25, living
        for process in living:
            try:
                family += [
                    child for child in process.children(recursive=True) if child not in family
                ]
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.05)
    print(f"all gone {time.monotonic() - started:.1f} s after the supervisor")
