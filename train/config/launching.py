"""Settings of how ranks are started and watched over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class SlurmConfig:
    """What launch=slurm asks of sbatch."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """Wall-clock limit, as sbatch reads it: 2-00:00:00."""
    gpus_per_node: int | None = None
    """None: launch.num_devices; 0: none are asked for."""
    requeue: bool = True
    """Queue the job again when it was stopped by its time limit or preempted; it then resumes."""
    extra: tuple[str, ...] = ()
    """More sbatch options, such as --exclusive."""


@dataclass(frozen=True)
class LaunchConfig:
    kind: Literal["inline", "deepspeed", "torchrun", "slurm"]
    """How processes start: in this process, by DeepSpeed's or torch's launcher, or by srun in a
    Slurm allocation.
    """
    num_devices: int = 1
    """Ranks per node."""
    num_nodes: int = 1
    hostfile: str | None = None
    """DeepSpeed hostfile: one "[USER@]HOST slots=N" a line. Hosts beyond num_nodes are spares."""
    launcher: Literal["pdsh", "openmpi", "mpich", "impi", "mvapich"] = "pdsh"
    """How launch=deepspeed reaches the hosts of the hostfile."""
    ssh_port: int | None = None
    node_rank: int | None = None
    """Which node this is, when every node starts the same command itself (Kubernetes); None: one
    command starts all.
    """
    master_addr: str | None = None
    """Address of rank 0; None: of the first host."""
    master_port: int | None = None
    """None: a free port."""
    listen_addr: str | None = None
    """Address on which the supervisor hears its ranks; None: loopback on one node, else the one
    that faces the hosts.
    """
    env: dict[str, str] = field(default_factory=dict)
    """Variables set for every rank. Saved with the run, so no secrets."""
    forward_env: tuple[str, ...] = ()
    """More names or patterns (NCCL_*) of this process's variables to hand on to every rank."""
    secrets_file: str | None = None
    """File of NAME=VALUE lines, readable by you alone, that every node reads for its ranks; never
    copied or saved.
    """
    max_restarts: int = 0
    """How often a job that failed starts again from its last complete checkpoint."""
    restart_delay_seconds: float = 5.0
    """Wait before a restart; doubles while no step is gained."""
    elastic: bool = False
    """Restart on the hosts that are left when fewer than num_nodes can be reached."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    check_memory: bool = True
    """Refuse to start what does not fit the machine's memory by the plan (launch/job/memory.py)."""
    dry_run: bool = False
    """Print the command and the checks, start nothing."""

    def problems(self) -> list[str]:
        found = []
        if self.num_devices < 1 or self.num_nodes < 1:
            found.append(
                f"launch.num_devices {self.num_devices} and launch.num_nodes {self.num_nodes} must "
                "be at least 1"
            )
        for name in ("master_port", "ssh_port"):
            port = getattr(self, name)
            if port is not None and not 0 < port < 65536:
                found.append(f"launch.{name} is {port}; it must be between 1 and 65535")
        for name in ("max_restarts", "restart_delay_seconds"):
            if getattr(self, name) < 0:
                found.append(f"launch.{name} is {getattr(self, name)}; it must not be negative")
        if self.kind == "inline":
            if self.num_devices * self.num_nodes > 1:
                found.append(
                    f"launch=inline runs one process, but launch.num_devices is {self.num_devices} "
                    "and "
                    f"launch.num_nodes {self.num_nodes}; use launch=deepspeed or launch=torchrun"
                )
            if self.max_restarts:
                found.append(
                    f"launch.max_restarts is {self.max_restarts}, but launch=inline has no "
                    "supervisor to restart "
                    "it; use launch=deepspeed or launch=torchrun (one device is enough)"
                )
        return found + self._node_problems()

    @property
    def starts_here(self) -> bool:
        """Whether the ranks of this command run on this machine."""
        return self.kind != "slurm" and self.hostfile is None

    @property
    def by_node(self) -> bool:
        """Whether every node starts the same command itself."""
        return self.node_rank is not None and self.num_nodes > 1

    def _node_problems(self) -> list[str]:
        found = []
        several = self.num_nodes > 1
        if self.hostfile is not None and self.kind != "deepspeed":
            found.append(
                f"launch.hostfile={self.hostfile} is read by launch=deepspeed only; "
                f"launch={self.kind} has its own "
                "way to find nodes"
            )
        if self.node_rank is not None:
            if not 0 <= self.node_rank < self.num_nodes:
                found.append(
                    f"launch.node_rank is {self.node_rank}; with launch.num_nodes {self.num_nodes} "
                    "it must be "
                    f"between 0 and {self.num_nodes - 1}"
                )
            if self.kind not in ("deepspeed", "torchrun"):
                found.append(
                    "launch.node_rank is for launch=deepspeed and launch=torchrun, not "
                    f"launch={self.kind}"
                )
            if several and (self.master_addr is None or self.master_port is None):
                found.append(
                    "launch.node_rank needs launch.master_addr and launch.master_port, the same on "
                    "every node"
                )
            if self.hostfile is not None:
                found.append(
                    "launch.hostfile starts all nodes from one command, launch.node_rank one node: "
                    "drop one"
                )
        elif several and self.kind == "deepspeed" and self.hostfile is None:
            found.append(
                f"launch.num_nodes is {self.num_nodes}; give launch=deepspeed a "
                "launch.hostfile=FILE to find them, "
                "or start the command on every node with its launch.node_rank"
            )
        elif several and self.kind == "torchrun":
            found.append(
                f"launch.num_nodes is {self.num_nodes}; with launch=torchrun start the command on "
                "every node with "
                "its launch.node_rank, or use launch=deepspeed with launch.hostfile"
            )
        if self.elastic and self.hostfile is None:
            found.append("launch.elastic chooses among the hosts of launch.hostfile; give one")
        if self.launcher != "pdsh" and self.hostfile is None:
            found.append(
                f"launch.launcher={self.launcher} reaches the hosts of launch.hostfile; give one"
            )
        return found


@dataclass(frozen=True)
class WatchdogConfig:
    """When a job is taken for dead (launch/job/judge.py)."""

    timeout_seconds: float = 60.0
    """A rank that is gone, stopped, or makes no progress for longer ends the job. Work that has
    taken longer before may take four times as long as it did.
    """
    startup_seconds: float = 1800.0
    """Limit for starting and for every kind of work a rank does for the first time (it may
    compile).
    """
    straggler_ratio: float = 1.5
    """A rank is reported as slow when its own work takes this many times the median; 0: not looked
    at.
    """

    def problems(self) -> list[str]:
        found = []
        if self.timeout_seconds < 2:
            found.append(
                f"watchdog.timeout_seconds is {self.timeout_seconds}; it must be at least 2"
            )
        if self.startup_seconds < self.timeout_seconds:
            found.append(
                f"watchdog.startup_seconds {self.startup_seconds} must not be below "
                "watchdog.timeout_seconds "
                f"{self.timeout_seconds}"
            )
        if self.straggler_ratio != 0 and self.straggler_ratio <= 1:
            found.append(
                f"watchdog.straggler_ratio is {self.straggler_ratio}; it must be above 1, or 0 to "
                "switch it off"
            )
        return found
