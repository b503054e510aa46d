"""Is this machine, and every host of the hostfile, ready to train? python -m launch.doctor
[launch=... run_dir=...]

One line per check: ok, warn or FAIL, its name, what was found, and how to mend it. The exit code is
1 when one fails. Checks run at the same time, each in a thread; what has not answered after SECONDS
counts as failed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch.command.messages import print_result
from launch.config.build import record
from launch.doctor import machine, network
from launch.doctor.finding import Finding, failed
from launch.process.ask import ask
from launch.process.identity import ROOT
from launch.process.secrets import redact
from train.config.launching import LaunchConfig
from train.config.watching import TrackerConfig
from train.files.strict_json import dumps

SECONDS = 25.0
PROBE_SECONDS = 22.0
Check = Callable[[], list[Finding]]


@dataclass(frozen=True)
class DoctorConfig:
    """Settings of launch.doctor."""

    launch: LaunchConfig
    """How the job would be started; it decides what is examined."""
    tracker: TrackerConfig
    """Where metrics would go."""
    run_dir: str | None = None
    """Where runs will live; None: runs/."""
    json: bool = False
    """Print the findings as one JSON list."""

    def problems(self) -> list[str]:
        return self.launch.problems()


def main(config: DictConfig) -> None:
    settings: DoctorConfig = record(config, DoctorConfig)
    findings = []
    for finding in examine(checks(settings), SECONDS):
        findings.append(finding)
        if not settings.json:
            print(finding, flush=True)
    counts = {level: sum(f.level == level for f in findings) for level in ("ok", "warn", "FAIL")}
    if settings.json:
        print(dumps(redact([asdict(f) for f in findings])), flush=True)
    else:
        print_result(counts)
    if counts["FAIL"]:
        raise SystemExit(1)


def checks(settings: DoctorConfig) -> dict[str, Check]:
    """In the order in which they are printed."""
    launch = settings.launch
    run_dir = Path(settings.run_dir or ROOT / "runs").expanduser()
    hosts, hostfile = network.hostfile(launch)
    return {
        "packages": lambda: machine.python_and_packages((ROOT / "requirements.txt").read_text()),
        "device": lambda: torch_says(launch),
        "load": lambda: [machine.load()],
        "disk": lambda: [machine.disk_space(run_dir)],
        "write speed": lambda: [machine.write_speed(run_dir)],
        "shared memory": lambda: [machine.shared_memory()],
        "open files": lambda: [machine.open_files()],
        "port": lambda: [machine.free_port(launch.master_port)],
        "gloo": lambda: network.gloo(launch, hosts),
        "hostfile": lambda: hostfile,
        "names": lambda: network.names(hosts),
        "pdsh": lambda: network.pdsh(launch),
        "ssh": lambda: network.visits(launch, hosts, run_dir),
        "slurm": lambda: machine.slurm(launch),
        "variables": lambda: network.variables(launch),
        "deepspeed env": lambda: network.deepspeed_env(launch, (Path.cwd(), Path.home())),
        "wandb": lambda: [machine.wandb(settings.tracker)],
        "hugging face": lambda: [machine.hugging_face()],
    }


def torch_says(launch: LaunchConfig) -> list[Finding]:
    """Devices, compilers, kernels and DeepSpeed, which need torch: asked in a process of its
    own.
    """
    answer = ask(
        [sys.executable, "-W", "ignore", "-m", "launch.doctor.probe", "facts"],
        PROBE_SECONDS,
        {**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if answer.code != 0:
        return [
            failed(
                "torch",
                answer.reason,
                "see nvidia-smi, dmesg, and what python -c 'import torch' says",
            )
        ]
    facts: dict[str, Any] = json.loads(answer.output.splitlines()[-1])
    return [
        *machine.devices(facts, launch),
        *machine.compilers(facts),
        *network.nccl(facts),
        *machine.kernels(facts),
        *machine.deepspeed(facts),
    ]


def examine(checks: dict[str, Check], seconds: float) -> Iterator[Finding]:
    """Findings in the order of the checks, each as soon as it and those before it are known."""
    until = time.monotonic() + seconds
    answers: dict[str, list[Finding]] = {}

    def work(name: str, check: Check) -> None:
        try:
            answers[name] = check()
        except Exception as error:  # the other checks go on
            answers[name] = [
                failed(
                    name,
                    f"the check itself failed: {type(error).__name__}: {error}",
                    "tell us, please",
                )
            ]

    # A check may hang in a driver for ever; a daemon thread does not keep the command alive.
    threads = {
        name: threading.Thread(target=work, args=(name, check), daemon=True)
        for name, check in checks.items()
    }
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(max(0.0, until - time.monotonic()))
        yield from answers.get(
            name,
            [failed(name, f"no answer within {seconds:g} s", "something hangs: see dmesg, mounts")],
        )
