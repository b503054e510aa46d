"""Runs and checkpoints as people name them: `latest`, a pattern, a checkpoint's own folder.

Names become directories before anything else sees the command line, so that every rank, job of a
sweep and saved config holds the same ones.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.command.arguments import KEY, ArgumentError
from launch.config.overrides import quoted
from launch.process.identity import ROOT
from train.checkpoint.folder import STEP, name_of

RUNS = "runs"
"""Where runs are, unless their run_dir says otherwise."""
LATEST = "latest"
MAX_DEPTH = 6
"""Folders below which no run is looked for."""
LISTED = 5
"""Runs that a message names."""
READ_WHOLE = ("report", "dashboard", "audit", "place", "runs")
"""Commands that read a run and not one of its checkpoints."""
READ_CHECKPOINT = ("branch", "evaluate", "generate", "export", "serve", "benchmark", "quantize")
"""Commands that read one of them."""
NEED_A_RUN = (*READ_CHECKPOINT, "audit", "place")
"""Commands that can do nothing about one run that is not there."""
SEVERAL = ("evaluate", "report", "runs")
"""Commands whose `run` may be several."""
CHECKPOINT_OF = {
    "run": "checkpoint",
    "init.run": "init.checkpoint",
    "objective.run": "objective.checkpoint",
}
"""Setting of a run -> setting of its checkpoint."""
BEGUN = ("config.yaml", "metrics.jsonl", "result.json")
"""Files whose time says when a run was last at work."""


def resolved(command: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments with directories for names, and what to say about names that stood for one.

    Args:
        arguments: settings and options as they were typed.

    Raises:
        ArgumentError: a name stands for no run, or for several where one is meant.
    """
    found: list[str] = []
    notes: list[str] = []
    experiment = _experiment(arguments)
    on_several_nodes = any(a.startswith("launch.node_rank=") for a in arguments)
    for argument in arguments:
        match = KEY.fullmatch(argument)
        sign, key, value = match.groups() if match else ("", "", "")
        if sign != "~" and key in _keys(command, of_checkpoint=True):
            found.append(f"{sign}{key}={_checkpoints(value)}")
            continue
        is_name = sign != "~" and key in _keys(command) and value not in ("", "null")
        names = _typed_names(value) if is_name else None
        if names is None:
            found.append(argument)
            continue
        if on_several_nodes and any(Path(name).name == LATEST for name in names):
            raise ArgumentError(
                f"{key}={value} may be another run on each node; give the directory with "
                "launch.node_rank"
            )
        runs = [run for name in names for run in _runs_of(command, key, name, experiment)]
        several = key == "run" and command in SEVERAL
        if len(names) == 1 and (command in NEED_A_RUN or (command, key) == ("train", "resume")):
            _require_run(key, runs[0])
        if not several and len(runs) > 1:
            raise ArgumentError(f"{key}={value} are {len(runs)} runs, give one: {_listed(runs)}")
        if runs != names and command != "runs":
            notes.append(f"{key}={value}: {', '.join(runs)}")
        is_list = value.startswith("[") or len(runs) > 1
        found += _settings(command, sign, key, runs, is_list, arguments)
    if "resume=latest" in arguments:
        # It has said which runs `latest` is of; the run keeps its own.
        found = [argument for argument in found if not argument.startswith("experiment=")]
    return found, notes


def _require_run(key: str, path: str) -> None:
    """Raises ArgumentError where no directory has the name; of a checkpoint, its run's."""
    folder = Path(path).parent.parent if _is_checkpoint(path) else Path(path)
    if folder.is_dir():
        return
    close = difflib.get_close_matches(path, [LATEST], 1, 0.6)
    hint = f"did you mean {key}={LATEST}? " if close else ""
    what = "is a file, no run directory" if folder.is_file() else "does not exist"
    raise ArgumentError(
        f"{key}={path}: {folder} {what}; {hint}python -m launch.runs lists the runs"
    )


def _keys(command: str, of_checkpoint: bool = False) -> tuple[str, ...]:
    """Settings of a command that name a run, or a checkpoint of one."""
    if command in READ_CHECKPOINT:
        return ("checkpoint",) if of_checkpoint else ("run",)
    if command in READ_WHOLE:
        return () if of_checkpoint else ("run", "compare") if command == "audit" else ("run",)
    if of_checkpoint:
        return ("init.checkpoint", "objective.checkpoint")
    if command == "compare":  # whose resume is a comparison
        return ("init.run", "objective.run")
    return ("resume", "init.run", "objective.run")


def _settings(
    command: str, sign: str, key: str, runs: list[str], is_list: bool, arguments: list[str]
) -> list[str]:
    """Runs as settings; of one that is a checkpoint's folder, the run and the checkpoint."""
    if is_list:
        steps = [run for run in runs if _is_checkpoint(run)]
        if steps and command in READ_WHOLE:
            raise ArgumentError(_reads_whole(command, steps[0]))
        return [f"{sign}{key}=[{','.join(map(quoted, runs))}]"]
    (run,) = runs
    if not _is_checkpoint(run):
        return [f"{sign}{key}={_written(run)}"]

    folder, name = Path(run).parent.parent, Path(run).name
    if key == "resume":
        raise ArgumentError(
            f"resume={run}: a run goes on from its newest checkpoint, resume={folder}; to begin "
            f"another run with this one: init.run={folder} init.checkpoint={name}"
        )
    if key == "compare" or command in READ_WHOLE:
        raise ArgumentError(_reads_whole(command, run))
    other = CHECKPOINT_OF[key]
    given = [a.partition("=")[2] for a in arguments if a.lstrip("+").startswith(f"{other}=")]
    if any(_checkpoints(value) != name for value in given):
        raise ArgumentError(f"{key}={run} and {other}={given[0]} are two checkpoints; drop one")
    return [
        f"{sign}{key}={_written(str(folder))}",
        *([] if given else [f"{sign}{other}={name}"]),
    ]


def _reads_whole(command: str, run: str) -> str:
    return (
        f"{run} is a checkpoint, and launch.{command} reads a whole run; "
        f"give {Path(run).parent.parent}"
    )


def _written(name: str) -> str:
    # A name such as true or 5 would not be read as text.
    is_plain = "/" in name and all(c.isalnum() or c in "/._-" for c in name)
    return name if is_plain else quoted(name)


def _typed_names(value: str) -> list[str] | None:
    """The names in a value: a list's items, or itself; None: it is neither, or of a sweep."""
    if value[0] not in "['\"":
        return None if "," in value or value.startswith("${") else [value]
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed: Any = OverridesParser.create().parse_override(f"x={value}").value()
    except HydraException:
        # a folder's name with brackets in it
        return [value] if os.path.exists(os.path.expanduser(value)) else _loose_list(value)
    names = parsed if isinstance(parsed, list) else [parsed]
    texts = [str(getattr(name, "text", name)) for name in names]
    return texts if texts and all(texts) else None


def _loose_list(value: str) -> list[str] | None:
    """Items of a list that Hydra's grammar cannot read: patterns have characters of their own."""
    if not (value.startswith("[") and value.endswith("]")):
        return None
    return [item.strip().strip("'\"") for item in value[1:-1].split(",") if item.strip()]


def _checkpoints(value: str) -> str:
    """`step-250` and `250` are step-00000250."""
    return re.sub(
        r"(?<![\w-])(?:step-)?(\d{1,18})(?![\w-])", lambda found: name_of(int(found[1])), value
    )


# --- what a name stands for -----------------------------------------------------------------------


def _runs_of(command: str, key: str, name: str, experiment: str | None) -> list[str]:
    path = os.path.expanduser(name).rstrip("/") or name
    if Path(path).name == LATEST and not os.path.isdir(path):
        folder = str(Path(path).parent)
        if folder == ".":
            folder = RUNS if experiment is None else f"{RUNS}/{experiment}"
        newest = _newest_first(folder)
        if not newest:
            raise ArgumentError(f"{key}={name}: there is no run under {folder}")
        # Weights are asked for: a run that was refused or stopped before it saved any is none.
        if command in READ_CHECKPOINT or key in ("init.run", "objective.run"):
            newest = [run for run in newest if _has_checkpoint(run)] or newest
        return newest[:1]
    if glob.has_magic(path) and not os.path.lexists(path):
        matches = [match.rstrip("/") for match in glob.glob(path, recursive=True)]
        found = sorted(m for m in matches if _is_run(m) or _is_checkpoint(m))
        if command == "runs":  # folders of runs as well
            found = sorted({run for match in matches for run in runs_under(match)})
        if not found:
            raise ArgumentError(
                f"{key}={name}: no run matches"
                + (f"; {matches[0]} does, which is none" if matches else "")
            )
        return found

    # A folder of runs, where one of them was meant.
    holds_none = _is_run(path) or _is_checkpoint(path) or os.path.isdir(f"{path}/checkpoints")
    if os.path.isdir(path) and not holds_none:
        inside = list(_newest_first(path))
        if inside and command == "runs":
            return inside
        if inside:
            raise ArgumentError(
                f"{key}={name} is no run, but holds {len(inside)}; give {key}={path}/{LATEST} for "
                f"the newest, or one of {_listed(inside)}"
            )
    return [path]


def _is_run(path: str) -> bool:
    return os.path.isfile(f"{path}/config.yaml") and not STEP.fullmatch(Path(path).name)


def _is_checkpoint(path: str) -> bool:
    """RUN/checkpoints/step-..., whether it is there or not."""
    return STEP.fullmatch(Path(path).name) is not None and Path(path).parent.name == "checkpoints"


def _has_checkpoint(run: str) -> bool:
    return any(STEP.fullmatch(path.name) for path in Path(run, "checkpoints").glob("step-*"))


def runs_under(folder: str) -> Iterator[str]:
    """Run directories at or below a folder, in the order of their names."""
    top = folder.rstrip("/") or "/"
    depth = top.count("/")
    for place, folders, files in os.walk(top):
        if "config.yaml" in files:
            folders.clear()  # checkpoints have a config.yaml of their own
            yield place
        elif place.count("/") - depth >= MAX_DEPTH:
            folders.clear()
        folders.sort()


def _newest_first(folder: str) -> list[str]:
    return sorted(runs_under(folder), key=lambda run: (-last_at_work(run), run))


def last_at_work(run: str) -> float:
    """When a run last wrote something about itself, in seconds of the epoch; 0: nothing is there
    any more.
    """
    times = []
    for name in BEGUN:
        try:
            times.append(os.stat(f"{run}/{name}").st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


def _listed(runs: list[str]) -> str:
    return ", ".join(runs[:LISTED]) + (", ..." if len(runs) > LISTED else "")


def _experiment(arguments: list[str]) -> str | None:
    """The folder of the runs of an experiment: what experiment_name= or experiment= says."""
    given = dict(a.partition("=")[::2] for a in arguments if "=" in a)
    if name := given.get("experiment_name"):
        return name
    file = ROOT / "conf" / "experiment" / f"{given.get('experiment', '')}.yaml"
    if not file.is_file():
        return None
    named = re.search(r"^experiment_name:\s*([\w.-]+)", file.read_text(), re.M)
    return named[1] if named else None
