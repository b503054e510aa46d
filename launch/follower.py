"""A further node of a job whose every node starts the same command (launch.node_rank): runs the launcher here when the
supervisor on node 0 says so."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

from launch import exits, spawn
from launch.agent import CONNECT_SECONDS
from launch.wire import Closed, JobFile, Line, join
from train.config import RunConfig


def follow(config: RunConfig, run_dir: Path) -> int:
    """Returns the exit code of the job, or 69 when node 0 is gone for longer than watchdog.startup_seconds."""
    path = run_dir.resolve() / "supervisor.json"
    launcher: subprocess.Popen[bytes] | None = None
    lost_since = time.monotonic()
    line: Line | None = None
    try:
        while True:
            if line is None:
                line = _join(path, config.launch.node_rank or 0)
                if line is None and time.monotonic() - lost_since > config.watchdog.startup_seconds:
                    print(f"node {config.launch.node_rank}: no supervisor in {run_dir}; is the command with "
                          "launch.node_rank=0 running, with the same run_dir?", file=sys.stderr)
                    return exits.NO_HOSTS
                if line is None:
                    time.sleep(0.5)
                    continue
            try:
                orders = line.receive()
            except Closed:
                line.close()
                line, lost_since = None, time.monotonic()
                continue
            for order in orders:
                if order.get("order") == "end":
                    return int(order["code"])
                if order.get("order") in ("start", "abort") and launcher is not None:
                    _let_end(launcher)
                    launcher = None
                if order.get("order") == "start":
                    launcher = _start(config, run_dir, int(order["port"]), [str(path), str(order["attempt"])])
            time.sleep(0.2)
    finally:
        if launcher is not None:
            _let_end(launcher)


def _join(path: Path, node: int) -> Line | None:
    try:
        return join(JobFile.load(path), CONNECT_SECONDS, node=node)[0]
    except (OSError, ValueError, TypeError):
        return None


def _start(config: RunConfig, run_dir: Path, port: int, agent: list[str]) -> subprocess.Popen[bytes]:
    launch = config.launch
    hostfile = str(run_dir / "hostfile") if launch.kind == "deepspeed" else None
    return spawn.start(spawn.command(launch, launch.num_nodes, spawn.Rendezvous(launch.master_addr, port), agent,
                                     hostfile))


def _let_end(launcher: subprocess.Popen[bytes]) -> None:
    """Its agents have been told to leave; what is still there after a while is killed."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(10)
    spawn.kill_tree(launcher)
