"""The hosts of a job: DeepSpeed's hostfile, whether each can be reached, and which address faces them."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from train.config import LaunchConfig

LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)$")
PROBE_SECONDS = 8.0


@dataclass(frozen=True)
class Host:
    name: str
    slots: int


def parse_hostfile(path: str | Path) -> tuple[Host, ...]:
    """Hosts of a hostfile, "NAME slots=N" a line, # begins a comment.

    Raises:
        ValueError: naming the file, the line and what is wrong with it.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"launch.hostfile={path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    hosts: dict[str, Host] = {}
    for number, text in enumerate(lines, 1):
        text = text.split("#")[0].strip()
        if not text:
            continue
        match = LINE.match(text)
        if match is None or int(match["slots"]) < 1:
            raise ValueError(f"launch.hostfile={path} line {number} is {text!r}; it must be like: worker-1 slots=8")
        if match["name"] in hosts:
            raise ValueError(f"launch.hostfile={path} line {number} names {match['name']} a second time")
        if match["name"].startswith("-"):
            raise ValueError(f"launch.hostfile={path} line {number}: {match['name']!r} is no host name")
        hosts[match["name"]] = Host(match["name"], int(match["slots"]))
    if not hosts:
        raise ValueError(f"launch.hostfile={path} names no host")
    return tuple(hosts.values())


def hosts_problems(hosts: Iterable[Host], num_nodes: int, num_devices: int) -> list[str]:
    """What keeps these hosts from running the job, before anyone is asked."""
    hosts = tuple(hosts)
    found = [f"host {h.name} has {h.slots} slots in launch.hostfile, launch.num_devices is {num_devices}"
             for h in hosts if h.slots < num_devices]
    if len(hosts) < num_nodes:
        found.append(f"launch.num_nodes is {num_nodes}, but launch.hostfile names {len(hosts)} hosts")
    return found


def check(launch: LaunchConfig) -> None:
    """The hostfile of a job names enough hosts with enough slots.

    Raises:
        ValueError: with everything that is wrong.
    """
    assert launch.hostfile is not None
    found = hosts_problems(parse_hostfile(launch.hostfile), launch.num_nodes, launch.num_devices)
    if found:
        raise ValueError("; ".join(found))


def ssh_command(host: str, port: int | None, *command: str) -> list[str]:
    return ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", *(["-p", str(port)] if port else []), host, *command]


def unreachable(hosts: Iterable[Host], ssh_port: int | None) -> dict[str, str]:
    """Host -> why ssh does not get there; all hosts are tried at once, for at most PROBE_SECONDS."""
    probes = {h.name: subprocess.Popen(ssh_command(h.name, ssh_port, "true"), stdin=subprocess.DEVNULL, text=True,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for h in hosts}
    until = time.monotonic() + PROBE_SECONDS
    found = {}
    for name, probe in probes.items():
        try:
            _, errors = probe.communicate(timeout=max(0.1, until - time.monotonic()))
            if probe.returncode:
                lines = errors.strip().splitlines()
                found[name] = lines[-1] if lines else f"ssh ended with code {probe.returncode}"
        except subprocess.TimeoutExpired:
            probe.kill()
            probe.communicate()
            found[name] = f"no answer within {PROBE_SECONDS:g} s"
    return found


def facing_address(host: str) -> str:
    """The address of this machine that a host sees when this machine talks to it.

    Raises:
        ValueError: the host's name has no address.
    """
    try:
        target = socket.gethostbyname(host)
    except OSError as error:
        raise ValueError(f"host {host} has no address ({error}); mend launch.hostfile or its DNS entry") from error
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((target, 9))  # sends nothing
        return str(probe.getsockname()[0])


def address_of(host: str) -> str | None:
    """Address of a host for all others; None when its name means loopback here."""
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return None
    return None if address.startswith("127.") else address
