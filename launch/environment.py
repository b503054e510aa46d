"""What a rank finds in its environment: its place in the job under every launcher, and its network interface."""

from __future__ import annotations

import os
import re

import psutil

# Who says which rank a process is: (rank, local rank, world size).
_SOURCES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
)


def adopt_rank() -> None:
    """Give a process of mpirun or srun the names torch looks for: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT."""
    env = os.environ
    for rank, local_rank, size in _SOURCES:
        if "RANK" in env or rank not in env:
            continue
        if rank == "SLURM_PROCID":
            if "SLURM_STEP_ID" not in env or int(env.get("SLURM_NTASKS", "1")) < 2:
                continue  # the batch script itself also has SLURM_PROCID
            env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")))
            env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
        env.update(RANK=env[rank], LOCAL_RANK=env.get(local_rank, "0"), WORLD_SIZE=env[size])


def first_host(node_list: str) -> str:
    """First host of a Slurm list: "gpu[003-007,9],other" -> "gpu003"."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", node_list)
    return match[1] + (match[2] or "") if match else node_list


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.split("%")[0] == address for a in addresses):
            return name
    return None
