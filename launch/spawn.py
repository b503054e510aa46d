"""Start the ranks of a job with DeepSpeed's or torch's launcher, pass signals on, return the exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil

from launch.common import ROOT
from train.config import LaunchConfig
from train.runtime import free_port


def command(launch: LaunchConfig, module: str, overrides: list[str]) -> list[str]:
    """The command line that starts `launch.num_devices` ranks per node of `python -m <module> <overrides>`."""
    port = launch.master_port or free_port()
    if launch.kind == "deepspeed":
        # The launcher appends --local_rank unless told not to; LOCAL_RANK is set either way.
        line = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--quiet",
                f"--num_gpus={launch.num_devices}", f"--master_port={port}"]
        if launch.hostfile:
            line += [f"--hostfile={launch.hostfile}", f"--num_nodes={launch.num_nodes}"]
        if launch.master_addr:
            line.append(f"--master_addr={launch.master_addr}")
        return [*line, "--module", module, *overrides]
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={launch.num_devices}",
            "--master-addr=127.0.0.1", f"--master-port={port}", "-m", module, *overrides]


def environment() -> dict[str, str]:
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", "1")
    env.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env["LOADSTONE_PARENT"] = str(os.getpid())  # ranks save and end when this process is gone
    if not any(os.path.exists(p) for p in ("/dev/nvidiactl", "/dev/nvidia0")):
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def run(line: list[str], grace_seconds: int) -> int:
    """Run the launcher and return its exit code. SIGTERM and SIGINT go to the ranks, which save and end with 0.

    DeepSpeed's launcher would kill its ranks on SIGTERM, so the signal is sent past it. Ranks that outlive
    `grace_seconds` are killed with everything else.
    """
    process = subprocess.Popen(line, env=environment(), cwd=ROOT, start_new_session=True)
    deadline: list[float] = []
    told: set[int] = set()

    def forward(number: int, frame: Any) -> None:
        deadline.append(time.monotonic() + grace_seconds)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                for worker in _workers(process.pid) if deadline else []:
                    if worker.pid not in told and _handles_sigterm(worker.pid):
                        told.add(worker.pid)
                        worker.send_signal(signal.SIGTERM)
                if deadline and time.monotonic() > deadline[0]:
                    _kill_tree(process.pid)
                    return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if process.poll() is None:
            _kill_tree(process.pid)


def _workers(pid: int) -> list[psutil.Process]:
    """Descendants that are ranks of ours: they carry LOCAL_RANK and run one of our modules."""
    ranks = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "LOCAL_RANK" in child.environ() and "launch." in " ".join(child.cmdline()):
                ranks.append(child)
        except psutil.Error:
            continue
    return ranks


def _handles_sigterm(pid: int) -> bool:
    """A rank that is still starting would die of the signal; it is told once its handler is installed."""
    try:
        with open(f"/proc/{pid}/status") as status:
            caught = next(line for line in status if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return True
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def _kill_tree(pid: int) -> None:
    try:
        processes = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
