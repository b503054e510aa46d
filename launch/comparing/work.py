"""Running the cells: each is launch.train in a process of its own, and what became of it is on disk
before the next begins, so that a comparison that was killed goes on where it stood.

    DIR/compare.json           what is compared
    DIR/runs/CELL/             run directories
    DIR/outcomes/CELL.json     done, failed or interrupted, seconds, and the last lines of a failure
    DIR/logs/CELL.log          what its command printed
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.comparing.grid import Cell, directory_of
from launch.config.overrides import plain, quoted
from launch.process.children import last_lines, run_child
from launch.process.exits import IN_USE
from launch.process.secrets import redact
from launch.saved.configs import load_run_config
from launch.saved.files import read_result
from launch.saved.resume import OF_THE_COMMAND, flat, shown
from train.checkpoint.folder import newest_complete
from train.files.durable import write_json


@dataclass(frozen=True)
class Outcome:
    """Of a cell so far."""

    state: str
    """done, failed, interrupted."""
    seconds: float
    """At work, over all attempts."""
    code: int = 0
    """Of its command, where it failed; below 0: the signal that ended it."""
    lines: tuple[str, ...] = ()
    """The last ones that a failed command printed."""


def outcome_of(folder: Path, cell: Cell) -> Outcome | None:
    """What is known of a cell; None: it has not begun, or its record is damaged."""
    path = folder / "outcomes" / f"{cell.name}.json"
    try:
        found = json.loads(path.read_bytes())
        outcome = Outcome(
            str(found["state"]),
            float(found["seconds"]),
            int(found["code"]),
            tuple(map(str, found["lines"])),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        outcome = None
    # The run itself says whether it has ended: the record may be lost, or of an earlier attempt.
    if has_ended(directory_of(folder, cell), cell.run.train.num_steps):
        return Outcome("done", outcome.seconds if outcome else 0.0)
    if outcome is not None and outcome.state == "done":
        return Outcome("interrupted", outcome.seconds)
    return outcome


def has_ended(run_dir: Path, num_steps: int) -> bool:
    """Whether a run has done all its steps and been evaluated."""
    result = read_result(run_dir)
    return result is not None and result.get("step") == num_steps and not result.get("stopped")


def run_cell(folder: Path, cell: Cell) -> Outcome:
    """Train a cell to its end, from its newest checkpoint where it has one.

    Raises:
        ValueError: another process works on it. KeyboardInterrupt: asked to stop; the run has saved
            then.
    """
    run_dir, before = directory_of(folder, cell), outcome_of(folder, cell)
    spent = before.seconds if before is not None else 0.0
    if (run_dir / "config.yaml").is_file() and newest_complete(run_dir) is None:
        _put_aside(folder, run_dir)
    if (run_dir / "config.yaml").is_file():
        arguments = [f"resume={quoted(run_dir)}"]
    else:
        arguments = [*cell.overrides, f"run_dir={quoted(run_dir)}"]

    log = folder / "logs" / f"{cell.name}.log"
    for path in (log, folder / "outcomes" / "x", run_dir):
        path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        code = run_child([sys.executable, "-m", "launch.train", *arguments], log)
    except KeyboardInterrupt:
        seconds = spent + time.monotonic() - started
        _keep(folder, cell, Outcome("interrupted", seconds))
        raise
    seconds = spent + time.monotonic() - started

    if code == IN_USE:
        raise ValueError(f"{run_dir} is at work in another process; wait for it, or end it")
    if has_ended(run_dir, cell.run.train.num_steps):  # whatever came after its last evaluation
        outcome = Outcome("done", seconds)
    elif code == 0:  # asked to stop by somebody
        outcome = Outcome("interrupted", seconds)
    else:
        outcome = Outcome("failed", seconds, code, last_lines(log))
    _keep(folder, cell, outcome)
    return outcome


def _put_aside(folder: Path, run_dir: Path) -> None:
    """A run without any checkpoint begins anew; what it left stays to be looked at."""
    aside = folder / "begun"
    aside.mkdir(exist_ok=True)
    number = sum(1 for _ in aside.iterdir())
    run_dir.rename(aside / f"{run_dir.name}-{number}")


def _keep(folder: Path, cell: Cell, outcome: Outcome) -> None:
    write_json(folder / "outcomes" / f"{cell.name}.json", asdict(outcome))


def changed(folder: Path, cells: Sequence[Cell]) -> list[str]:
    """Settings that differ between a run that is there and what its cell is now: files under conf/
    may have changed, or the steps with them.
    """
    found = []
    for cell in cells:
        path = directory_of(folder, cell) / "config.yaml"
        if not path.is_file():
            continue
        before, now = _settings(plain(load_run_config(path))), _settings(plain(cell.config))
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if keys:
            key = keys[0]
            found.append(
                f"{cell.name} was run under {key}={shown(before.get(key))} and is "
                f"{shown(now.get(key))} now"
                + (f" (and {len(keys) - 1} other settings)" if len(keys) > 1 else "")
            )
    return found


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat(redact(config)).items()
        if key not in OF_THE_COMMAND and not key.startswith("launch.env")
    }
