"""Progress of long commands: a bar on a terminal, nothing anywhere else."""

from __future__ import annotations

import io
import sys

from launch.command.progress import followed, reading_bar, working
from train.data.shards.make import Progress

HALF = Progress("corpus", done=500, total=1000, documents=1234, tokens=10**6, bytes=4 * 10**6)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch, stream: io.StringIO, progress: Progress) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with reading_bar() as (report, show):
        show(progress)
        report("a line [of] text")
    return stream.getvalue()


def test_nothing_but_the_lines_is_seen_where_standard_error_is_no_terminal(monkeypatch, capsys):
    assert shown(monkeypatch, io.StringIO(), HALF) == ""
    assert capsys.readouterr().out == "a line [of] text\n"


def test_a_terminal_shows_share_and_rates(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    seen = shown(monkeypatch, Terminal(), HALF)
    assert "corpus" in seen and "50%" in seen and "1,234 documents" in seen and "MB/s" in seen
    assert "a line [of] text" in seen


def test_where_the_total_is_unknown_no_share_is_made_up(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    seen = shown(monkeypatch, Terminal(), HALF._replace(total=None))
    assert "1,234 documents" in seen and "%" not in seen


def taken(monkeypatch, stream: io.StringIO, total: int | None) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with working("loading [runs]/a"):
        pass
    assert list(followed(range(3), "evaluating [runs]/a", total)) == [0, 1, 2]
    return stream.getvalue()


def test_batches_are_counted_on_a_terminal_alone(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    assert taken(monkeypatch, io.StringIO(), 3) == ""
    seen = taken(monkeypatch, Terminal(), 3)
    assert "loading [runs]/a" in seen and "evaluating [runs]/a" in seen and "3/3" in seen
    assert "3/?" in taken(monkeypatch, Terminal(), None)


def test_one_rank_shows_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("launch.command.progress.rank", lambda: 1)
    assert taken(monkeypatch, Terminal(), 3) == ""
