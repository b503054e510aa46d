"""Checks of launch.doctor that look at other machines and the way to them: hostfile, names, ssh,
rendezvous, variables.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from launch.doctor.finding import Finding, failed, ok, warn
from launch.doctor.machine import existing
from launch.launchers.hosts import (
    Host,
    facing_address,
    family_of,
    hosts_problems,
    machine_of,
    parse_hostfile,
    ssh_command,
)
from launch.process.ask import Answer, ask, in_parallel
from launch.process.environment import interface_of
from launch.process.identity import ROOT
from launch.process.secrets import (
    forwarded_environment,
    is_secret_name,
    looks_secret,
    problems_of_env,
    read_secrets_file,
)
from train.config.launching import LaunchConfig
from train.rank.ports import free_port

NAME_SECONDS = 6.0
SSH_SECONDS = 10.0
RANKS_SECONDS = 18.0
MAX_CLOCK_SECONDS = 2.0
UNKNOWN_HOST = "Could not resolve hostname"
"""What ssh says of a name without an address."""
MARK = "loadstone-doctor:"
"""Begins every line of a host's answer: login scripts print lines of their own."""


# --- the way to other ranks -----------------------------------------------------------------------


def meeting_place(launch: LaunchConfig, hosts: Sequence[Host]) -> tuple[str, str | None]:
    """Address and interface on which ranks of this machine meet others. The interface is None where
    gloo chooses it.

    Raises:
        ValueError: the interface or address that was asked for is not one of this machine's.
    """
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    if names:
        addresses = psutil.net_if_addrs()
        for name in names.split(","):
            if name not in addresses:
                raise ValueError(
                    f"GLOO_SOCKET_IFNAME names {name}; this machine has {', '.join(addresses)}"
                )
        name = names.split(",")[0]
        own = [
            a.address
            for family in (socket.AF_INET, socket.AF_INET6)
            for a in addresses[name]
            if a.family == family and "%" not in a.address
        ]
        if not own:
            raise ValueError(
                f"GLOO_SOCKET_IFNAME names {name}, which has no address but a link-local one"
            )
        return own[0], names
    if launch.listen_addr is not None:
        interface = interface_of(launch.listen_addr)
        if interface is None:
            raise ValueError(
                f"launch.listen_addr {launch.listen_addr} is no address of this machine"
            )
        return launch.listen_addr, interface
    here = {"localhost", socket.gethostname(), socket.gethostname().split(".")[0]}
    for host in [host for host in hosts if host.machine not in here][:3]:
        # a name without an address: another check says so
        with contextlib.suppress(ValueError):
            address = facing_address(host.name)
            return address, interface_of(address)
    return "127.0.0.1", interface_of("127.0.0.1")


def gloo(launch: LaunchConfig, hosts: Sequence[Host]) -> list[Finding]:
    """Two processes of this machine add up a number over the interface that ranks will use."""
    try:
        address, interface = meeting_place(launch, hosts)
    except ValueError as error:
        return [
            failed(
                "gloo", str(error), "name an interface of this machine that faces the other hosts"
            )
        ]

    # Two ranks would only say that they timed out; a trial says why nobody can listen there.
    with socket.socket(family_of(address)) as trial:
        try:
            trial.bind((address, 0))
        except OSError as error:
            return [
                failed(
                    "gloo",
                    f"cannot listen on {address}: {error.strerror}",
                    "set launch.listen_addr",
                )
            ]

    port = free_port()
    where = f"{address} ({interface or 'interface chosen by gloo'})"

    def rank(number: int) -> Answer:
        environ = {
            **os.environ,
            "RANK": str(number),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            **({"GLOO_SOCKET_IFNAME": interface} if interface else {}),
        }
        return ask(
            [sys.executable, "-W", "ignore", "-m", "launch.doctor.probe", "ranks"],
            RANKS_SECONDS,
            environ,
        )

    # Each rank waits for the other, so both have to run at once.
    answers = in_parallel(rank, (0, 1), RANKS_SECONDS + 1)
    wrong = [f"rank {n}: {a.reason}" for n, a in answers.items() if a.code != 0]
    if len(answers) < 2 or wrong:
        return [
            failed(
                "gloo",
                f"two ranks did not meet at {where}: {'; '.join(wrong) or 'no answer'}",
                "see firewall and /etc/hosts; GLOO_SOCKET_IFNAME=<interface> chooses another",
            )
        ]

    # That the bytes arrive is not enough: memory or network may have changed them.
    result = json.loads(answers[0].output.splitlines()[-1])
    if result["sum"] != 3.0:
        return [
            failed(
                "gloo",
                f"the sum over two ranks was {result['sum']} instead of 3",
                "the network or memory is bad",
            )
        ]
    return [
        ok(
            "gloo",
            f"two ranks met at {where} in {result['meet_ms']:.0f} ms and summed 1 MiB in "
            f"{result['reduce_ms']:.0f} ms",
        )
    ]


def nccl(facts: dict[str, Any]) -> list[Finding]:
    return [ok("nccl", facts["nccl"])] if facts["nccl"] else []


# --- hosts ----------------------------------------------------------------------------------------


def hostfile(launch: LaunchConfig) -> tuple[tuple[Host, ...], list[Finding]]:
    """Its hosts, and what is wrong with it."""
    if launch.hostfile is None:
        return (), []
    try:
        hosts = parse_hostfile(launch.hostfile)
    except ValueError as error:
        return (), [failed("hostfile", str(error), 'write one "HOST slots=N" a line')]
    fix = "mend launch.hostfile, launch.num_nodes or launch.num_devices"
    problems = [
        failed("hostfile", problem, fix)
        for problem in hosts_problems(hosts, launch.num_nodes, launch.num_devices, launch.launcher)
    ]
    spares = len(hosts) - launch.num_nodes
    return hosts, problems or [
        ok("hostfile", f"{len(hosts)} hosts{f', {spares} of them spare' if spares > 0 else ''}")
    ]


def without_address(hosts: Sequence[Host]) -> dict[str, str]:
    """Host -> why it has no address, of those that have none."""

    def look_up(name: str) -> str:
        try:
            socket.getaddrinfo(machine_of(name), None)
            return ""
        except OSError as error:
            return error.strerror or str(error)

    answers = in_parallel(look_up, [h.name for h in hosts], NAME_SECONDS)
    wrong = {h.name: answers.get(h.name, f"no answer within {NAME_SECONDS:g} s") for h in hosts}
    return {name: why for name, why in wrong.items() if why}


def names(hosts: Sequence[Host]) -> list[Finding]:
    """Whether every host has an address."""
    if not hosts:
        return []
    return [
        failed(
            "names",
            f"host {name} has no address: {why}",
            "mend the hostfile, or its DNS or /etc/hosts entry",
        )
        for name, why in without_address(hosts).items()
    ] or [ok("names", f"{len(hosts)} hosts have addresses")]


def pdsh(launch: LaunchConfig) -> list[Finding]:
    """The program that starts the launcher on every host."""
    if launch.hostfile is None:
        return []
    if launch.launcher != "pdsh":
        path = shutil.which("mpirun")
        if path:
            return [ok("mpirun", path)]
        return [
            failed(
                "mpirun",
                f"not on PATH; launch.launcher={launch.launcher} needs it",
                "install that MPI, or launch.launcher=pdsh",
            )
        ]

    answer = ask(["pdsh", "-V"], 5)
    if answer.code != 0:
        return [
            failed("pdsh", answer.reason, "apt-get install pdsh, or choose another launch.launcher")
        ]

    # pdsh may be built without ssh, and then reaches hosts by rsh, which nobody serves.
    lines = [line for line in answer.output.splitlines() if line.startswith("rcmd modules:")]
    modules = lines[0].partition(":")[2].split("(")[0].strip() if lines else ""
    if "ssh" not in modules.split(","):
        return [
            failed(
                "pdsh",
                f"reaches hosts by {modules or 'nothing'}, not by ssh",
                "install its module pdsh-rcmd-ssh",
            )
        ]

    chosen = os.environ.get("PDSH_RCMD_TYPE", "ssh")
    text = f"{answer.output.split()[0]}, over ssh"
    if chosen == "ssh":
        return [ok("pdsh", text)]
    return [
        warn(
            "pdsh",
            f"{text}, but PDSH_RCMD_TYPE is {chosen}",
            "unset PDSH_RCMD_TYPE: DeepSpeed's launcher uses ssh",
        )
    ]


def visits(launch: LaunchConfig, hosts: Sequence[Host], run_dir: Path) -> list[Finding]:
    """Go to every host by ssh, all at once, and look whether what a rank needs is there."""
    if not hosts:
        return []

    # A file written here and seen there proves that the run directory is shared.
    scratch = existing(run_dir) / f".loadstone-doctor-{os.getpid()}"
    # this thread does not outlive an interrupt
    atexit.register(scratch.unlink, missing_ok=True)
    wanted = {
        "repository": f"-d {shlex.quote(str(ROOT))}",
        "python": f"-x {shlex.quote(sys.executable)}",
    }
    try:
        scratch.write_text("seen from every host?\n")
        wanted["run_dir"] = f"-f {shlex.quote(str(scratch))}"
    except OSError:
        pass  # the check of the disk says so

    if launch.secrets_file is not None:
        wanted["secrets"] = (
            f"-r {shlex.quote(str(Path(launch.secrets_file).expanduser().absolute()))}"
        )

    # One visit answers all questions, since to log in is what takes time.
    tests = [
        f"if [ {test} ]; then echo {MARK}{key}=yes; else echo {MARK}{key}=no; fi"
        for key, test in wanted.items()
    ]
    # The time last: it is compared with the clock here when the answer has arrived.
    script = "; ".join([*tests, f"echo {MARK}host=$(hostname)", f"echo {MARK}time=$(date +%s.%N)"])
    command = f"sh -c {shlex.quote(script)}"

    try:
        answers = in_parallel(
            lambda name: ask(ssh_command(name, launch.ssh_port, command), SSH_SECONDS),
            [h.name for h in hosts],
            SSH_SECONDS + 2,
        )
    finally:
        scratch.unlink(missing_ok=True)

    # A name that nobody knows is told once, by `names`; one that ssh alone does not know, here.
    unknown = [h for h in hosts if h.name in answers and UNKNOWN_HOST in answers[h.name].reason]
    told = without_address(unknown)
    found = [
        visit(h.name, answers.get(h.name), launch.ssh_port, run_dir)
        for h in hosts
        if h.name not in told
    ]
    good = sum(not findings for findings in found)
    all_findings = [finding for findings in found for finding in findings]
    if good:
        all_findings.append(
            ok("ssh", f"{good} of {len(hosts)} hosts answer and have what a rank needs")
        )
    return all_findings


def visit(name: str, answer: Answer | None, port: int | None, run_dir: Path) -> list[Finding]:
    """What is wrong with one host, by what it said."""
    if answer is None or answer.code != 0:
        why = answer.reason if answer else f"no answer within {SSH_SECONDS:g} s"
        login = f"ssh {f'-p {port} ' if port else ''}{name} hostname"
        return [failed("ssh", f"host {name}: {why}", f"make this work without a password: {login}")]

    # A login may print anything of its own: only marked lines count.
    said = dict(
        line.removeprefix(MARK).split("=", 1)
        for line in answer.output.splitlines()
        if line.startswith(MARK) and "=" in line
    )

    findings = []
    if said.get("repository") != "yes":
        findings.append(
            failed(
                "ssh",
                f"host {name} has no {ROOT}",
                "clone Loadstone to the same path, or share the disk",
            )
        )
    if said.get("python") != "yes":
        findings.append(
            failed(
                "ssh", f"host {name} has no {sys.executable}", "make setup there, or share the disk"
            )
        )
    if said.get("run_dir") == "no":
        findings.append(
            failed(
                "ssh",
                f"host {name} does not see files written to {existing(run_dir)} here",
                "choose a run_dir on a file system that every host mounts",
            )
        )
    if said.get("secrets") == "no":
        findings.append(
            failed(
                "ssh", f"host {name} cannot read launch.secrets_file", "put a copy there, chmod 600"
            )
        )

    # Hosts whose clocks differ write records that cannot be put into order.
    try:
        ahead = float(said.get("time", "").removesuffix(".%N").removesuffix("N")) - answer.ended
    except ValueError:
        findings.append(
            warn("clock", f"host {name} did not say its time", "see that date works there")
        )
    else:
        if abs(ahead) > MAX_CLOCK_SECONDS:
            findings.append(
                warn(
                    "clock",
                    f"host {name} is {abs(ahead):.1f} s "
                    f"{'ahead of' if ahead > 0 else 'behind'} this machine",
                    "start an NTP client (chrony) on both",
                )
            )
    return findings


# --- variables ------------------------------------------------------------------------------------


def variables(launch: LaunchConfig) -> list[Finding]:
    """What ranks will get of launch.env, launch.forward_env and launch.secrets_file."""
    findings = [
        failed("variables", problem, "drop it from launch.env")
        for problem in problems_of_env(launch.env)
    ]
    try:
        given = forwarded_environment(os.environ, launch.forward_env)
        names = f": {', '.join(sorted(given))}" if given else ""
        findings.append(ok("variables", f"{len(given)} of this shell's are handed on{names}"))
    except ValueError as error:
        findings.append(failed("variables", str(error), "drop it from launch.forward_env"))
    if launch.secrets_file is not None:
        try:
            secrets = read_secrets_file(Path(launch.secrets_file).expanduser())
            findings.append(
                ok("secrets", f"{launch.secrets_file} sets {', '.join(secrets) or 'nothing'}")
            )
        except ValueError as error:
            findings.append(failed("secrets", str(error), "chmod 600, one NAME=VALUE a line"))
    return findings


def deepspeed_env(launch: LaunchConfig, folders: Sequence[Path]) -> list[Finding]:
    """Whether .deepspeed_env can be used: DeepSpeed's launcher puts its variables on the command
    lines of every host.
    """
    findings = []
    for folder in folders:
        path = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        if not path.is_file():
            continue
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError as error:
            findings.append(
                warn(
                    "deepspeed env",
                    f"{path} cannot be read: {error.strerror}",
                    "chmod 600 it, or remove it",
                )
            )
            continue

        pairs = [line.partition("=") for line in lines]

        # What stands on a command line is seen by every user of the host.
        secrets = [
            name.strip()
            for name, _, value in pairs
            if is_secret_name(name.strip()) or looks_secret(value)
        ]
        if secrets:
            findings.append(
                warn(
                    "deepspeed env",
                    f"{path} holds {', '.join(secrets)}, which ps would show on every host",
                    "move it to launch.secrets_file",
                )
            )

        bad = [number for number, (_, equals, _) in enumerate(pairs, 1) if not equals]
        if bad and launch.kind == "deepspeed" and launch.hostfile is not None:
            findings.append(
                failed(
                    "deepspeed env",
                    f"{path} line {bad[0]} is not NAME=VALUE, and DeepSpeed stops there",
                    "remove blank lines and comments",
                )
            )

        if not secrets and not bad:
            findings.append(
                ok(
                    "deepspeed env",
                    f"{path} sets {', '.join(name for name, _, _ in pairs) or 'nothing'}",
                )
            )
    return findings
