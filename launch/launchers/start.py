"""Command lines of the launchers that start one agent per rank, and the end of a process with all
its children.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.process.identity import ROOT
from launch.process.streams import Relay
from train.config.launching import LaunchConfig

AGENT = "launch.job.agent"


@dataclass(frozen=True)
class Rendezvous:
    """Where rank 0 of one attempt listens for the others."""

    address: str | None
    """Of rank 0's machine; None: the launcher finds it."""
    port: int
    """Port on that machine."""


def command(
    launch: LaunchConfig,
    num_nodes: int,
    rendezvous: Rendezvous,
    agent: list[str],
    hostfile: str | None = None,
    store_folder: str | None = None,
) -> list[str]:
    """The command that starts `launch.num_devices` agents on each of `num_nodes` nodes.

    Args:
        agent: arguments of every agent, RUN/supervisor.json and the number of the attempt.
        hostfile: the hosts of this attempt, for launch=deepspeed over ssh or with launch.node_rank.
        store_folder: a private folder, where all ranks are on this machine: torchrun keeps its
            rendezvous in a file there.
    """
    if launch.kind == "slurm":
        # --ntasks, since srun would else take the allocation's SLURM_NTASKS for it.
        return [
            "srun",
            f"--nodes={num_nodes}",
            f"--ntasks-per-node={launch.num_devices}",
            f"--ntasks={num_nodes * launch.num_devices}",
            "--kill-on-bad-exit=0",
            sys.executable,
            "-m",
            AGENT,
            *agent,
        ]

    if launch.kind == "torchrun":
        line = [
            sys.executable,
            "-m",
            "launch.launchers.torch_run",
            f"--nproc-per-node={launch.num_devices}",
        ]
        address = rendezvous.address or "127.0.0.1"

        # Ranks of one machine meet in a private file; over the network rank 0 listens on one
        # address alone.
        if store_folder is not None:
            line += [
                "--rdzv-backend=c10d",
                "--rdzv-conf=store_type=file",
                "--local-addr=127.0.0.1",
                f"--rdzv-endpoint={Path(store_folder) / f'torchrun-{agent[-1]}'}",
            ]
        else:
            node = launch.node_rank or 0
            line += [
                "--rdzv-backend=one_address",
                f"--rdzv-endpoint={address}:{rendezvous.port}",
                f"--rdzv-conf=rank={node}",
                f"--nnodes={num_nodes}",
            ]
        return [*line, "-m", AGENT, *agent]

    # The launcher appends --local_rank unless told not to; LOCAL_RANK is set either way.
    line = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--no_local_rank",
        "--quiet",
        f"--num_gpus={launch.num_devices}",
        f"--master_port={rendezvous.port}",
    ]

    if rendezvous.address:
        line.append(f"--master_addr={rendezvous.address}")
    if hostfile is not None:
        line += [f"--hostfile={hostfile}", f"--num_nodes={num_nodes}"]
    else:
        # never the machine-wide one that DeepSpeed looks for
        line.append("--hostfile=/dev/null")

    if launch.node_rank is not None:
        line += ["--no_ssh", f"--node_rank={launch.node_rank}"]
    elif hostfile is not None:
        line += ["--force_multi", "--no_ssh_check", f"--launcher={launch.launcher}"]
        line += [f"--ssh_port={launch.ssh_port}"] if launch.ssh_port else []
    return [*line, "--module", AGENT, *agent]


def environment() -> dict[str, str]:
    """Of the launcher on this node; agents and ranks inherit it here, and get it from the
    supervisor elsewhere.
    """
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", "1")
    env.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("PDSH_RCMD_TYPE", "ssh")
    if not any(os.path.exists(p) for p in ("/dev/nvidiactl", "/dev/nvidia0")):
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


class Launcher(subprocess.Popen[bytes]):
    """A started launcher; what it prints to a pipe of ours is relayed."""

    def __init__(self, line: list[str]):
        self.relay = Relay()
        super().__init__(
            line,
            env=environment(),
            cwd=ROOT,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=self.relay.streams.get("stdout"),
            stderr=self.relay.streams.get("stderr"),
        )
        self.relay.started()


def start(line: list[str]) -> Launcher:
    """Start a launcher, out of reach of the terminal's signals: the supervisor alone ends it."""
    return Launcher(line)


def write_hostfile(path: Path, hosts: list[tuple[str, int]]) -> str:
    path.write_text("".join(f"{name} slots={slots}\n" for name, slots in hosts))
    return str(path)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all its descendants on this machine; returns when it is gone."""
    try:
        root = psutil.Process(process.pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
    if isinstance(process, Launcher):
        process.relay.finish()
