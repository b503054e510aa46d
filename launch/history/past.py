"""A run in a line: how it ended, its last numbers, what somebody wrote about it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.command.run_names import last_at_work
from launch.config.overrides import plain
from launch.process.secrets import redact
from launch.saved.configs import load_run_config
from launch.saved.files import read_result
from launch.saved.resume import flat
from train.files.durable import write_json
from train.files.log_file import parsed
from train.rank.lock import NAME, STALE_SECONDS

NOTES = "notes.json"
TAIL_BYTES = 1 << 18
"""Of metrics.jsonl, from the end: where the last numbers of a run are looked for."""
SHORT = {
    "val_loss": "eval/val_loss",
    "train_loss": "train/loss",
    "bits_per_byte": "eval/bits_per_byte",
    "tokens_per_second": "perf/tokens_per_second",
}
"""Column -> the metric that it is, where result.json does not say."""
OWN = ("state", "step", "tokens", "time", "when", "tags", "note")


@dataclass(frozen=True)
class Past:
    """What is known of a run; its config is read when it is first asked for."""

    directory: str
    state: str
    """ended, stopped, running, broken off."""
    time: float
    """When it was last at work, in seconds of the epoch."""
    result: dict[str, Any]
    """Of result.json; {} where there is none."""
    metrics: dict[str, Any]
    """The newest value of every metric in the last records."""
    tags: tuple[str, ...]
    note: str | None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved config, without secrets.

        Raises:
            ValueError: it is damaged.
        """
        config = load_run_config(Path(self.directory) / "config.yaml")
        return dict(redact(plain(config)))

    @property
    def when(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.time)) if self.time else "-"

    def value(self, name: str) -> Any:
        """A column, a metric, or a setting by its dotted key; None: the run does not have it."""
        if name == "step":
            return max(self.result.get("step") or 0, self.metrics.get("step") or 0)
        if name == "tags":
            return " ".join(self.tags) or None
        if name in OWN and name != "tokens":
            return getattr(self, name)
        newest = self.metrics.get(SHORT.get(name, name))
        if newest is not None and not (name == "tokens_per_second" and self.result.get(name)):
            return newest
        if self.result.get(name) is not None:
            return self.result[name]
        return self._flat.get(name)

    @cached_property
    def _flat(self) -> dict[str, Any]:
        return flat(self.settings)

    def names(self) -> Iterable[str]:
        """All that `value` knows."""
        return {*OWN, *SHORT, *self.result, *self.metrics, *self._flat}

    def facts(self, columns: Sequence[str]) -> dict[str, Any]:
        """As JSON, for scripts."""
        names = ("step", "tokens", *SHORT, "best_val_loss", *columns)
        return {
            "run_dir": self.directory,
            "state": self.state,
            "time": self.time,
            **{name: self.value(name) for name in names},
            "tags": list(self.tags),
            "note": self.note,
        }


def read_past(directory: str) -> Past:
    """Read a run directory.

    Raises:
        FileNotFoundError: it is none.
    """
    folder = Path(directory)
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{folder / 'config.yaml'} does not exist; give a run directory of launch.train, or a "
            "folder of such"
        )
    result = read_result(folder) or {}
    tags, note = _notes(folder)
    return Past(
        directory,
        _state(folder, result),
        last_at_work(directory),
        result,
        newest_metrics(folder / "metrics.jsonl"),
        tags,
        note,
    )


def _state(folder: Path, result: dict[str, Any]) -> str:
    try:
        age = time.time() - (folder / NAME).stat().st_mtime
    except OSError:
        age = STALE_SECONDS
    if age < STALE_SECONDS:
        return "running"
    if not result:
        return "broken off"
    return "stopped" if result.get("stopped") else "ended"


def newest_metrics(path: Path) -> dict[str, Any]:
    """The last value of every number in the last records of a log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return {}
    found: dict[str, Any] = {}
    # the first one was cut by the place where reading began
    for line in lines[1 if size > TAIL_BYTES else 0 :]:
        if (facts := parsed(line)) is not None:
            found |= {key: v for key, v in facts.items() if isinstance(v, (int, float))}
    return found


# --- what somebody wrote about it -----------------------------------------------------------------


def _notes(folder: Path) -> tuple[tuple[str, ...], str | None]:
    """Tags and the note; a damaged file says nothing."""
    try:
        facts = json.loads((folder / NOTES).read_bytes())
    except (OSError, ValueError, RecursionError):
        return (), None
    if not isinstance(facts, dict):
        return (), None
    tags, note = facts.get("tags"), facts.get("note")
    texts = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    return tuple(texts), note if isinstance(note, str) and note else None


def annotate(run: Past, add: Iterable[str], remove: Iterable[str], note: str | None) -> None:
    """Write RUN/notes.json, and keep the record as it is now.

    Args:
        note: None: leave it; "": take it away.

    Raises:
        ValueError: the directory cannot be written.
    """
    left = [tag for tag in dict.fromkeys([*run.tags, *add]) if tag not in set(remove)]
    kept = run.note if note is None else note or None
    try:
        write_json(Path(run.directory) / NOTES, {"tags": left, "note": kept})
    except OSError as error:
        raise ValueError(f"{run.directory}/{NOTES} cannot be written: {error.strerror}") from error
    object.__setattr__(run, "tags", tuple(left))
    object.__setattr__(run, "note", kept)
