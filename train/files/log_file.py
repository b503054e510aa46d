"""JSON-lines files of a run: one writer appends, a resume cuts the end off, and old records are
added up when the file grows beyond its limit.

A line is one record and begins with its step; steps never fall. Thinning merges neighbours among
the old records, those whose steps lie in the same stretch of a power of two of steps, so that what
was summed before stays in the sums after. A merged record has `records`, the number it stands for,
and the step and tokens of its last one: like every record it is about the steps since the record
before it. Merging goes on beside the file, a few records with every write, and its result takes the
file's place by a rename: a killed process leaves the one or the other whole. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from train.files.followed import followed
from train.files.strict_json import dumps
from train.files.thinning import KEEP, Thinning

log = logging.getLogger("loadstone")
Record = dict[str, Any]
MERGED = "records"
"""Key of a merged record: how many records it stands for."""
LINES, HURRY = 4, 64
"""Old records that are read with every write; and where the file is beyond its limit already."""
BLOCK = 1 << 18
"""Bytes read at once when a file is read from its end."""
_HEAD = re.compile(rb'\{"step": (\d+)[,}]')
_HEAD_BYTES = 64


class LogFile:
    """A file of records for one writer. Every record is with the operating system when write()
    returns.

    Args:
        resume_step: records after this step, and a line that a crash cut off, are dropped. None:
            what is there stays.
        max_bytes: the file is thinned so as to stay below; 0: it may grow for ever.
        merge: (the record that ended before `earlier` began, earlier, later) -> one record for
            both, or None where they cannot be merged. Without it the file is not thinned.
        whole: records that are kept as they are.
        borders: steps that a run may be resumed from; no record is merged across one, so that a
            resume loses nothing.
        made_again: records of the resumed step that are dropped as well, for they are written anew.

    Raises:
        OSError: the file cannot be written. An error of the thinning alone is logged, and the file
            goes on.
    """

    def __init__(
        self,
        path: Path,
        resume_step: int | None = None,
        max_bytes: int = 0,
        merge: Callable[[Record | None, Record, Record], Record | None] | None = None,
        whole: Callable[[Record], bool] = lambda record: False,
        borders: Callable[[], Iterable[int]] = lambda: (),
        made_again: Callable[[Record], bool] = lambda record: False,
    ):
        self.path, self.max_bytes = path, max_bytes
        self._merge = merge
        self._whole = whole
        self._borders = borders

        self._thinning = Thinning(path, max_bytes)

        # A run that begins, or resumes from its beginning, has no records to lose.
        if resume_step is not None and resume_step > 0 and not path.exists():
            log.warning(
                "%s is gone: its records up to step %d are lost, the run goes on", path, resume_step
            )
        if resume_step is not None and path.is_file():
            cut_after(path, resume_step, made_again)

        self._file: IO[bytes] | None = None

    def open(self) -> LogFile:
        """Make the file now and not with the first record."""
        if self._file is None:
            self._file = self.path.open("ab")
        return self

    def write(self, record: Record) -> None:
        """Append a record; floats that are not finite become null."""
        file = self.open()._file
        assert file is not None
        again = followed(file, self.path)
        if again is not file:
            self._thinning.give_up()  # of a file that is no longer there
            file = self._file = again
        file.write(_line(record))
        file.flush()
        if self._merge is not None:
            size = file.tell()
            pieces = LINES if size <= self.max_bytes else HURRY
            self._thinning.go_on(size, self._merging, pieces)

    def close(self) -> None:
        self._thinning.give_up()
        if self._file is not None:
            self._file.close()

    def _merging(self) -> Generator[None]:
        """One thinning, an old record at a time; at the end it is in place."""
        assert self._merge is not None

        end, stretch = _old_part(self.path, self.max_bytes)
        borders = sorted(self._borders())
        before: Record | None = None
        held: Record | None = None
        place: tuple[int, int] | None = None

        with self.path.open("rb") as source, self._thinning.scratch.open("wb") as target:
            while source.tell() < end:
                record = parsed(source.readline())
                if record is not None:
                    # Records are merged within a stretch of steps, and never across a border.
                    step = record["step"]
                    here = (-(-step // stretch), bisect_left(borders, step))
                    whole = self._whole(record)
                    merged = None
                    if held is not None and here == place and not whole:
                        merged = self._merge(before, held, record)

                    if held is not None and merged is None and not (whole and here == place):
                        target.write(_line(held))
                        before, held = held, None

                    if whole:
                        target.write(_line(record))
                    elif held is not None and merged is not None:
                        held = _marked(merged, held.get(MERGED, 1) + record.get(MERGED, 1))
                    else:
                        held, place = record, here
                yield

            # Newer records follow as they are; the new file takes the old one's name when it is
            # complete.
            if held is not None:
                target.write(_line(held))
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
            self._thinning.size_after = target.tell()

        file = self._file
        self._thinning.scratch.replace(self.path)
        self._file = self.path.open("ab")
        if file is not None:
            file.close()


def _old_part(path: Path, max_bytes: int) -> tuple[int, int]:
    """Where the newest records begin (bytes), and over how many steps the older ones are to be
    merged, a power of two.
    """
    newest = path.stat().st_size - KEEP * max_bytes
    end = number = 0
    first: int | None = None
    last = 0
    with path.open("rb") as file:
        for line in file:
            if end + len(line) > newest:
                break
            end, number = end + len(line), number + 1
            if (step := step_of_line(line)) is not None:
                first, last = step if first is None else first, step
    kept = max(1.0, KEEP * max_bytes * number / max(1, end))
    stretch = 1
    while first is not None and (last - first + 1) / stretch > kept:
        stretch *= 2
    return end, stretch


# --- merging --------------------------------------------------------------------------------------

MEANS = ("train/loss", "moe/expert_flops_per_token")
"""Metrics that a merged record has the mean of, weighted by tokens."""


def merge_metrics(before: Record | None, earlier: Record, later: Record) -> Record:
    """The later record, with the MEANS over the tokens of both: FLOPs that were spent stay in the
    sum.
    """
    start = 0 if before is None else before.get("tokens", 0)
    middle, end = earlier.get("tokens", 0), later.get("tokens", 0)
    merged = {key: value for key, value in later.items() if key != MERGED}
    for key in MEANS:
        one, two = earlier.get(key), later.get(key)
        if one is None:
            continue
        merged[key] = (
            one
            if two is None or end <= start
            else one + (two - one) * (end - middle) / (end - start)
        )
    return merged


def is_evaluation(record: Record) -> bool:
    """Whether a record of metrics.jsonl is one of an evaluation: rare, and each is a result."""
    return any(key.startswith("eval/") for key in record)


TABLES = ("counts", "k_histogram", "reasons")


def merge_routing(_before: Record | None, earlier: Record, later: Record) -> Record | None:
    """Sums of the tables, exact; None where they are of another shape. Rows may have become
    longer.
    """
    merged = {key: value for key, value in later.items() if key != MERGED}
    for key in TABLES:
        one, two = earlier.get(key), later.get(key)
        if one is None and two is None:
            continue
        if one is None or two is None or len(one) != len(two):
            return None
        if key == "counts" and [len(row) for row in one] != [len(row) for row in two]:
            return None
        merged[key] = [_sum(a, b) for a, b in zip(one, two, strict=True)]
    return merged


def _marked(merged: Record, number: int) -> Record:
    """With the number of records it stands for near its beginning."""
    head: Record = {key: merged[key] for key in ("step", "tokens") if key in merged}
    return {
        **head,
        MERGED: number,
        **{key: value for key, value in merged.items() if key not in head},
    }


def _sum(one: list[int], two: list[int]) -> list[int]:
    short, long = sorted((one, two), key=len)
    return [a + b for a, b in zip(short, long, strict=False)] + long[len(short) :]


# --- lines ----------------------------------------------------------------------------------------


def _line(record: Record) -> bytes:
    return dumps(record).encode() + b"\n"


def parsed(line: bytes) -> Record | None:
    """The record of a whole line; None for anything else, as a line that a crash cut off."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def step_of_line(line: bytes) -> int | None:
    """The step of a line or of its first 64 bytes; of a line that does not begin with its step only
    the whole tells.
    """
    if (head := _HEAD.match(line)) is not None:
        return int(head[1])
    record = parsed(line)
    return None if record is None else record["step"]


def cut_after(
    path: Path, step: int, made_again: Callable[[Record], bool] = lambda record: False
) -> None:
    """Drop what comes after the last whole record of that step or an earlier one that is not made
    again. Reads from the end as far as needed; memory holds a block or a line.
    """
    with path.open("r+b") as file:
        for start, end in _lines_from_end(file):
            file.seek(start)
            head = _HEAD.match(file.read(min(_HEAD_BYTES, end - start)))
            if head is not None and int(head[1]) > step:
                continue
            file.seek(start)
            record = parsed(file.read(end - start))
            if record is not None and record["step"] <= step and not made_again(record):
                file.truncate(end)
                return
        file.truncate(0)


def _lines_from_end(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(start, end) of the lines that end in a newline, the last one first."""
    end = None
    stop = file.seek(0, os.SEEK_END)
    while stop > 0:
        base = max(0, stop - BLOCK)
        file.seek(base)
        block = file.read(stop - base)
        at = len(block)
        while (at := block.rfind(b"\n", 0, at)) >= 0:
            if end is not None:
                yield base + at + 1, end
            end = base + at + 1
        stop = base
    if end is not None:
        yield 0, end
