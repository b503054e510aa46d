"""The hosts of a job: DeepSpeed's hostfile, whether each can be reached, and which address faces
them.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from train.config.launching import LaunchConfig
from train.rank.ports import RendezvousError, listen

LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)$")
NAME = re.compile(r"\w[\w.-]*", re.ASCII)
REACH_SECONDS = 8.0


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    """What ssh gets, e.g. worker-1, ubuntu@worker-1, 10.0.0.2 or 2001:db8::2."""
    slots: int
    """How many devices it has."""

    @property
    def machine(self) -> str:
        """The name or address, without the user to log in as."""
        return machine_of(self.name)

    @property
    def is_ipv6(self) -> bool:
        """Given by such an address."""
        return _is_ipv6(self.machine)

    @property
    def pdsh_name(self) -> str:
        """As pdsh understands it: what stands before a colon it takes for the way to get there, and
        "::" it takes apart.
        """
        if not self.is_ipv6:
            return self.name
        user, address = self.name.removesuffix(self.machine), ipaddress.ip_address(self.machine)
        return f"ssh:{user}{address.exploded}"


def machine_of(name: str) -> str:
    return name.rpartition("@")[2]


def parse_hostfile(path: str | Path) -> tuple[Host, ...]:
    """Hosts of a hostfile, "NAME slots=N" or "USER@NAME slots=N" a line, # begins a comment. NAME
    may be an address.

    Raises:
        ValueError: naming the file, the line and what is wrong with it.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"launch.hostfile={path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error

    hosts: dict[str, Host] = {}
    for number, text in enumerate(lines, 1):
        text = text.split("#")[0].strip()
        if not text:
            continue

        match = LINE.match(text)
        if match is None or int(match["slots"]) < 1:
            raise ValueError(
                f"launch.hostfile={path} line {number} is "
                f"{text!r}; it must be like: worker-1 slots=8"
            )

        host = Host(match["name"], int(match["slots"]))
        if host.machine in hosts:
            raise ValueError(
                f"launch.hostfile={path} line {number} names {host.machine} a second time"
            )
        if (problem := _name_problem(host)) is not None:
            raise ValueError(f"launch.hostfile={path} line {number}: {problem}")
        hosts[host.machine] = host

    if not hosts:
        raise ValueError(f"launch.hostfile={path} names no host")
    return tuple(hosts.values())


def require_way(launch: LaunchConfig) -> None:
    """Look, before anything is written, whether the hosts can talk back to this machine, as the
    supervisor will need it.

    Raises:
        ValueError: the first host's name has no address, or no way leads there.
    """
    if launch.hostfile is not None and launch.listen_addr is None:
        facing_address(parse_hostfile(launch.hostfile)[0].name)


def refuse_taken_port(launch: LaunchConfig) -> None:
    """Look, before anything is started, whether rank 0 will be able to listen on
    launch.master_port, where it runs on this machine. Ranks of one machine meet without a port.

    Raises:
        RendezvousError: somebody else listens there, or the port is root's.
    """
    if launch.master_port is None or launch.num_nodes == 1 or (launch.node_rank or 0) > 0:
        return
    address = launch.master_addr
    if address is None and launch.hostfile is not None:
        address = address_of(parse_hostfile(launch.hostfile)[0].name)
    if address is None:
        return
    try:
        listen(address, launch.master_port).close()
    except RendezvousError as error:
        reason = error.__cause__
        if isinstance(reason, OSError) and reason.errno in (errno.EADDRINUSE, errno.EACCES):
            raise  # else the address is another machine's


def _name_problem(host: Host) -> str | None:
    """Why a name means no one machine to ssh and to pdsh, and what to write instead."""
    user, at, machine = host.name.rpartition("@")
    if (NAME.fullmatch(user) or not at) and (NAME.fullmatch(machine) or host.is_ipv6):
        return None
    if _is_ipv6(machine.strip("[]")):
        return f"{host.name!r} has brackets; write {machine.strip('[]')}"
    return (
        f"{host.name!r} is no host name (patterns are not "
        "expanded here: name each host on a line of its own)"
    )


def _is_ipv6(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).version == 6
    except ValueError:
        return False


def hosts_problems(
    hosts: Iterable[Host], num_nodes: int, num_devices: int, launcher: str = "pdsh"
) -> list[str]:
    """What keeps these hosts from running the job, before anyone is asked."""
    hosts = tuple(hosts)

    found = [
        f"host {h.name} has an address that means another machine elsewhere (link-local or "
        "loopback); write a name or another of its addresses"
        for h in hosts
        if h.is_ipv6
        and (
            ipaddress.ip_address(h.machine).is_link_local
            or ipaddress.ip_address(h.machine).is_loopback
        )
    ]

    if launcher != "pdsh":
        found += [
            f"host {h.name}: launch.launcher={launcher} takes plain host names; set User or "
            "HostName for one in ~/.ssh/config, or use launch.launcher=pdsh"
            for h in hosts
            if h.name != h.machine or h.is_ipv6
        ]
    found += [
        f"host {h.name} has {h.slots} slots in launch.hostfile, launch.num_devices is {num_devices}"
        for h in hosts
        if h.slots < num_devices
    ]

    if len(hosts) < num_nodes:
        found.append(
            f"launch.num_nodes is {num_nodes}, but launch.hostfile names {len(hosts)} hosts"
        )
    return found


def check(launch: LaunchConfig) -> None:
    """The hostfile of a job names enough hosts with enough slots.

    Raises:
        ValueError: with everything that is wrong.
    """
    assert launch.hostfile is not None
    found = hosts_problems(
        parse_hostfile(launch.hostfile), launch.num_nodes, launch.num_devices, launch.launcher
    )
    if found:
        raise ValueError("; ".join(found))


def ssh_command(host: str, port: int | None, *command: str) -> list[str]:
    return [
        "ssh",
        "-o",
        "BatchMode=yes",
        "-o",
        "ConnectTimeout=5",
        *(["-p", str(port)] if port else []),
        host,
        *command,
    ]


def unreachable(hosts: Iterable[Host], ssh_port: int | None) -> dict[str, str]:
    """Why ssh does not get to some hosts, by their name. All hosts are tried at once, for at most
    REACH_SECONDS.
    """
    attempts = {
        h.name: subprocess.Popen(
            ssh_command(h.name, ssh_port, "true"),
            stdin=subprocess.DEVNULL,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for h in hosts
    }

    # All of them run already, so that the time limit is one for all.
    until = time.monotonic() + REACH_SECONDS
    found = {}
    for name, attempt in attempts.items():
        try:
            _, errors = attempt.communicate(timeout=max(0.1, until - time.monotonic()))
            if attempt.returncode:
                lines = errors.strip().splitlines()
                found[name] = lines[-1] if lines else f"ssh ended with code {attempt.returncode}"
        except subprocess.TimeoutExpired:
            attempt.kill()
            attempt.communicate()
            found[name] = f"no answer within {REACH_SECONDS:g} s"
    return found


def facing_address(host: str) -> str:
    """The address of this machine that a host sees when this machine talks to it; host: as in a
    hostfile.

    Raises:
        ValueError: the host's name has no address, or no way leads there.
    """
    try:
        found = _addresses(host)
    except OSError as error:
        raise ValueError(
            f"host {host} has no address ({error.strerror}); mend launch.hostfile or its DNS entry"
        ) from error

    # To connect a datagram socket sends nothing, but makes the system choose the way and its
    # address.
    reason: OSError | None = None
    for family, address in found:
        with socket.socket(family, socket.SOCK_DGRAM) as trial:
            try:
                trial.connect((address, 9))  # sends nothing
            except OSError as error:
                reason = error
                continue
            return str(trial.getsockname()[0])
    raise ValueError(
        f"host {host} cannot be reached from here ({reason}); set launch.listen_addr to an address "
        "of this machine that the hosts reach"
    )


def address_of(host: str) -> str | None:
    """Address of a host for all others; None when its name means loopback here. host: as in a
    hostfile.
    """
    try:
        address = _addresses(host)[0][1]
    except OSError:
        return None
    return None if ipaddress.ip_address(address.partition("%")[0]).is_loopback else address


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """Families and addresses of a host, IPv4 first, each once.

    Raises:
        OSError: it has none.
    """
    infos = socket.getaddrinfo(machine_of(host), None, type=socket.SOCK_DGRAM)
    found = dict.fromkeys((family, str(where[0])) for family, _, _, _, where in infos)
    return sorted(found, key=lambda item: item[0] != socket.AF_INET)


def family_of(address: str) -> socket.AddressFamily:
    """Of sockets that listen on an address or a name of this machine."""
    try:
        return _addresses(address)[0][0]
    except OSError:  # whoever binds says so
        return socket.AF_INET
