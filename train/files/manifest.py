"""Folders whose files are written durably, listed with size and checksum, and read only when they
are ours and whole.

    manifest.json
        {"format": FORMAT, "files": {"<path inside the folder>": {"size": bytes, "sha256": hex}}}

Knows nothing about tensors or ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT = 3
"""Of checkpoints. 1: an entry per expert; 2: experts stacked (expert_stacks.py); 3: small tensors
packed too (packs.py). All are read.
"""
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, not ours or of another model; the message says which and
    why.
    """


class NewerFormatError(CheckpointError):
    """A later version wrote it: not damage, so no older checkpoint takes its place."""


def file_facts(path: Path) -> dict[str, Any]:
    """{"size": bytes, "sha256": hex} of a file."""
    with path.open("rb") as file:
        return {
            "size": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def owned(path: Path) -> bool:
    """Whether the effective user owns what the path leads to; nothing of others is read, root's
    included.
    """
    return path.stat().st_uid == os.geteuid()


def require_owned(path: Path) -> None:
    """
    Raises:
        CheckpointError: the path does not exist, belongs to another user, or can be written by
            everybody.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if facts.st_uid != os.geteuid():
        raise CheckpointError(
            f"{path} belongs to user {facts.st_uid}, this is user "
            f"{os.geteuid()}: nothing is loaded from folders of others; if "
            f"you trust it, copy it (cp -r) or chown -R {os.geteuid()} it"
        )
    if facts.st_mode & stat.S_IWOTH:
        raise CheckpointError(
            f"{path} can be written by everybody (mode {stat.S_IMODE(facts.st_mode):o}), so it may "
            f"hold anything; if you trust what is in it, chmod -R o-w {path}"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path.name} is missing")
        data = json.loads(path.read_bytes())
    except (OSError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read ({type(error).__name__})") from error
    except CheckpointError:
        raise
    except ValueError as error:  # no JSON, or no text at all
        raise CheckpointError(f"{path.name} is no JSON") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} holds a {type(data).__name__} instead of an object")
    return data


def check_format(record: dict[str, Any], folder: Path) -> None:
    """
    Raises:
        NewerFormatError: a later version wrote the record.
        CheckpointError: its "format" is no format of ours.
    """
    number = record.get("format", FORMAT)
    if type(number) is not int or number < 1:
        raise CheckpointError(
            f"{folder}: the format is {str(number)[:40]!r}, which no version has written"
        )
    if number > FORMAT:
        raise NewerFormatError(
            f"{folder} has format {number}, this version reads up to format "
            f"{FORMAT}: use a version of Loadstone that reads format "
            f"{number}, or resume from a copy without this checkpoint"
        )


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Path inside the folder -> size and checksum.

    Raises:
        CheckpointError: there is no manifest, it does not look like one of ours, or a later version
            wrote it.
    """
    manifest = read_json(folder / MANIFEST)
    check_format(manifest, folder)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{MANIFEST} lists no files")
    for name, facts in files.items():
        inside = PurePosixPath(name)
        is_record = (
            isinstance(facts, dict)
            and isinstance(facts.get("size"), int)
            and isinstance(facts.get("sha256"), str)
        )
        if not is_record or inside.is_absolute() or ".." in inside.parts or not name.isprintable():
            raise CheckpointError(f"{MANIFEST} has a damaged entry {name[:80]!r}")
    return files


def size_damage(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """The first listed file that is missing or has another size; None: there is none."""
    for name, facts in files.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if size != facts["size"]:
            return f"{name} has {size} bytes instead of {facts['size']}"
    return None


def content_damage(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """The first listed file whose content is not what was written; None: all are whole."""
    for name, facts in files.items():
        try:
            checksum = file_facts(folder / name)["sha256"]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if checksum != facts["sha256"]:
            return f"{name} has another checksum"
    return None
