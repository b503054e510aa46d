"""The folder of a run's checkpoints: which are there, which are whole, which one is read, which may
go.

    checkpoints/step-00000100/     a whole checkpoint; written as .step-00000100.partial and renamed
    checkpoints/latest             name of the newest; for people and scripts: reading goes by what
                                   is there and whole
    checkpoints/best.json          {"checkpoint": name, "val_loss": nats, "sequences": held-out
                                   ones} of the lowest loss
    saved                          name of the first one. Whoever finds it and no checkpoint knows
                                   that the folder is gone, as with a disk that is not mounted

Everything here works on one rank. `latest` and `best.json` are hints: damaged ones are logged and
ignored.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.checkpoint.verification import Files, remember, split, unverified, verify, verify_alone
from train.files.durable import remove, sync_folder, write_json, write_text
from train.files.manifest import (
    MANIFEST,
    CheckpointError,
    NewerFormatError,
    check_format,
    content_damage,
    owned,
    read_json,
    read_manifest,
    require_owned,
    size_damage,
)

log = logging.getLogger("loadstone")
STEP = re.compile(r"step-(\d{8,18})")
REPLACED = ".replaced-{}"
NEEDED = ("state.json", "weights/.metadata")
SAVED = "saved"
READ = ("state.json", "config.yaml", "weights/**/*", "rng-*.json")
"""Patterns of what loading reads: the manifest must list every such file that is there."""


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def steps(folder: Path) -> list[str]:
    """Names of the checkpoint folders, oldest first, whole or not."""
    found = [
        path.name for path in folder.glob("step-*") if STEP.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda name: (len(name), name))


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step-"))


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in RUN/checkpoints, oldest first, whole or not. There are none where
    there is no such folder.
    """
    return [step_of(Path(name)) for name in steps(folder)]


# --- what is whole --------------------------------------------------------------------------------


def is_complete(checkpoint: Path) -> bool:
    """Whether every file is there with its size. Only names are looked at, so this is cheap."""
    try:
        files = read_manifest(checkpoint)
    except CheckpointError:
        return False
    return all(name in files for name in NEEDED) and size_damage(checkpoint, files) is None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file is listed and has its size
    and checksum.

    Everything is hashed, whatever was verified before.

    Raises:
        NewerFormatError: a later version wrote it.
    """
    return _damage(checkpoint, lambda files: content_damage(checkpoint, files))


def damage_since_verified(checkpoint: Path) -> str | None:
    """As `damage`, but files that were verified before and have not changed are not hashed again
    (verification.py).

    Raises:
        NewerFormatError: a later version wrote it.
    """
    return _damage(checkpoint, lambda files: verify_alone(checkpoint, files))


def damage_but_tensors(checkpoint: Path) -> tuple[str | None, Files, list[str]]:
    """Like `damage_since_verified`, but of the tensors' files only names and sizes are looked at.
    Also returns what the manifest lists, and the names of the tensors' files that have to be
    hashed.

    Raises:
        NewerFormatError: a later version wrote it.
    """
    listed: Files = {}
    names: list[str] = []

    def check_small(files: Files) -> str | None:
        small, shared = split(unverified(checkpoint, files))
        listed.update(files)
        names.extend(shared)
        outcome = verify(checkpoint, files, small)
        if outcome.damage is None:
            remember(checkpoint, files, [outcome])
        return outcome.damage

    return _damage(checkpoint, check_small), listed, names


def _damage(checkpoint: Path, content: Callable[[Files], str | None]) -> str | None:
    """What is wrong with a checkpoint, in a few words; None: nothing is.

    Args:
        content: says what is wrong with the content of the files that the manifest lists.
    """
    try:
        files = read_manifest(checkpoint)

        missing = next((name for name in NEEDED if name not in files), None)
        if missing is not None:
            return f"{MANIFEST} does not list {missing}"

        found = size_damage(checkpoint, files) or content(files) or _unlisted(checkpoint, files)
        if found is not None:
            return found

        # How many ranks wrote the checkpoint stands in its state, and each has left a file.
        from train.checkpoint.random_state import rng_file

        state = read_state(checkpoint)
        missing = next(
            (rng_file(rank) for rank in range(state["world_size"]) if rng_file(rank) not in files),
            None,
        )
        if missing is not None:
            return f"{MANIFEST} does not list {missing}"

    except NewerFormatError:
        raise
    except CheckpointError as error:
        return str(error)

    # A folder that was copied under another name would be taken for another step.
    if checkpoint.name == name_of(state["step"]):
        return None
    return f"it holds the state of step {state['step']}"


def _unlisted(checkpoint: Path, files: dict[str, dict[str, Any]]) -> str | None:
    for pattern in READ:
        for path in sorted(checkpoint.glob(pattern)):
            name = str(path.relative_to(checkpoint))
            if name not in files and not path.is_dir():
                return f"{name} is not listed in {MANIFEST}"
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint: "step", "world_size" and what the run saved with it.

    Raises:
        CheckpointError: it is damaged, or a later version wrote it.
    """
    state = read_json(checkpoint / "state.json")
    check_format(state, checkpoint)
    for key in ("format", "step", "world_size"):
        if type(state.get(key)) is not int:
            raise CheckpointError(
                f"{checkpoint}: state.json has no whole number {key!r}; use another checkpoint"
            )
    return state


def updates_of(state: dict[str, Any]) -> int:
    """How many updates a run's optimiser had made when this state.json was saved."""
    return int(state["step"]) - int(state.get("skipped_steps", 0))


def updates_before(state: dict[str, Any]) -> int:
    """How many updates the moments had behind them that the run began with (init.moments)."""
    return int(state.get("updates_before", 0))


# --- whether there must be one --------------------------------------------------------------------


class CheckpointsGoneError(CheckpointError):
    """The run has saved checkpoints, and none is there: beginning anew would throw its steps
    away.
    """


def remember_saved(run_dir: Path, name: str) -> None:
    if not (run_dir / SAVED).exists():
        write_text(run_dir / SAVED, name)


def begins_anew(run_dir: Path) -> bool:
    """Whether a restarted run has nothing to continue from, because it never came to its first
    checkpoint.

    Raises:
        CheckpointsGoneError: it did, and no checkpoint is there now.
    """
    folder = run_dir / "checkpoints"
    if any(folder.glob("step-*")):
        return False
    if not (run_dir / SAVED).exists():
        return True
    raise CheckpointsGoneError(
        f"{folder} holds no checkpoint, but the run has saved some (the first is named in "
        f"{run_dir / SAVED}): is a disk not mounted? Nothing is begun anew: put them back and "
        "resume, or start a new run in another directory"
    )


# --- which one is read ----------------------------------------------------------------------------


class NoSuchCheckpointError(CheckpointError):
    """A checkpoint that was asked for by its name is not there: the asker's slip, and no damage."""


def find_checkpoint(run_dir: Path, prefer: str = "latest") -> Path:
    """Find the newest complete and undamaged checkpoint of a run. Damaged ones are named in the log
    and passed over.

    prefer: "latest", "best", or a name, which stands for itself alone.

    Raises:
        CheckpointError: there is none, the folders belong to another user, or a later version wrote
            the newest.
    """
    reasons = []
    for checkpoint in candidates(run_dir, prefer):
        require_owned(checkpoint)
        found = damage_since_verified(checkpoint)
        if found is None:
            return checkpoint
        reasons.append(f"{checkpoint.name}: {found}")
        if checkpoint.name == prefer:
            raise CheckpointError(f"{checkpoint} is damaged ({found}); use another checkpoint")
        log.warning("checkpoint %s is damaged (%s); trying the one before", checkpoint, found)
    raise no_usable_checkpoint(run_dir, reasons)


def find_last(run_dir: Path, prefer: str, number: int) -> tuple[Path, ...]:
    """A checkpoint and those before it, `number` in all, the newest first. Damaged ones are named
    in the log and passed over.

    prefer: of the newest, as find_checkpoint.

    Raises:
        CheckpointError: as find_checkpoint. ValueError: there are fewer.
    """
    newest = find_checkpoint(run_dir, prefer)
    found = [newest]
    for step in reversed(saved_steps(newest.parent)):
        checkpoint = newest.parent / name_of(step)
        if len(found) == number:
            break
        if step >= step_of(newest):
            continue
        require_owned(checkpoint)
        damaged = damage_since_verified(checkpoint)
        if damaged is None:
            found.append(checkpoint)
        else:
            log.warning("checkpoint %s is damaged (%s) and is left out", checkpoint, damaged)
    if len(found) < number:
        names = ", ".join(checkpoint.name for checkpoint in reversed(found))
        raise ValueError(
            f"average={number} needs {number} whole checkpoints up to {newest.name}, and "
            f"{newest.parent} has {len(found)}: {names}; give average={len(found)} or less, a "
            f"later checkpoint, or train with checkpoint.keep_last={number}"
        )
    return tuple(found)


def candidates(run_dir: Path, prefer: str = "latest") -> list[Path]:
    """The checkpoints of a run in the order in which they are tried, whole or not. prefer:
    "latest", "best", or the name of the only one.

    Whoever reads one asks first whether it is ours.

    Raises:
        NoSuchCheckpointError: there is none of the name.
        CheckpointError: the folder they are in belongs to another user, or everybody can write it.
    """
    folder = run_dir / "checkpoints"
    names = steps(folder)[::-1]
    if names:
        require_owned(run_dir)
        require_owned(folder)
    if STEP.fullmatch(prefer):
        if prefer not in names:
            there = f"it has {', '.join(names[::-1])}" if names else _none_saved(run_dir)
            raise NoSuchCheckpointError(f"{folder} has no {prefer}; {there}")
        return [folder / prefer]
    _check_latest(folder)
    best = read_best(folder)
    if prefer == "best" and best:
        names = [best["checkpoint"], *(n for n in names if n != best["checkpoint"])]
    return [folder / name for name in names]


def no_usable_checkpoint(run_dir: Path, reasons: list[str]) -> CheckpointError:
    """reasons: "<name>: <damage>" of each that was tried."""
    why = f" ({'; '.join(reasons[:3])})" if reasons else f"; {_none_saved(run_dir)}"
    return CheckpointError(f"no usable checkpoint under {run_dir / 'checkpoints'}{why}")


def _none_saved(run_dir: Path) -> str:
    """Why there may be no checkpoint at all."""
    if not (run_dir / "config.yaml").is_file():
        return f"is {run_dir} a run directory of launch.train?"
    return (
        "the run has saved none yet: it does so at its end, when it is asked to stop, and every "
        "checkpoint.save_interval steps"
    )


def newest_complete(run_dir: Path) -> Path | None:
    """The checkpoint that a run would most likely go on from, by its files' names and sizes alone.
    None where none looks whole.
    """
    folder = run_dir / "checkpoints"
    return next((folder / name for name in steps(folder)[::-1] if is_complete(folder / name)), None)


def _check_latest(folder: Path) -> None:
    path = folder / "latest"
    try:
        name = path.read_bytes()[:100].decode(errors="replace").strip()
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s is ignored: it cannot be read (%s)", path, error.strerror)
        return
    if not STEP.fullmatch(name) or not (folder / name).is_dir():
        log.warning("%s is ignored: it names %r, which is no checkpoint here", path, name)


def read_best(folder: Path) -> dict[str, Any] | None:
    """Read best.json: the best checkpoint and its loss. None before there is one, or if the record
    is bad.
    """
    path = folder / "best.json"
    if not path.exists():
        return None
    try:
        best = read_json(path)
    except CheckpointError as error:
        log.warning("%s is ignored: %s", path, error)
        return None
    name, loss = best.get("checkpoint"), best.get("val_loss")
    if (
        not isinstance(name, str)
        or not STEP.fullmatch(name)
        or type(loss) not in (int, float)
        or loss != loss
    ):
        log.warning("%s is ignored: it names no checkpoint and loss", path)
        return None
    if not (folder / name).is_dir():
        log.warning("%s is ignored: %s is not there", path, name)
        return None
    return best


def set_newer_aside(checkpoint: Path) -> None:
    """Hide the checkpoints after the one a run goes on from (damaged ones), so that retention does
    not count them.
    """
    folder = checkpoint.parent
    for name in steps(folder):
        if (len(name), name) > (len(checkpoint.name), checkpoint.name):
            hidden = folder / f".passed-over-{name}"
            remove(hidden)
            (folder / name).rename(hidden)
            log.warning("%s was passed over and is now %s", name, hidden)
    if (folder / "best.json").exists() and read_best(folder) is None:
        remove(folder / "best.json")


# --- what is pointed at and what may go -----------------------------------------------------------


def point_latest(folder: Path, name: str) -> None:
    _make_way(folder / "latest")
    write_text(folder / "latest", name)


def point_best(folder: Path, name: str, val_loss: float, sequences: int | None = None) -> None:
    """sequences: how many held-out ones the loss is the mean over; None: not known."""
    _make_way(folder / "best.json")
    known = {} if sequences is None else {"sequences": sequences}
    write_json(folder / "best.json", {"checkpoint": name, "val_loss": val_loss, **known})


def _make_way(pointer: Path) -> None:
    if pointer.is_dir() and not pointer.is_symlink():
        log.warning("%s is a folder; it is replaced", pointer)
        remove(pointer)


def remove_old(folder: Path, keep_last: int, keep_best: bool) -> None:
    """Remove complete checkpoints but for the newest `keep_last` (at least one) and the best.

    Incomplete ones count for nothing and are left alone: what cannot be read now may be readable
    again later.
    """
    complete = [name for name in steps(folder) if is_complete(folder / name)]
    keep = set(complete[-max(1, keep_last) :])
    best = read_best(folder) if keep_best else None
    if best:
        keep.add(best["checkpoint"])
    for name in complete:
        if name not in keep:
            # a removal that is cut short leaves no half checkpoint
            doomed = folder / f".{name}.partial"
            (folder / name).rename(doomed)
            remove(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove what saves and removals that died have left. Nobody else writes here, as the run
    directory is locked.
    """
    for path in folder.glob(".step-*.partial"):
        if not path.is_symlink() and owned(path):
            remove(path)
    for path in folder.glob(REPLACED.format("*")):
        final = folder / path.name.removeprefix(REPLACED.format(""))
        if final.exists():
            remove(path)
        else:
            path.rename(final)


def put_in_place(scratch: Path, final: Path) -> None:
    """Give a whole checkpoint its name, durably. One of that name is removed once the new one
    stands in its place.
    """
    folder = final.parent
    replaced = folder / REPLACED.format(final.name)
    if final.exists():
        final.rename(replaced)
    scratch.rename(final)
    sync_folder(folder)
    remove(replaced)
