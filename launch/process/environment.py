"""What a rank finds in its environment: its place in the job under every launcher, and its network
interface.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

import psutil

# Who says which rank a process is: (rank, local rank, world size). The launcher nearest to the
# process comes first: mpirun starts its servants through srun, and Slurm speaks PMI to its tasks.
_SOURCES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    # Not SLURM_NTASKS, which a shell in an allocation has from the allocation.
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
)
_TORCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_SPECIAL_STEPS = 0xFFFFFFF0
"""Slurm's ids of steps that are no srun of a program begin here: interactive, batch, extern."""


def adopt_rank() -> None:
    """Give a process of mpirun or srun the names torch looks for: RANK, LOCAL_RANK, WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT.

    A process that is alone is no rank, nor is a shell in an allocation, whatever the scheduler has
    left in its variables.

    Raises:
        ValueError: a launcher has set a variable to what is no number, or Slurm's list of hosts
            cannot be read.
    """
    env = os.environ
    if is_rank():
        return
    for rank, local_rank, size in _SOURCES:
        if rank not in env or _number(size, 1) < 2:
            continue
        if rank == "PMI_RANK" and local_rank not in env and _is_task_of_a_step():
            # Slurm's own PMI, which does not say which device of the node is the task's
            continue
        if rank == "SLURM_PROCID":
            if not _is_task_of_a_step():
                continue
            # One port per step: several may run side by side in a job.
            port = 20000 + (_number("SLURM_JOB_ID", 0) + 7919 * _number("SLURM_STEP_ID")) % 20000
            env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")))
            env.setdefault("MASTER_PORT", str(port))
        env.update(RANK=env[rank], LOCAL_RANK=env.get(local_rank, "0"), WORLD_SIZE=env[size])
        return


def is_rank() -> bool:
    """Started by a launcher as one rank of a job. Some schedulers set RANK and WORLD_SIZE per
    machine, for a program that is to start the ranks: without LOCAL_RANK they are no rank's."""
    return all(name in os.environ for name in _TORCH)


def _is_task_of_a_step() -> bool:
    """Whether srun has started this process to be a rank. A batch script and the shell of salloc
    have a rank's variables, too, and the task of `srun --pty` that has the terminal is a shell."""
    if "SLURM_STEP_ID" not in os.environ or _number("SLURM_STEP_ID") >= _SPECIAL_STEPS:
        return False
    # A step that is started from such a shell inherits its variables, but not its terminal.
    return not ("SLURM_PTY_PORT" in os.environ and os.isatty(0))


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} is {text!r} in the environment where a launcher sets a number; unset it"
        ) from None


def first_host(node_list: str) -> str:
    """First host of a Slurm list: "gpu[003-007,9],other" -> "gpu003"."""
    return next(hosts_of(node_list))


def hosts_of(node_list: str) -> Iterator[str]:
    """Hosts of a Slurm list, in its order: "r[1-2]n[08-10],login" -> r1n08, r1n09, r1n10, r2n08...

    A range keeps the width of its first number; brackets may hold names, ranges and more brackets.

    Raises:
        ValueError: brackets do not match, or a range runs backwards.
    """
    for entry in _split(node_list):
        yield from _expanded(entry, node_list)


def _expanded(text: str, node_list: str) -> Iterator[str]:
    """Names of one entry: of every choice of its first brackets, with those of the rest."""
    before, opening, rest = text.partition("[")
    if not opening:
        if "]" in text or not text:
            raise ValueError(
                f"{node_list!r} is no list of hosts: brackets do not match, or a name is empty"
            )
        yield text
        return
    end = _closing(rest, node_list)
    after = rest[end + 1 :]
    for choice in _split(rest[:end]):
        match = re.fullmatch(r"(\d+)-(\d+)", choice)
        if match:
            first, last = int(match[1]), int(match[2])
            if last < first:
                raise ValueError(
                    f"{node_list!r} is no list of hosts: the range {choice} runs backwards"
                )
            found: Iterable[str] = (str(n).zfill(len(match[1])) for n in range(first, last + 1))
        else:
            found = _expanded(choice, node_list)
        for part in found:
            # What stands before the brackets is done; the rest may have brackets of its own.
            tails = _expanded(after, node_list) if after else ("",)
            yield from (before + part + tail for tail in tails)


def _closing(text: str, node_list: str) -> int:
    """Index of the bracket that closes the one before the text."""
    depth = 1
    for i, character in enumerate(text):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth == 0:
            return i
    raise ValueError(f"{node_list!r} is no list of hosts: a bracket is not closed")


def _split(text: str) -> Iterator[str]:
    """Parts between the commas that stand outside of brackets."""
    depth = start = 0
    for i, character in enumerate(text):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    yield text[start:].strip()


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this address."""
    name: str
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.split("%")[0] == address for a in addresses):
            return name
    return None
