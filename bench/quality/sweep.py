"""Sweeps of training runs: many small ones, one after another, each in a fork that has the imports.

A sweep is a folder of runs. What is there is not trained again, so that the same command goes on
where it was stopped, and a run that was cut short goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import resource
import runpy
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.engine.library import import_deepspeed

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""Number of differences -> how many standard errors a 95% interval has on each side."""
Todo = Sequence[tuple[Path, list[str]]]
"""Runs that are still to be trained, and what each is asked for."""


def parser_of(name: str) -> argparse.ArgumentParser:
    """The arguments that all sweeps have."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1, 2])
    parser.add_argument("--processor-seconds", type=float, default=math.inf)
    parser.add_argument("--report", action="store_true", help="of what there is; train nothing")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    return parser


def go_on(
    arguments: argparse.Namespace,
    todo: Callable[[], Todo],
    measure: Callable[[Path], None] | None = None,
) -> None:
    """Train what is missing, the first of it first, until nothing is or the time is spent; what is
    missing is asked for anew after each run. measure: see train.
    """
    while not arguments.report and spent() < arguments.processor_seconds:
        runs = todo()
        if not runs:
            break
        preload()
        run, words = runs[0]
        train(run, words, measure)
        print(f"{run.name}: {read(run)['val_loss']:.4f}", file=sys.stderr, flush=True)


def print_missing(todo: Todo) -> None:
    if todo:
        print("\nNot run: " + ", ".join(run.name for run, _ in todo) + ".")


def is_done(run: Path) -> bool:
    """Whether it trained to its end; a run that was asked to stop has a result as well."""
    result = run / "result.json"
    return result.is_file() and not json.loads(result.read_text())["stopped"]


def train(run: Path, words: list[str], measure: Callable[[Path], None] | None = None) -> None:
    """Train a run to its end, or go on with one that was stopped and has a checkpoint. Its numbers
    stay, its weights do not; `measure` sees them before they go.

    Raises:
        RuntimeError: it failed; its output is in RUN.log.
    """
    before = spent()
    run.parent.mkdir(parents=True, exist_ok=True)
    if any((run / "checkpoints").glob("step-*")):
        words = [f"resume={run}"]
    else:
        shutil.rmtree(run, ignore_errors=True)
        words = [*words, f"run_dir={run}"]
    log = run.with_name(run.name + ".log")
    in_a_fork(log, command, words)
    if not is_done(run):
        raise RuntimeError(f"{run.name} did not train to its end; see {log}")
    if measure is not None:
        in_a_fork(log, measure, run)
    log.unlink()
    shutil.rmtree(run / "checkpoints")
    (run / "processor_seconds").write_text(str(spent() - before))


def in_a_fork(log: Path, function: Callable[..., None], *given: Any) -> None:
    """function(*given), whose output goes to `log`, in a fork: it has torch and DeepSpeed already,
    which cost as much as a short run.

    Raises:
        RuntimeError: it failed.
    """

    def call() -> None:
        with log.open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        function(*given)

    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"it ended with exit code {process.exitcode}; see {log}")


def command(words: list[str]) -> None:
    """launch.train in this process."""
    sys.argv = ["launch.train", *words]
    runpy.run_module("launch.train", run_name="__main__")


def read(run: Path) -> dict[str, float]:
    """Held-out loss at the end, training loss over the last tenth, the median speed, and what it
    cost, where it ran in one go.
    """
    result = json.loads((run / "result.json").read_text())
    records = [
        r
        for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "train/loss" in r
    ]
    late = [r["train/loss"] for r in records if r["step"] > 0.9 * result["step"]]
    speeds = [r["perf/tokens_per_second"] for r in records if r.get("perf/tokens_per_second")]
    cost = run / "processor_seconds"
    return {
        "val_loss": result["val_loss"],
        "train_loss": statistics.mean(late),
        "tokens_per_second": statistics.median(speeds),
        "tokens": result["tokens"],
        "processor_seconds": float(cost.read_text()) if cost.is_file() else 0.0,
    }


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95% interval."""
    number = len(differences)
    if number < 2:
        return differences[0], math.inf
    error = statistics.stdev(differences) / math.sqrt(number)
    return statistics.mean(differences), STUDENT.get(number, 2.0) * error


def spent() -> float:
    """Processor seconds of the runs that this process has trained."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def preload() -> None:
    """What runs import, before the first fork."""
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("launch.config.contradictions", "train.loop"):
        importlib.import_module(name)
    import_deepspeed()
