"""The file of answers: appended one by one, so that a restart goes on behind the last one."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from train.files.durable import write_text
from train.files.strict_json import dumps


class AnswerFile:
    """Lines of JSON, whole or not there: what a kill has left of a line is cut off when the file is
    opened again, and an answer that is there is not written twice.

    The settings that it was written under stand beside it, in NAME.settings.json.

    Attributes:
        done: ids of the answers that are there.

    Raises:
        ValueError: the file was written under other settings, or is no file of answers.
        OSError: the file cannot be written, e.g. because the disk is full. What was written before
            is whole.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.done = path, set[str]()
        self._file: BinaryIO | None = None
        beside = path.with_name(path.name + ".settings.json")
        text = dumps(settings, indent=1)
        if path.is_file() and path.stat().st_size:
            before = json.loads(beside.read_text()) if beside.is_file() else None
            changed = _changed(before, json.loads(text))
            if changed:
                raise ValueError(
                    f"output={path} holds answers under other settings ({changed}); give another "
                    "output, or the same settings to go on"
                )
            self._read()
        elif path.is_file() or not path.exists():
            write_text(beside, text)
        self._file = path.open("ab")

    def _read(self) -> None:
        """Note the ids, and cut off what follows the last whole line."""
        whole = 0
        with self.path.open("rb+") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    self.done.add(str(json.loads(raw)["id"]))
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(
                        f"output={self.path}: line {number} is no answer of this command; give "
                        "another output"
                    ) from error
                whole += len(raw)
            file.truncate(whole)

    def append(self, answer: dict[str, Any]) -> None:
        """One line, with the operating system when this returns.

        Raises:
            OSError: it could not be written; the message says which file, and how to go on.
        """
        assert self._file is not None
        try:
            self._file.write(dumps(answer, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            why = (
                f"{error.strerror}; mend that, and the same command goes on behind the last answer"
            )
            raise OSError(error.errno, why, str(self.path)) from error
        self.done.add(str(answer["id"]))

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        try:
            self._file.close()  # writes again what a full disk refused
        except OSError:
            if error is None:
                raise


def _changed(before: dict[str, Any] | None, now: dict[str, Any]) -> str:
    """What differs, as `key was (now is)`; empty: nothing."""
    if before is None:
        return "its settings file is gone"
    return ", ".join(
        f"{key} {before.get(key)!r} (now {now.get(key)!r})"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    )
