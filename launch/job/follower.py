"""A further node of a job whose every node starts the same command (launch.node_rank): runs the
launcher here when the supervisor on node 0 says so.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

from launch.job.agent import CONNECT_SECONDS
from launch.job.wire import Closed, JobFile, Line, join
from launch.launchers import start as spawn
from launch.process import exits
from train.config.run import RunConfig
from train.rank.stop import StopSignal


def follow(config: RunConfig, run_dir: Path) -> int:
    """Returns the exit code of the job, or 69 when node 0 is gone for longer than
    watchdog.startup_seconds.

    Asked to stop (SIGTERM, SIGUSR1, SIGINT), it has the supervisor stop the job on all nodes, and
    waits for its end.
    """
    with StopSignal(second_interrupt_ends=True) as stop:
        return _follow(config, run_dir, stop)


def _follow(config: RunConfig, run_dir: Path, stop: StopSignal) -> int:
    path = run_dir.resolve() / "supervisor.json"
    launcher: subprocess.Popen[bytes] | None = None
    lost_since = time.monotonic()
    line: Line | None = None
    told = False

    try:
        while True:
            if line is None and stop.received and (launcher is None or launcher.poll() is not None):
                return exits.DONE  # nothing runs here

            # The supervisor may start after this node, or be replaced: this one keeps looking.
            if line is None:
                line = _join(path, config.launch.node_rank or 0)
                if line is None and time.monotonic() - lost_since > config.watchdog.startup_seconds:
                    print(
                        f"node {config.launch.node_rank}: no supervisor in {run_dir}; is the "
                        "command with launch.node_rank=0 running, with the same run_dir?",
                        file=sys.stderr,
                    )
                    return exits.NO_HOSTS
                if line is None:
                    time.sleep(0.5)
                    continue

            # A new supervisor has not been told: after a loss the request is made again.
            try:
                if stop.received and not told:
                    line.send({"asked_to_stop": True})
                    told = True
                orders = line.receive()
            except Closed:
                line.close()
                line = None
                lost_since = time.monotonic()
                told = False
                continue

            for order in orders:
                if order.get("order") == "end":
                    return int(order["code"])
                if order.get("order") in ("start", "abort") and launcher is not None:
                    _let_end(launcher)
                    launcher = None
                if order.get("order") == "start":
                    launcher = _start(
                        config, run_dir, int(order["port"]), [str(path), str(order["attempt"])]
                    )

            time.sleep(0.2)
    finally:
        if launcher is not None:
            _let_end(launcher)


def _join(path: Path, node: int) -> Line | None:
    try:
        return join(JobFile.load(path), CONNECT_SECONDS, node=node)[0]
    except (OSError, ValueError, TypeError):
        return None


def _start(
    config: RunConfig, run_dir: Path, port: int, agent: list[str]
) -> subprocess.Popen[bytes]:
    launch = config.launch
    hostfile = str(run_dir / "hostfile") if launch.kind == "deepspeed" else None
    return spawn.start(
        spawn.command(
            launch, launch.num_nodes, spawn.Rendezvous(launch.master_addr, port), agent, hostfile
        )
    )


def _let_end(launcher: subprocess.Popen[bytes]) -> None:
    """Wait for a launcher whose agents have been told to leave, and kill what is still there after
    a while.
    """
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(10)
    spawn.kill_tree(launcher)
