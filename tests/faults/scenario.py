"""One job in the laboratory with one fault: what happened, as a frozen record.

outcome = run(cluster, folder, data, fault="kill@1:7")
outcome.code, outcome.verdict["kind"], outcome.detection_seconds, outcome.losses, outcome.leftovers
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "end_to_end")]
from commandline import TINY, last_of_each, losses  # noqa: E402
from lab import Cluster, Process  # noqa: E402

NUM_STEPS, SAVE_INTERVAL = 14, 4
TIMEOUT = 8.0
"""watchdog.timeout_seconds of every scenario: the bound that detection is measured against."""
SETTLE = 1.5 + 1.0
"""What a verdict may take beyond the evidence: the judge waits for a better cause, and reports are
periodic.
"""
SETTINGS = last_of_each(
    (
        *TINY,
        f"train.num_steps={NUM_STEPS}",
        "train.global_batch_size=4",
        "parallel.expert_parallel_size=2",
        f"checkpoint.save_interval={SAVE_INTERVAL}",
        "checkpoint.keep_last=4",
        "checkpoint.grace_seconds=30",
        f"watchdog.timeout_seconds={TIMEOUT:g}",
        "watchdog.startup_seconds=60",
        "launch.restart_delay_seconds=0.5",
    )
)
SUPERVISED = Path("launch/job/supervisor.py")


@dataclass(frozen=True)
class Outcome:
    """What one job left behind."""

    run_dir: Path
    code: int | None
    """Exit code of the command; None: it did not end in time and was killed."""
    events: tuple[dict[str, Any], ...]
    """RUN/supervisor.jsonl."""
    faults: tuple[dict[str, Any], ...]
    """What was broken, when, where: records of the injector, or of an act from outside."""
    losses: dict[int, float]
    log: str
    leftovers: dict[str, list[Process]]
    """Processes of the job that outlived it, by node, after `settle` seconds."""
    settled_seconds: float
    """From the command's end to the end of the last process."""
    wall_seconds: float

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == "verdict"]

    @property
    def verdict(self) -> dict[str, Any]:
        """The first verdict."""
        assert self.verdicts, f"no verdict\n{self.report()}"
        return self.verdicts[0]

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == "attempt"]

    @property
    def restarts(self) -> int:
        return max(0, len(self.attempts) - 1)

    @property
    def detection_seconds(self) -> float:
        """From the first fault to the first verdict."""
        assert self.faults, f"no fault happened\n{self.report()}"
        return round(self.verdict["time"] - self.faults[0]["time"], 2)

    @property
    def resumed_steps(self) -> list[int]:
        """The steps from which the job went on, in order."""
        return [int(step) for step in re.findall(r"resumed from \S+ \(step (\d+)\)", self.log)]

    @property
    def steps_lost(self) -> int | None:
        """Finished steps that had to be done again after the first fault; None: it did not go
        on.
        """
        if not self.resumed_steps:
            return None
        return max(0, self.faults[0]["step"] - 1 - self.resumed_steps[0])

    def report(self) -> str:
        """All one needs to see why a scenario went wrong."""
        parts = [
            f"exit code {self.code} after {self.wall_seconds:.1f} s; faults "
            f"{json.dumps(self.faults)}",
            *(json.dumps(event) for event in self.events),
        ]
        parts += [
            f"left over on {node}: {process}"
            for node, found in self.leftovers.items()
            for process in found
        ]
        return "\n".join(
            [*parts, f"--- the end of {self.run_dir.parent / 'log'}", self.log[-6000:]]
        )


Act = Callable[["Job"], Any]


class Job:
    """A running command on the login node, for faults from outside."""

    def __init__(self, cluster: Cluster, run_dir: Path, process: subprocess.Popen, log: Path):
        self.cluster, self.run_dir, self.process, self.log = cluster, run_dir, process, log
        self.faults: list[dict[str, Any]] = []

    @property
    def step(self) -> int:
        """The last logged step."""
        with contextlib.suppress(OSError, ValueError):
            return max(losses(self.cluster.seen(self.run_dir)), default=0)
        return 0

    def events(self) -> list[dict[str, Any]]:
        return read_events(self.cluster.seen(self.run_dir))

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 90) -> None:
        """Wait until the condition holds, as long as the job runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the job ended before {what}\n{tail(self.log)}"
            assert time.monotonic() < deadline, f"not {what} within {seconds} s\n{tail(self.log)}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.step >= step, f"step {step} was logged")

    def record(self, kind: str, **facts: Any) -> None:
        """Note a fault about to be made from outside, in the midst of the step after the last
        logged one.
        """
        self.faults.append(
            {"fault": kind, "kind": kind, "time": time.time(), "step": self.step + 1, **facts}
        )

    def supervisor(self) -> Process:
        """The process of the command itself, below nsenter."""
        found = [
            p
            for p in self.cluster.login.processes()
            if "-m launch.train" in p.command and "RANK" not in p.environment
        ]
        known = {p.pid for p in found}
        top = [p for p in found if p.parent not in known]
        assert top, f"no command runs on the login node\n{tail(self.log)}"
        return top[0]

    def launcher(self) -> Process:
        found = [
            p for p in self.cluster.login.processes() if "deepspeed.launcher.runner" in p.command
        ]
        assert found, f"no launcher runs\n{tail(self.log)}"
        return found[0]

    def signal(self, process: Process, number: signal.Signals, kind: str, **facts: Any) -> None:
        self.record(kind, **facts)
        os.kill(process.pid, number)


def run(
    cluster: Cluster,
    folder: Path,
    data: Sequence[str],
    *overrides: str,
    fault: str = "",
    pace: float = 0.0,
    act: Act | None = None,
    max_restarts: int = 2,
    limit: float = 150,
    settle: float = 3.0,
    run_dir: Path | None = None,
    **environment: str,
) -> Outcome:
    """One job over the cluster's hosts, num_nodes 2 of them unless told otherwise, from start to
    end.

    Args:
        data: overrides that name the data (tests/end_to_end/commandline.py::write_text).
        fault, pace: for tests/faults/site. act: called with the Job once it runs, in place of an
            injected fault.
        limit: seconds after which the command is killed. settle: seconds in which processes may go
            after the command.
        environment: variables of the shell that starts the command.
    """
    run_dir = run_dir or folder / "run"
    arguments = last_of_each(
        (*command(cluster, folder, data, fault, pace, max_restarts), *overrides)
    )
    if any(a.startswith("resume=") for a in overrides) and not fault and not pace:
        # the saved one holds a PYTHONPATH, which needs a word of ours
        arguments.append("launch.env={}")
    if not any(a.startswith(("resume=", "run_dir=")) for a in arguments):
        arguments.append(f"run_dir={run_dir}")
    log, started = folder / "log", time.monotonic()
    process = cluster.start(cluster.login, arguments, log, **environment)
    job = Job(cluster, run_dir, process, log)
    code: int | None = None
    try:
        if act is not None:
            act(job)
        code = process.wait(max(1.0, limit - (time.monotonic() - started)))
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            process.kill()  # nsenter; what it started is killed with the lab
            process.wait()
    ended = time.monotonic()
    if code is not None:
        while time.monotonic() - ended < settle and cluster.job():
            time.sleep(0.1)
    return Outcome(
        run_dir,
        code,
        tuple(job.events()),
        tuple([*injected(folder), *job.faults]),
        job_losses(job),
        log.read_text(errors="replace"),
        cluster.job(),
        round(time.monotonic() - ended, 1),
        round(ended - started, 1),
    )


def command(
    cluster: Cluster,
    folder: Path,
    data: Sequence[str],
    fault: str = "",
    pace: float = 0.0,
    max_restarts: int = 2,
) -> list[str]:
    """What a user would type after `python`, on the login node."""
    hostfile = cluster.folder / "hostfile"
    if not hostfile.exists():
        cluster.hostfile()
    arguments = [
        "-m",
        "launch.train",
        *SETTINGS,
        *data,
        "launch=deepspeed",
        f"launch.hostfile={hostfile}",
        "launch.num_nodes=2",
        "launch.num_devices=1",
    ]
    if not (HERE.parent.parent / SUPERVISED).exists():
        return arguments
    return [
        *arguments,
        f"launch.listen_addr={cluster.login.address}",
        f"launch.max_restarts={max_restarts}",
        *injection(folder, fault, pace),
    ]


def injection(folder: Path, fault: str, pace: float) -> list[str]:
    """Overrides that hand faults to the ranks."""
    if not fault and not pace:
        return []
    (folder / "faults").mkdir(parents=True, exist_ok=True)
    values = {
        "PYTHONPATH": HERE / "site",
        "LOADSTONE_FAULT": fault,
        "LOADSTONE_FAULT_DIR": folder / "faults",
        "LOADSTONE_PACE": f"{pace:g}",
    }
    return [f"+launch.env.{name}='{value}'" for name, value in values.items()]


def injected(folder: Path) -> list[dict[str, Any]]:
    """Faults that have struck, in order."""
    return sorted(
        (json.loads(p.read_text()) for p in (folder / "faults").glob("*.json")),
        key=lambda fact: fact["time"],
    )


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    try:
        lines = (run_dir / "supervisor.jsonl").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # being written
            found.append(json.loads(line))
    return found


def job_losses(job: Job) -> dict[int, float]:
    with contextlib.suppress(OSError):
        return losses(job.cluster.seen(job.run_dir))
    return {}


def tail(log: Path, characters: int = 6000) -> str:
    return log.read_text(errors="replace")[-characters:] if log.exists() else ""


@functools.cache
def reference(folder: Path, data: tuple[str, ...], *overrides: str) -> dict[int, float]:
    """Losses of the uninterrupted job, two ranks on this machine, no laboratory."""
    name = "reference" + "".join(c if c.isalnum() else "-" for c in "".join(overrides))
    line = [
        sys.executable,
        "-m",
        "launch.train",
        *last_of_each(
            (
                *SETTINGS,
                *data,
                "launch=deepspeed",
                "launch.num_devices=2",
                f"run_dir={folder / name}",
                *overrides,
            )
        ),
    ]
    done = subprocess.run(
        line,
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return losses(folder / name)


def tabulate(outcome: Outcome, fault: str, bound: float | None, result: str) -> None:
    """Add a line to the table named by LOADSTONE_FAULT_TABLE, for the documentation."""
    path = os.environ.get("LOADSTONE_FAULT_TABLE")
    if not path:
        return
    row = {
        "fault": fault,
        "bound_seconds": bound,
        "detection_seconds": outcome.detection_seconds
        if outcome.verdicts and outcome.faults
        else None,
        "verdict": outcome.verdicts[0]["kind"] if outcome.verdicts else None,
        "message": outcome.verdicts[0]["message"] if outcome.verdicts else None,
        "code": outcome.code,
        "restarts": outcome.restarts,
        "steps_lost": outcome.steps_lost if outcome.faults else None,
        "outcome": result,
    }
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
