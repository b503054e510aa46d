"""Random kills and stops of a tiny run on two ranks, each followed by what a user would do, until
the run is done.

    python tests/faults/chaos.py --seed 1 --disturbances 200 --seconds 3000 --out counts.json

A cycle is one run, from its command to its last step. A disturbance waits for a phase (launching,
preparing data, starting ranks, training, evaluating, saving, restarting, finishing), then sends a
signal to the supervisor, the launcher, an agent or a rank. When the command has ended, the user
resumes the run, or begins it again where nothing could be resumed. All choices follow from the
seed; the moment within a phase also from the machine. Checked in every cycle: metrics.jsonl step by
step (without times), the tensors of the last checkpoint and result.json are those of an undisturbed
run; every exit code is one that docs/reliability.md allows for what was done; no process is left.

Exit code 0: all held; 1: the failures are in the JSON, with the seed, what was done and the log.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE.parent / "end_to_end")]
from commandline import TINY, last_of_each  # noqa: E402

PR_SET_CHILD_SUBREAPER = 36
NUM_STEPS = 36
TIMEOUT, GRACE = 12.0, 300.0
ORPHAN_SECONDS = TIMEOUT + GRACE + 18.0
"""What may outlive a command that was killed: its ranks save and end within these bounds."""
END_SECONDS = 600.0
"""After this long without an end a command that was asked to end, or lost a process, counts as
hanging.
"""
SETTINGS = last_of_each(
    (
        *TINY,
        f"train.num_steps={NUM_STEPS}",
        "train.eval_interval=6",
        "checkpoint.save_interval=4",
        "checkpoint.keep_last=3",
        f"checkpoint.grace_seconds={GRACE:g}",
        f"watchdog.timeout_seconds={TIMEOUT:g}",
        "watchdog.startup_seconds=900",
        "launch.num_devices=2",
        "parallel.expert_parallel_size=2",
        "launch.max_restarts=50",
        "launch.restart_delay_seconds=0.3",
        "router=threshold",
        "balance=none",
        "router.budget=1.5",
        "budget.warm_start_steps=3",
        "budget.blend_steps=4",
    )
)
LAUNCHERS = ("torchrun", "deepspeed", "torchrun")
"""Of the cycles, in turn: torchrun starts in half the time."""
TRAINING = ("data", "forward", "backward", "step", "log")
LAUNCHER = ("deepspeed.launcher", "launch.launchers.torch_run")
PHASES = {
    "launch": 3,
    "prepare": 3,
    "start": 6,
    "training": 9,
    "evaluate": 4,
    "save": 4,
    "restart": 5,
    "finish": 1,
}
"""Of a disturbance, with how often each is drawn."""
BEFORE_TRAINING = ("launch", "prepare", "start")
BEFORE_RANKS = ("launch", "prepare", "finish")
KINDS = {
    "supervisor": {"kill": 3, "term": 2, "int": 2, "int twice": 1, "stop": 6},
    "launcher": {"kill": 2, "term": 1, "stop": 4},
    "agent": {"kill": 3, "term": 2, "int": 1, "stop": 8},
    "rank": {"kill": 4, "term": 2, "int": 1, "stop": 10, "stop for long": 1},
}
SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "int twice": signal.SIGINT,
    "stop": signal.SIGSTOP,
    "stop for long": signal.SIGSTOP,
}


@dataclass
class Disturbance:
    """What is to be done, and when it was: facts that are None were not known or did not happen."""

    phase: str
    part: str
    """Of training: which beat."""
    skip: int
    """How many occurrences of the phase to let pass."""
    share: float
    """When within the phase, as a share of about its length."""
    target: str
    number: int
    kind: str
    seconds: float
    """How long a stopped process stands still."""
    hasty: bool
    """Whether the user resumes while processes of a killed command still live."""
    struck: dict[str, Any] | None = None

    @classmethod
    def draw(cls, chance: random.Random) -> Disturbance:
        phase = chance.choices([*PHASES], [*PHASES.values()])[0]
        target = (
            "supervisor" if phase in BEFORE_RANKS else chance.choices([*KINDS], (3, 1, 2, 5))[0]
        )
        kind = chance.choices([*KINDS[target]], [*KINDS[target].values()])[0]
        return cls(
            phase,
            chance.choice(TRAINING),
            chance.choice((0, 0, 1, 2, 3, 5))
            if phase == "training"
            else chance.choice((0, 0, 1))
            if phase in ("evaluate", "save")
            else 0,
            chance.random(),
            target,
            chance.randrange(2),
            kind,
            TIMEOUT + 4 if kind == "stop for long" else chance.uniform(0.05, 2.0),
            chance.random() < 0.5,
        )


class Failed(Exception):
    """A promise was not kept."""


@dataclass
class Cycle:
    """One run and what is done to it."""

    folder: Path
    text: Path
    launcher: str
    plans: list[Disturbance]
    """Drawn and not done; what a cycle leaves is the next one's."""
    until: float
    next_plan: Callable[[], Disturbance]
    most: int
    """Disturbances of this cycle."""
    done: list[Disturbance] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    begun_anew: int = 0
    refused: int = 0
    commands: int = 0

    def __post_init__(self) -> None:
        self.run_dir, self.cache, self.phases = (
            self.folder / "run",
            self.folder / "cache",
            self.folder / "phases",
        )
        self.log = self.folder / "log"
        self.phases.mkdir(parents=True)
        self.spans = {
            "launch": 5.0,
            "prepare": 0.6,
            "start": 10.0,
            "restart": 8.0,
            "finish": 1.0,
            "save": 0.6,
            "evaluate": 0.5,
            "training": 0.25,
        }

    # --- the user ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Until the run is done.

        Raises:
            Failed: a promise was not kept.
        """
        waited = 0
        while True:
            code, text = self.command()
            self.codes.append(code)
            if self.completed(code) or (code == 2 and "is finished" in text and not self.recent):
                break
            mine = self.allowed()
            if code == 73:
                self.refused += 1
                waited += 1
                if waited > 60:
                    raise Failed("the run directory stayed in use for two minutes")
                time.sleep(2)
                continue
            waited = 0
            if (
                code in (2, 65)
                and not self.checkpoints()
                and "no usable checkpoint" in text
                and not self.saved()
            ):
                # nothing was saved: the user removes what is there
                self.begun_anew += 1
                self.settle()
                shutil.rmtree(self.run_dir)
                continue
            if code not in mine:
                raise Failed(f"exit code {code}; allowed after this: {sorted(mine)}")
        self.settle()

    def command(self) -> tuple[int, str]:
        """One command of the user, disturbed; its exit code and output."""
        self.commands += 1
        self.recent: list[Disturbance] = []
        for path in self.phases.glob("*"):
            path.unlink()
        exists = (self.run_dir / "config.yaml").is_file()
        overrides = (
            [f"resume={self.run_dir}"]
            if exists
            else [
                *SETTINGS,
                f"launch={self.launcher}",
                *data(self.text, self.cache),
                f"run_dir={self.run_dir}",
            ]
        )
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "LOADSTONE_PHASES": str(self.phases),
            "LOADSTONE_LINGER": "0.2",
            "PYTHONPATH": os.pathsep.join([str(HERE / "site"), os.environ.get("PYTHONPATH", "")]),
        }
        start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("a") as out:
            print(
                f"--- {time.time():.2f} launch.train {' '.join(overrides[-1:])}",
                file=out,
                flush=True,
            )
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "launch.train", *overrides],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.process, self.began, self.known = process, time.monotonic(), len(self.events())
        try:
            while process.poll() is None:
                if len(self.done) >= self.most or time.time() > self.until:
                    self.wait(lambda: False, END_SECONDS * 2)
                    break
                if not self.disturb():
                    break
            code = process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failed(f"the command has not ended after {END_SECONDS:.0f} s") from None
        if not any(d.kind == "kill" and d.target == "supervisor" and d.hasty for d in self.recent):
            self.settle()
        with self.log.open("rb") as file:
            file.seek(start)
            return code, file.read().decode(errors="replace")

    def completed(self, code: int) -> bool:
        """Whether the run is done: the command says so, or was ended after its result was
        written.
        """
        with contextlib.suppress(OSError, ValueError):
            result = json.loads((self.run_dir / "result.json").read_text())
            return code == 0 and result["step"] == NUM_STEPS and not result["stopped"]
        return False

    def allowed(self) -> set[int]:
        """Exit codes that what was done to the last command explains."""
        codes = {0} if self.recent else set()
        for strike in self.recent:
            if strike.target != "supervisor":
                codes |= {0, 70}
                continue
            codes |= {
                "kill": {-9},
                "term": {0, 143, -15},
                "int": {0, 130, -2},
                "int twice": {0, 130, -2},
                "stop": {0, 70},
            }[strike.kind]
        return codes

    def saved(self) -> bool:
        return (self.run_dir / "saved").exists()

    def checkpoints(self) -> list[Path]:
        return [*(self.run_dir / "checkpoints").glob("step-*")]

    # --- disturbing -------------------------------------------------------------------------------

    def disturb(self) -> bool:
        """One disturbance, if its phase comes; False when the command ends without it."""
        while len(self.plans) < 24:
            self.plans.append(self.next_plan())
        now = self.phase()
        possible = [plan for plan in self.plans if self.may_come(plan, now)]
        if not possible:
            time.sleep(0.1)
            return True
        plan = next((plan for plan in possible if plan.phase == now), possible[0])
        self.plans.remove(plan)
        if not self.wait(lambda: self.reached(plan), END_SECONDS):
            self.plans.insert(0, plan)  # for the next command, or the next cycle
            return self.process.poll() is None
        time.sleep(plan.share * self.spans[plan.phase])
        target = self.find(plan)
        if target is None or self.process.poll() is not None:
            self.plans.append(plan)
            return self.process.poll() is None
        plan.struck = {
            "phase": self.phase(),
            "time": round(time.time(), 2),
            "pid": target.pid,
            "step": self.step(),
        }
        verdicts = self.verdicts()
        try:
            target.send_signal(SIGNALS[plan.kind])
            if plan.kind == "int twice":
                time.sleep(0.3)
                target.send_signal(signal.SIGINT)
        except psutil.NoSuchProcess:
            plan.struck = None
            self.plans.append(plan)
            return True
        self.done.append(plan)
        self.recent.append(plan)
        with self.log.open("a") as out:
            print(f"--- {time.time():.2f} {json.dumps(asdict(plan))}", file=out, flush=True)
        if plan.kind.startswith("stop"):
            time.sleep(plan.seconds)
            with contextlib.suppress(psutil.NoSuchProcess):
                target.send_signal(signal.SIGCONT)
        elif plan.target == "supervisor":
            self.wait(lambda: False, END_SECONDS)
            return False
        else:
            self.wait(lambda: self.verdicts() > verdicts or self.restarted(verdicts), 60)
        return True

    def may_come(self, plan: Disturbance, now: str) -> bool:
        """Whether this command may yet come to the plan's phase."""
        if now == "restart":
            return plan.phase in ("restart", "training", "evaluate", "save")
        if plan.phase == "restart":
            return False
        if plan.phase in BEFORE_TRAINING:
            return now in BEFORE_TRAINING[: BEFORE_TRAINING.index(plan.phase) + 1] and (
                plan.phase != "prepare" or not any(self.cache.glob("*/manifest.json"))
            )
        return plan.phase != "finish" or self.step() > NUM_STEPS - 4

    def wait(self, condition: Callable[[], Any], seconds: float) -> bool:
        """Whether the condition came to hold before the command ended."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            if condition():
                return True
            if time.monotonic() > deadline:
                if seconds >= 2 * END_SECONDS:
                    raise Failed(
                        f"the command was left alone and has not ended after {seconds:.0f} s"
                    )
                return False
            time.sleep(0.02)
        return False

    def reached(self, plan: Disturbance) -> bool:
        """Whether the phase of a plan is now; counts down its `skip`."""
        phase = self.phase()
        fits = phase == (plan.part if plan.phase == "training" else plan.phase)
        if plan.phase == "restart":
            return phase == "restart"
        if not fits:
            self.counted = None
            return False
        if plan.skip == 0:
            return True
        place = (self.commands, self.step(), phase)
        if self.counted != place:
            self.counted = place
            plan.skip -= 1
        return False

    counted: tuple[Any, ...] | None = None

    def phase(self) -> str:
        """Where the run is, by what can be seen from outside."""
        events = self.events()[self.known :]
        attempts = [e for e in events if e["event"] == "attempt"]
        if not attempts:
            return "prepare" if any(self.cache.glob(".*-*")) else "launch"
        if any(e["event"] == "end" for e in events):
            return "finish"
        beats = self.beats()
        if events[-1]["event"] in ("verdict", "stopped") or not beats:
            return "restart" if events[-1]["event"] != "attempt" or len(attempts) > 1 else "start"
        step, name = beats[0]
        if name == "start":
            return "restart" if len(attempts) > 1 else "start"
        return "finish" if name == "done" else name

    def beats(self) -> list[tuple[int, str]]:
        """Step and phase of the ranks that live, by rank."""
        began = max((e["time"] for e in self.events() if e["event"] == "attempt"), default=0.0)
        found = []
        for path in sorted(self.phases.glob("[01]")):
            with contextlib.suppress(OSError, ValueError):
                if path.stat().st_mtime >= began:
                    step, name = path.read_text().split()
                    found.append((int(step), name))
        return found

    def step(self) -> int:
        return max((step for step, _ in self.beats()), default=0)

    def find(self, plan: Disturbance) -> psutil.Process | None:
        if plan.target == "supervisor":
            return psutil.Process(self.process.pid) if self.process.poll() is None else None
        found = []
        for process in descendants():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if plan.target == "launcher":
                    if any(name in line for name in LAUNCHER):
                        found.append(process)
                elif (
                    "launch.job.agent" if plan.target == "agent" else "launch.train"
                ) in line and (
                    not any(name in line for name in LAUNCHER)
                    and process.environ().get("RANK") == str(plan.number)
                ):
                    found.append(process)
        return found[plan.number % len(found)] if found else None

    def events(self) -> list[dict[str, Any]]:
        found = []
        with contextlib.suppress(OSError):
            for line in (self.run_dir / "supervisor.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def verdicts(self) -> int:
        return sum(e["event"] == "verdict" for e in self.events())

    def restarted(self, verdicts: int) -> bool:
        return any(e["event"] == "end" for e in self.events()[self.known :])

    # --- what must hold ---------------------------------------------------------------------------

    def settle(self) -> None:
        """
        Raises:
            Failed: a process is left after the time it may take to save and end.
        """
        deadline = time.monotonic() + ORPHAN_SECONDS
        while left := descendants():
            if time.monotonic() > deadline:
                words = [f"{p.pid} {' '.join(p.cmdline())[:120]}" for p in left if p.is_running()]
                for process in left:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                raise Failed(f"left over after {ORPHAN_SECONDS:.0f} s: {'; '.join(words)}")
            time.sleep(0.2)


def descendants() -> list[psutil.Process]:
    """Living processes that this one has started, directly or not; orphans are adopted by it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
            elif process.ppid() == os.getpid():
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
    return found


def data(text: Path, cache: Path) -> list[str]:
    return [
        "data=files",
        "data.sources.0.path=text",
        f"data.sources.0.data_files={text}",
        "data.sources.0.sample_by=line",
        "data.validation_fraction=0.02",
        f"data.cache_dir={cache}",
    ]


def write_corpus(path: Path) -> None:
    """Enough text that preparing it takes a second or two."""
    words = (
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "seven",
        "wise",
        "owls",
        "watch",
        "from",
        "old",
        "oak",
        "trees",
        "and",
        "sing",
        "of",
        "rivers",
    )
    path.write_text(
        "\n".join(
            " ".join(words[(i * j + j) % len(words)] for j in range(1, 12 + i % 9)) + f" {i}"
            for i in range(12_000)
        )
    )


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what measures time or memory."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("perf/", "comm/"))} for line in lines
    ]


def tensors(run_dir: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    return _load_state_dict_from_keys(
        checkpoint_id=run_dir / "checkpoints" / f"step-{NUM_STEPS:08d}" / "weights"
    )


RESULT = (
    "val_loss",
    "best_val_loss",
    "unigram_entropy",
    "bits_per_byte",
    "step",
    "tokens",
    "skipped_steps",
    "stopped",
)


def compare(run_dir: Path, reference: Path) -> None:
    """
    Raises:
        Failed: a number differs from the undisturbed run.
    """
    import torch

    ours, theirs = numbers(run_dir), numbers(reference)
    if [(r["step"], sorted(r)) for r in ours] != [(r["step"], sorted(r)) for r in theirs]:
        raise Failed(f"metrics.jsonl has other records: steps {[r['step'] for r in ours]}")
    for mine, other in zip(ours, theirs, strict=True):
        differing = [k for k in mine if mine[k] != other[k]]
        if differing:
            raise Failed(
                f"step {mine['step']}: "
                f"{', '.join(f'{k} {mine[k]} instead of {other[k]}' for k in differing[:4])}"
            )
    result, expected = (json.loads((d / "result.json").read_text()) for d in (run_dir, reference))
    if wrong := [k for k in RESULT if result[k] != expected[k]]:
        raise Failed(
            f"result.json: {', '.join(f'{k} {result[k]} instead of {expected[k]}' for k in wrong)}"
        )
    last, expected_last = tensors(run_dir), tensors(reference)
    if last.keys() != expected_last.keys() or not all(
        torch.equal(last[k], expected_last[k]) for k in last
    ):
        raise Failed("the last checkpoint holds other tensors")


def undisturbed(folder: Path, text: Path) -> Path:
    """The run directory of the undisturbed run; one that an earlier call has made in the folder is
    used again.
    """
    if (folder / "run" / "result.json").is_file():
        return folder / "run"
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "launch.train",
            *SETTINGS,
            "launch=torchrun",
            *data(text, folder / "cache"),
            f"run_dir={folder / 'run'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "run"


def chaos(
    seed: int,
    disturbances: int,
    seconds: float,
    folder: Path,
    per_cycle: int = 12,
    report: Callable[[dict[str, Any]], None] = lambda counts: None,
) -> dict[str, Any]:
    """Cycles until so many disturbances were made or the time is over; a cycle that has begun is
    completed undisturbed.

    Returns: counts by phase, target and kind, and the failures.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    # A shell has jobs in its background ignore Ctrl-C, and so would the commands that are
    # disturbed.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chance, until = random.Random(seed), time.time() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "text.txt").exists():
        write_corpus(folder / "text.txt")
    reference = undisturbed(folder / "undisturbed", folder / "text.txt")
    cycles: list[Cycle] = []
    failures: list[dict[str, Any]] = []
    plans: list[Disturbance] = []

    def counts() -> dict[str, Any]:
        done = [d for cycle in cycles for d in cycle.done]
        count = collections.Counter
        return {
            "seed": seed,
            "disturbances": len(done),
            "cycles": len(cycles),
            "failures": failures,
            "commands": sum(c.commands for c in cycles),
            "codes": dict(count(str(x) for c in cycles for x in c.codes)),
            "begun_anew": sum(c.begun_anew for c in cycles),
            "refused_while_in_use": sum(c.refused for c in cycles),
            "by_phase": dict(count(d.struck["phase"] for d in done if d.struck)),
            "by_target": dict(count(d.target for d in done)),
            "by_kind": dict(count(d.kind for d in done)),
            "by_target_and_kind": dict(count(f"{d.target} {d.kind}" for d in done)),
            "seconds": round(time.time() - until + seconds),
        }

    while (left := disturbances - sum(len(c.done) for c in cycles)) > 0 and time.time() < until:
        cycle = Cycle(
            folder / f"cycle-{len(cycles):03d}",
            folder / "text.txt",
            LAUNCHERS[len(cycles) % len(LAUNCHERS)],
            plans,
            until,
            lambda: Disturbance.draw(chance),
            min(per_cycle, left),
        )
        cycles.append(cycle)
        try:
            cycle.run()
            compare(cycle.run_dir, reference)
        except Failed as failure:
            failures.append(
                {
                    "cycle": len(cycles) - 1,
                    "failure": str(failure),
                    "log": str(cycle.log),
                    "codes": cycle.codes,
                    "done": [asdict(d) for d in cycle.done],
                }
            )
            end_all()
        else:
            shutil.rmtree(cycle.folder)
        report(counts())
    return counts()


def end_all() -> None:
    while left := descendants():
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--disturbances", type=int, default=200)
    parser.add_argument(
        "--seconds", type=float, default=86400.0, help="no new disturbance after so long"
    )
    parser.add_argument("--per-cycle", type=int, default=12, help="disturbances of one run at most")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where runs lie; those that failed stay"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="JSON of counts and failures, rewritten after every cycle",
    )
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="loadstone-chaos-"))

    def report(counts: dict[str, Any]) -> None:
        if options.out is not None:
            options.out.write_text(json.dumps(counts, indent=1) + "\n")
        print(
            json.dumps(
                {k: counts[k] for k in ("cycles", "disturbances", "commands", "seconds")}
                | {"failures": len(counts["failures"])}
            ),
            flush=True,
        )

    counts = chaos(
        options.seed, options.disturbances, options.seconds, folder, options.per_cycle, report
    )
    report(counts)
    print(json.dumps(counts))
    raise SystemExit(1 if counts["failures"] else 0)


if __name__ == "__main__":
    main()
