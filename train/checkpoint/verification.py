"""Whether the files of a checkpoint are what was written: hashed by all ranks together, and not
again while unchanged.

    checkpoints/step-00000100/verified.json
        {"<path inside the folder>": {"sha256": hex, "time": seconds since 1970 of the hashing,
                                      "file": [inode, bytes, mtime_ns, ctime_ns]}}

A file counts as unchanged while the manifest names the same SHA-256 and inode, size and both times
are the same, for MAX_AGE_SECONDS. What that rests on: the file system gives a file another ctime
whenever its content, name or times are changed through it, and no program can set a ctime. What it
gives up for that day: what changes the disk below the file system (a failing drive, a restored
image), a clock set back to the very nanosecond, and network file systems that do not keep ctimes.
Copies are other files and are hashed. Who deletes the record has everything hashed again.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.files.durable import write_json
from train.files.manifest import CheckpointError, file_facts, read_json

RECORD = "verified.json"
MAX_AGE_SECONDS = 24 * 3600
SETTLED_NS = 2 * 10**9
"""A file changed less than this before it was hashed is not recorded: one more change might get the
same times.
"""
MAX_THREADS = 8
SHARED = re.compile(r"weights/__(\d+)_(\d+)\.distcp")
"""Tensors, which ranks verify together; all other files are small."""

Files = dict[str, dict[str, Any]]


@dataclass
class Outcome:
    """What the check of a checkpoint's files has found."""

    damage: str | None = None
    """The first file that is not what was written, in a few words; None: all are whole."""
    known: Files = field(default_factory=dict)
    """What may be recorded as checked."""


def unverified(folder: Path, files: Files) -> list[str]:
    """Names of those listed files that have to be hashed, in the manifest's order."""
    record = read_record(folder)
    return [
        name
        for name, facts in files.items()
        if not _is_unchanged(folder / name, facts, record.get(name))
    ]


def split(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Small files, and those that ranks share out, in the order of the ranks that wrote them."""
    small: list[str] = []
    shared: list[tuple[int, int, str]] = []
    for name in names:
        if match := SHARED.fullmatch(name):
            shared.append((int(match[1]), int(match[2]), name))
        else:
            small.append(name)
    return small, [name for *_, name in sorted(shared)]


def share(names: list[str], rank: int, world_size: int) -> list[str]:
    """What one rank hashes. With as many ranks as wrote the files it is the rank's own, which it
    also loads.
    """
    return names[rank::world_size]


def verify(folder: Path, files: Files, names: list[str], threads: int = 1) -> Outcome:
    """Hash the named files, several at a time; the work is outside the interpreter's lock."""
    with ThreadPoolExecutor(max(1, min(threads, MAX_THREADS, len(names)))) as pool:
        results = list(pool.map(lambda name: _verify(folder, name, files[name]["sha256"]), names))
    damage = next((found for found, _ in results if found is not None), None)
    known = {
        name: known for name, (_, known) in zip(names, results, strict=True) if known is not None
    }
    return Outcome(damage, known)


def verify_alone(folder: Path, files: Files) -> str | None:
    """The first listed file that is not what was written; on one rank, with the record. None: all
    are whole.
    """
    outcome = verify(folder, files, unverified(folder, files), os.cpu_count() or 1)
    if outcome.damage is None:
        remember(folder, files, [outcome])
    return outcome.damage


# --- the record -----------------------------------------------------------------------------------


def read_record(folder: Path) -> Files:
    """What was verified before; empty when there is no record or it is none of ours."""
    try:
        record = read_json(folder / RECORD)
    except CheckpointError:
        return {}
    return {name: known for name, known in record.items() if isinstance(known, dict)}


def remember(folder: Path, files: Files, outcomes: list[Outcome]) -> None:
    """Record what was hashed, beside what the record holds already. A folder that cannot be written
    goes without.
    """
    new = {name: known for outcome in outcomes for name, known in outcome.known.items()}
    if new:
        old = {name: known for name, known in read_record(folder).items() if name in files}
        with contextlib.suppress(OSError, ValueError):
            write_json(folder / RECORD, {**old, **new})


def _is_unchanged(path: Path, facts: dict[str, Any], known: dict[str, Any] | None) -> bool:
    if (
        known is None
        or known.get("sha256") != facts["sha256"]
        or type(known.get("time")) not in (int, float)
    ):
        return False
    try:
        return 0 <= time.time() - known["time"] < MAX_AGE_SECONDS and known.get(
            "file"
        ) == _identity(path)
    except OSError:
        return False


def _identity(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def _verify(folder: Path, name: str, checksum: str) -> tuple[str | None, dict[str, Any] | None]:
    """What is wrong with a file, and what to record of it."""
    path, now = folder / name, time.time()
    try:
        before = _identity(path)
        if file_facts(path)["sha256"] != checksum:
            return f"{name} has another checksum", None
        settled = before[-1] < now * 1e9 - SETTLED_NS and before == _identity(path)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})", None
    return None, {"sha256": checksum, "time": now, "file": before} if settled else None
