"""Checks of launch.doctor that look at this machine: packages, devices, compilers, disks, limits,
services.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import psutil
from packaging.requirements import Requirement

from launch.doctor.finding import Finding, failed, ok, warn
from launch.process.ask import ask
from train.config.launching import LaunchConfig
from train.config.watching import TrackerConfig
from train.files.sizes import GIB, MIB

PROGRAM_SECONDS = 5.0
WRITE_BYTES = 64 * MIB
WRITE_SECONDS = 8.0
MIN_PYTHON = (3, 11)
NAMED = ("torch", "deepspeed", "megatron-core", "transformers", "hydra-core", "wandb")
"""Packages whose versions are shown even when all is well."""


# --- packages -------------------------------------------------------------------------------------


def python_and_packages(requirements: str) -> list[Finding]:
    """This Python, and every package of requirements.txt. Those below its line "# Tests..." only
    warn.
    """
    runtime, _, tests = requirements.partition("# Tests")
    findings = [_python()]
    for level, text in ((failed, runtime), (warn, f"#{tests}")):
        for requirement in _requirements(text):
            installed = _installed(requirement.name)
            wanted = f"{requirement.name}{requirement.specifier}"
            if installed is None:
                findings.append(
                    level(
                        "packages",
                        f"{requirement.name} is not installed",
                        f"pip install '{wanted}'",
                    )
                )
            elif not requirement.specifier.contains(installed, prereleases=True):
                findings.append(
                    level(
                        "packages", f"{requirement.name} is {installed}", f"pip install '{wanted}'"
                    )
                )

    if len(findings) == 1:
        findings.append(
            ok(
                "packages",
                ", ".join(f"{name} {_installed(name)}" for name in NAMED if _installed(name)),
            )
        )
    return findings


def _python() -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < MIN_PYTHON:
        return failed("python", found, f"use Python {'.'.join(map(str, MIN_PYTHON))} or newer")
    return ok("python", found)


def _requirements(text: str) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    found = [Requirement(line) for line in lines if line]
    return [r for r in found if r.marker is None or r.marker.evaluate()]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# --- devices and compilers ------------------------------------------------------------------------


def devices(facts: dict[str, Any], launch: LaunchConfig) -> list[Finding]:
    """GPUs and their memory, or the cores where there is none.

    Args:
        facts: what launch.doctor.probe has printed.
    """
    found: list[dict[str, Any]] = facts["devices"]
    answer = ask(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], PROGRAM_SECONDS
    )
    seen = [line.split(", ") for line in answer.output.splitlines()] if answer.code == 0 else []

    # The driver works and torch is blind to it: the commonest cause of a run on CPUs by mistake.
    if not found and seen:
        fix = "install the CUDA build of torch"
        if facts["cuda"] is not None:
            fix = (
                f"use a driver for CUDA {facts['cuda']}, and see that CUDA_VISIBLE_DEVICES is not "
                "empty"
            )
        return [
            failed(
                "device",
                f"nvidia-smi sees {len(seen)} x {seen[0][0]}, torch {facts['torch']} none",
                fix,
            )
        ]

    if not found:
        return [_cores(launch)]

    broken = [
        f"device {i} ({device['name']}): {device['error']}"
        for i, device in enumerate(found)
        if device["error"]
    ]
    if broken:
        return [
            failed("device", "; ".join(broken), "reset or drain it, or use a torch built for it")
        ]

    first = found[0]
    driver = f", driver {seen[0][-1]}" if seen else ""
    text = (
        f"{len(found)} x {first['name']}{driver}, {first['memory'] / GIB:.0f} GiB each, "
        f"{min(d['free'] for d in found) / GIB:.0f} GiB free on the fullest"
    )

    if launch.num_devices > len(found) and launch.kind != "slurm" and launch.hostfile is None:
        return [
            failed(
                "device",
                text,
                f"launch.num_devices is {launch.num_devices}; set it to {len(found)} or less",
            )
        ]

    # Whoever holds the memory will make the run fail at its first large step, not at the start.
    if min(d["free"] / d["memory"] for d in found) < 0.8:
        return [warn("device", text, "another process holds memory there: nvidia-smi")]
    return [ok("device", text)]


def _cores(launch: LaunchConfig) -> Finding:
    cores = len(os.sched_getaffinity(0))
    text = (
        f"no GPU; {cores} CPU cores, "
        f"{psutil.virtual_memory().available / GIB:.0f} GiB of memory free"
    )
    if launch.num_devices > cores and launch.hostfile is None:
        return warn(
            "device", text, f"launch.num_devices is {launch.num_devices}: ranks will share cores"
        )
    return ok("device", text)


def load() -> Finding:
    """Whether others want the cores, so that a check may have no answer in time for that alone."""
    # the load is that of the whole machine, whatever part of it is ours
    running, cores = os.getloadavg()[0], os.cpu_count() or 1
    text = f"{running:.1f} processes want {cores} cores (mean of the last minute)"
    if running <= 2 * cores:
        return ok("load", text)
    return warn(
        "load",
        text,
        "ask again when others are done: what has no answer in time may be slow and not broken",
    )


def compilers(facts: dict[str, Any]) -> list[Finding]:
    """g++ for the CPU ops of router and sparse attention (and Triton's launchers), nvcc for the
    router's CUDA kernels.
    """
    has_gpu = bool(facts["devices"])
    level = failed if has_gpu else warn
    findings = []

    cxx = os.environ.get("CXX", "g++")
    answer = ask([cxx, "--version"], PROGRAM_SECONDS)
    if answer.code == 0:
        findings.append(ok("compiler", answer.output.splitlines()[0]))
    else:
        findings.append(
            level(
                "compiler",
                answer.reason,
                "install g++, or name a C++ compiler in CXX; without one the "
                "router, and sparse attention on a CPU, run in plain torch, slowly"
                + (", and Triton not at all" if has_gpu else ""),
            )
        )

    # A toolkit of another major version builds kernels that torch cannot load.
    answer = ask(["nvcc", "--version"], PROGRAM_SECONDS)
    release = answer.output.partition("release ")[2].split(",")[0]
    if answer.code != 0:
        findings.append(
            level(
                "nvcc",
                answer.reason,
                "put the CUDA toolkit's bin folder on PATH; only GPUs need it",
            )
        )
    elif facts["cuda"] is not None and release.split(".")[0] != facts["cuda"].split(".")[0]:
        findings.append(
            level(
                "nvcc",
                f"release {release}, but torch is built for CUDA {facts['cuda']}",
                f"put a toolkit of CUDA {facts['cuda']} on PATH",
            )
        )
    else:
        findings.append(ok("nvcc", f"release {release}"))
    return findings


def kernels(facts: dict[str, Any]) -> list[Finding]:
    state = facts["kernels"]
    # Sparse attention has Triton kernels on GPUs, and C++ on a CPU.
    wanted = ["router", "router_cuda" if facts["devices"] else "attention"]
    missing = [name for name in wanted if not state["libraries"][name]]
    text = (
        f"{state['folder']}: "
        + (f"{', '.join(missing)} to be compiled at first use" if missing else "compiled")
        + f"; {state['triton']} Triton kernels compiled ahead of time"
    )
    return [ok("kernels", text)]


def deepspeed(facts: dict[str, Any]) -> list[Finding]:
    if facts["deepspeed"] is not None:
        return [
            failed(
                "deepspeed",
                f"cannot be imported: {facts['deepspeed']}",
                "pip install -r requirements.txt; with a GPU, CUDA_HOME must name the CUDA toolkit",
            )
        ]
    ops = ", ".join(facts["deepspeed_ops"]) or "none"
    return [
        ok("deepspeed", f"imports; Loadstone needs none of its ops (it could compile here: {ops})")
    ]


# --- disks and limits -----------------------------------------------------------------------------


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def disk_space(path: Path) -> Finding:
    stats = os.statvfs(existing(path))
    free = stats.f_bavail * stats.f_frsize
    text = f"{path}: {free / GIB:.1f} of {stats.f_blocks * stats.f_frsize / GIB:.0f} GiB free"
    fix = (
        "free some, or choose another run_dir; python -m launch.plan says how large a checkpoint is"
    )
    if free < GIB:
        return failed("disk", text, fix)
    if stats.f_files and not stats.f_favail:
        return failed("disk", f"{text}, but not one inode", fix)
    return warn("disk", text, fix) if free < 20 * GIB else ok("disk", text)


def write_speed(path: Path) -> Finding:
    """Write 64 MiB, each piece synced to the disk, and remove it again."""
    folder = existing(path)
    piece, written = os.urandom(8 * MIB), 0
    began = time.monotonic()
    try:
        # Without a name, so that it is gone whatever ends the process.
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            while written < WRITE_BYTES and time.monotonic() - began < WRITE_SECONDS:
                written += file.write(piece)
                os.fsync(file.fileno())
    except OSError as error:
        return failed(
            "write speed", f"{folder} cannot be written: {error.strerror}", "choose another run_dir"
        )
    rate = written / MIB / (time.monotonic() - began)
    text = f"{rate:.0f} MiB/s synced, in {folder}"
    if rate < 50:
        return warn(
            "write speed",
            text,
            "checkpoints will take long; choose a faster disk, or checkpoint.asynchronous=true",
        )
    return ok("write speed", text)


def shared_memory(path: str = "/dev/shm") -> Finding:
    try:
        stats = os.statvfs(path)
    except OSError as error:
        return warn(
            "shared memory",
            f"{path}: {error.strerror}",
            "mount a tmpfs there: NCCL and gloo need it",
        )
    size, free = stats.f_blocks * stats.f_frsize, stats.f_bavail * stats.f_frsize
    text = f"{path}: {free / GIB:.1f} of {size / GIB:.1f} GiB free"
    if free < GIB:
        return warn(
            "shared memory",
            text,
            "NCCL needs some per rank; in a container: --shm-size=8g or --ipc=host",
        )
    return ok("shared memory", text)


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < 4096:
        return warn(
            "open files",
            f"limit {soft}",
            f"ulimit -n {65536 if hard < 0 else min(hard, 65536)}: "
            "ranks, data and checkpoints need many",
        )
    return ok("open files", f"limit {'none' if soft < 0 else soft}")


def free_port(port: int | None) -> Finding:
    if port is None:
        return ok("port", "a free one is chosen (launch.master_port)")
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            return failed(
                "port",
                f"launch.master_port {port}: {error.strerror}",
                "choose another, or leave it out",
            )
    return ok("port", f"launch.master_port {port} is free here")


# --- services -------------------------------------------------------------------------------------


def wandb(tracker: TrackerConfig) -> Finding:
    """How W&B would run, and whether there is a key. It is never said which."""
    from train.sinks.weights_and_biases import wandb_mode

    mode, reason = wandb_mode(tracker.wandb.mode)
    server = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = server.hostname or ""

    if mode != "online":
        if reason.endswith("cannot be reached"):
            return warn(
                "wandb",
                f"offline: {reason}",
                "mend the network or proxy, or sync later: wandb sync",
            )
        return ok("wandb", mode if mode == "disabled" else f"offline ({reason})")

    key = _key_source(host)
    if key is None:
        return warn(
            "wandb",
            f"online, but there is no key for {host}",
            "wandb login, or WANDB_API_KEY in launch.secrets_file",
        )

    # Where mode=online was set by name, nobody has looked yet whether the server answers.
    try:
        socket.create_connection(
            (host, server.port or (443 if server.scheme == "https" else 80)), timeout=3
        ).close()
    except OSError as error:
        return warn(
            "wandb",
            f"online, but {host} cannot be reached: {error}",
            "mend the network, or tracker.wandb.mode=offline",
        )
    return ok("wandb", f"online at {host}, key from {key}")


def _key_source(host: str) -> str | None:
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    import netrc

    path = os.environ.get("NETRC", str(Path.home() / ".netrc"))
    try:
        return path if netrc.netrc(path).authenticators(host) else None
    except (OSError, netrc.NetrcParseError):
        return None


def hugging_face() -> Finding:
    path = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    offline = (
        " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") else ""
    )
    if not os.access(existing(path), os.W_OK):
        return warn(
            "hugging face", f"{path} cannot be written{offline}", "set HF_HOME to a folder of yours"
        )
    return ok("hugging face", f"cache {path} can be written{offline}")


def slurm(launch: LaunchConfig) -> list[Finding]:
    if launch.kind != "slurm":
        return []
    missing = [tool for tool in ("sbatch", "srun", "scontrol") if shutil.which(tool) is None]
    if missing:
        return [
            failed(
                "slurm",
                f"{', '.join(missing)} not on PATH",
                "run this on a login node; module load slurm",
            )
        ]
    answer = ask(["srun", "--version"], PROGRAM_SECONDS)
    if answer.code == 0:
        return [ok("slurm", answer.output.strip())]
    return [
        failed(
            "slurm",
            f"srun --version: {answer.reason}",
            "see that Slurm's configuration is in place",
        )
    ]
