"""How far a long command is, on a terminal; silent where standard error is none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from launch.process.identity import rank

T = TypeVar("T")
Report = Callable[[str], None]


@contextmanager
def reading_bar() -> Iterator[tuple[Report, Callable[[Any], None]]]:
    """A function that prints a line, and one that shows a train.data.shards.make.Progress: share of
    the source's files, rates of text, documents and tokens, and the time that is left.
    """
    if not sys.stderr.isatty():
        yield print, lambda progress: None
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rates]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        transient=True,
    )
    tasks: dict[str, Any] = {}

    def show(progress: Any) -> None:
        if progress.source not in tasks:
            tasks[progress.source] = bar.add_task(
                f"tokenising {progress.source}", total=progress.total, rates=""
            )
        task = tasks[progress.source]
        seconds = max(bar.tasks[0].elapsed or 0.0, 1e-3)
        rates = (
            f"{progress.documents:,} documents  {progress.bytes / seconds / 1e6:.1f} MB/s  "
            f"{progress.tokens / seconds / 1e3:,.0f}k tokens/s"
        )
        bar.update(task, completed=progress.done, total=progress.total, rates=rates)

    with bar:
        yield lambda line: bar.console.print(line, markup=False, highlight=False), show


@contextmanager
def working(text: str) -> Iterator[None]:
    """A sign of life beside what is being done, for as long as it takes."""
    if not sys.stderr.isatty() or rank():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(escaped(text)):
        yield


def followed(items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar that says how many have been taken.

    Args:
        total: how many there are; None: nobody knows.
    """
    if not sys.stderr.isatty() or rank():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escaped(text), total=total)
        for item in items:
            yield item
            bar.advance(task)


def escaped(text: str) -> str:
    """Brackets in a path are no markup."""
    from rich.markup import escape

    return escape(text)
