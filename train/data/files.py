"""Rows of data files: one column, read as a stream and typed as text; nothing else is looked at.

Formats: JSON lines (or an array, or objects over several lines), Parquet, CSV and plain text. All
but Parquet may be compressed (gzip, bzip2, xz, zstd, lz4) or packed (zip, tar): the first bytes say
how, not the name. Files are opened by their literal name. A row at a time stands in memory, of
Parquet a batch; a JSON file that does not hold JSON lines is read whole.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

from train.data.worker import doing

KINDS = ("json", "parquet", "csv", "text")
BUFFER_BYTES = 1 << 20
PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Format:
    """How the rows of a file are told apart."""

    kind: str
    """One of KINDS."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """For text: what one row is."""
    separator: str = ","
    """For csv."""


@dataclass(frozen=True)
class Odd:
    """A row without readable text, and why."""

    reason: str
    """In words."""
    is_null: bool = False
    """Whether the text is null rather than unreadable."""
    columns: tuple[str, ...] | None = None
    """What the row has, where the text column is not among them."""


class Row(NamedTuple):
    """One row of a file."""

    file: str
    """The file as messages name it."""
    number: int
    """From 1: the line for JSON lines, CSV and text by line, else the row."""
    text: str | Odd
    """Its text, or why it has none."""


Numbered = Iterator[tuple[int, str | Odd]]


class Meter:
    """How far the reading of files is, in bytes as they lie on disk."""

    def __init__(self) -> None:
        self.total: int | None = None
        """Bytes of all files; None where nobody knows."""
        self.number = 0
        """Of the file that is read, among those of its split."""
        self._finished = 0
        self._file: Any = None

    def begin(self, file: Any) -> None:
        """From now on this file is read; the one before is finished."""
        self.finish()
        self._file = file

    def finish(self) -> None:
        if self._file is not None:
            self._finished += os.stat(self._file.name).st_size
            self._file = None

    def skip(self, num_bytes: int) -> None:
        """So many more are read, by whoever else."""
        self._finished += num_bytes

    @property
    def position(self) -> int:
        if self._file is not None and self._file.closed:
            self.finish()
        if self._file is None:
            return self._finished
        return self._finished + int(self._file.tell())


def read_rows(path: str, form: Format, column: str, meter: Meter | None = None) -> Iterator[Row]:
    """Yield every row of a file in its order; archives in the order of their members.

    Raises:
        ValueError: the file cannot be read to its end; the message names it.
    """
    try:
        with doing(f"reading {path}"):
            yield from _rows_in(path, form, column, meter or Meter())
    except Exception as error:
        # of seven libraries, about a file that can hold anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        # zstd --long: the decoder's limit is the usual one
        if "too much memory" in reason:
            reason += "; compress it again with a window of at most 128 MiB (--long=27 or less)"
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _rows_in(path: str, form: Format, column: str, meter: Meter) -> Iterator[Row]:
    if form.kind == "parquet":
        for number, text in _parquet_rows(path, column, meter):
            yield Row(path, number, text)
        return
    for name, stream in streams(path, meter):
        for number, text in _rows_of(stream, form, column):
            yield Row(name, number, text)


def _rows_of(stream: io.BufferedReader, form: Format, column: str) -> Numbered:
    if form.kind == "json":
        return json_rows(stream, lambda value: _field(value, column))
    if form.kind == "csv":
        return _csv_rows(stream, column, form.separator)
    return _text_rows(stream, column, form.sample_by)


def as_text(value: Any, column: str) -> str | Odd:
    """A value of the text column, if it is text that UTF-8 can spell.

    Decoding with surrogateescape leaves bytes that are no UTF-8 as half surrogates, and JSON may
    spell half a pair.
    """
    if value is None:
        return Odd(f"{column!r} is null", is_null=True)
    if not isinstance(value, str):
        return Odd(f"{column!r} holds {type(value).__name__}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return Odd(f"{column!r} is not valid UTF-8 at character {error.start}")
    return value


# --- compression and archives ---------------------------------------------------------------------


def streams(path: str, meter: Meter) -> Iterator[tuple[str, io.BufferedReader]]:
    """Name and uncompressed bytes of the file, or of every member of an archive."""
    with open(path, "rb") as file:
        meter.begin(file)
        if file.peek(4).startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    if member.flag_bits & 1:
                        raise zipfile.BadZipFile(f"{member.filename} in it is encrypted")
                    if not member.is_dir() and _holds_data(member.filename):
                        with archive.open(member) as packed:
                            content: Any = io.BufferedReader(packed)
                            yield f"{path}/{member.filename}", _uncompressed(content)
            return
        stream = _uncompressed(file)
        head = stream.peek(512)
        if head[257:262] != b"ustar" or b"\0" not in head[:257]:
            yield path, stream
            return
        with tarfile.open(fileobj=stream, mode="r|") as unpacked:
            for entry in unpacked:
                if entry.isfile() and _holds_data(entry.name):
                    content = io.BufferedReader(unpacked.extractfile(entry))
                    yield f"{path}/{entry.name}", _uncompressed(content)


def _holds_data(member: str) -> bool:
    """Not one of the hidden files that archivers add (.DS_Store, __MACOSX/)."""
    return not any(part.startswith((".", "__")) for part in member.split("/") if part != ".")


def _uncompressed(stream: io.BufferedReader) -> io.BufferedReader:
    import pyarrow

    head = stream.peek(10)
    raw: Any
    if head.startswith(b"\x1f\x8b"):
        raw = gzip.GzipFile(fileobj=stream)
    elif head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        raw = bz2.BZ2File(stream)
    elif head.startswith(b"\xfd7zXZ\0"):
        raw = lzma.LZMAFile(stream)  # noqa: SIM115
    # A skippable frame (0x184D2A50 to 5F) leads what pzstd writes.
    elif head.startswith(b"\x28\xb5\x2f\xfd") or (
        head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50
    ):
        raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "zstd")
    elif head.startswith(b"\x04\x22\x4d\x18"):
        raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "lz4")
    else:
        return stream
    return io.BufferedReader(raw, BUFFER_BYTES)


# --- JSON -----------------------------------------------------------------------------------------

# Numbers of columns nobody reads may have more digits than Python makes an int of: any int will do.
_DECODER = json.JSONDecoder(parse_int=len, strict=False)
_SPACE = re.compile(r"[ \t\r\n]*")


def json_rows(
    stream: io.BufferedReader,
    field: Callable[[Any], str | Odd],
    decoder: json.JSONDecoder = _DECODER,
) -> Numbered:
    """Number and text of every value in a stream of JSON lines, of an array, or of objects over
    several lines.

    Args:
        field: from a value, or the Odd that it is, to its text.
    """
    begun = False
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.isspace() or not line:
            continue
        if not begun and (line.lstrip().startswith(b"[") or line.strip() == b"{"):
            # No JSON lines: an array, or objects over several lines.
            for place, value in enumerate(_json_values(line + stream.read(), decoder), 1):
                yield place, field(value)
            return
        begun = True
        for value in _json_values(line, decoder):
            yield number, field(value)


def _json_values(data: bytes, decoder: json.JSONDecoder) -> list[Any]:
    """The values one after another, those of arrays among them, or one Odd if any is broken."""
    text = data.decode("utf-8", "surrogateescape")
    found = []
    place = 0
    try:
        while (place := _end_of_space(text, place)) < len(text):
            value, place = decoder.raw_decode(text, place)
            found += value if isinstance(value, list) else [value]
    except (ValueError, RecursionError) as error:
        return [Odd(f"is not valid JSON ({error})")]
    return found


def _end_of_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None
    return match.end()


def _field(value: Any, column: str) -> str | Odd:
    if isinstance(value, Odd):
        return value
    if isinstance(value, dict):
        if column not in value:
            return Odd(f"has no {column!r}", columns=tuple(value))
        return as_text(value[column], column)
    if isinstance(value, str) and column == "text":  # an array of texts
        return as_text(value, column)
    return Odd(f"holds {type(value).__name__}, not an object")


# --- CSV and text ---------------------------------------------------------------------------------


def _csv_rows(stream: io.BufferedReader, column: str, separator: str) -> Numbered:
    """Every field is text as it stands: no dates, numbers or names of null are looked for."""
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than a document
    lines = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    # The line added at the end is a row of its own, [], unless quotes are still open there.
    rows = csv.reader(chain(lines, ["\n"]), delimiter=separator)
    header: list[str] = next(rows, [])
    if not header:
        return
    place = header.index(column) if column in header else None
    row: list[str] = []
    last = start = rows.line_num + 1
    for row in rows:
        if row and place is None:
            yield start, Odd(f"has no {column!r}", columns=tuple(header))
        elif row and place is not None:
            fits = place < len(row) <= len(header)
            yield (
                start,
                (
                    as_text(row[place], column)
                    if fits
                    else Odd(f"has {len(row)} fields, the header {len(header)}")
                ),
            )
        last, start = start, rows.line_num + 1
    if row:
        raise csv.Error(f"the quotes opened in the row at line {last} are never closed")


def _text_rows(stream: io.BufferedReader, column: str, sample_by: str) -> Numbered:
    # all line ends become \n
    lines = io.TextIOWrapper(stream, "utf-8", "surrogateescape")
    rows: Iterator[str]
    if sample_by == "document":
        rows = iter([lines.read()])
    elif sample_by == "paragraph":
        rows = _paragraphs(lines)
    else:
        rows = (line.removesuffix("\n") for line in lines)
    for number, text in enumerate(rows, 1):
        yield (
            number,
            (
                as_text(text, column)
                if column == "text"
                else Odd(f"has no {column!r}", columns=("text",))
            ),
        )


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    r"""The parts of text.split("\n\n") that are not empty, without holding the whole text."""
    pending: list[str] = []
    for line in lines:
        if line == "\n" and pending:
            if paragraph := "".join(pending).removesuffix("\n"):
                yield paragraph
            pending = []
        else:
            pending.append(line)
    if pending:
        yield "".join(pending)


# --- Parquet --------------------------------------------------------------------------------------


def _parquet_rows(path: str, column: str, meter: Meter) -> Numbered:
    import pyarrow.parquet

    # open(), for a name could be taken for an address; the buffer keeps row groups out of memory.
    with (
        open(path, "rb") as file,
        pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER_BYTES) as table,
    ):
        meter.begin(file)
        names = table.schema_arrow.names
        if column not in names:
            lacking = Odd(f"has no {column!r}", columns=tuple(names))
            yield from ((number, lacking) for number in range(1, table.metadata.num_rows + 1))
            return
        number = 0
        for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=[column]):
            for text in _parquet_texts(batch.column(column), column):
                number += 1
                yield number, text


def _parquet_texts(values: Any, column: str) -> Iterator[str | Odd]:
    """Texts of a column of strings or bytes. Of any other type only its nulls are told apart."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(values.type):
        values = values.dictionary_decode()

    # Bytes that are no UTF-8 would end the whole batch in pyarrow; decoded here they cost their row
    # alone.
    kind = values.type
    if any(
        is_kind(kind)
        for is_kind in (
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
        )
    ):
        for value in values.cast(pyarrow.large_binary()).to_pylist():
            text = None if value is None else value.decode("utf-8", "surrogateescape")
            yield as_text(text, column)
    else:
        other = Odd(f"{column!r} holds {kind}, not text")
        for is_valid in values.is_valid().to_pylist():
            yield other if is_valid else as_text(None, column)
