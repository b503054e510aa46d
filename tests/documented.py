"""The commands that README.md and docs/ print, as a test can run them: small, and on files that are
there.

A command is a line of a fenced block, or a code span of a table's first column, that starts with
`python -m launch.` (or the `loadstone` command, a launcher of ranks, or make). A page may leave out
what a reader fills in: `...`, RUN, HOSTS and `[an option]` are filled in here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"))
    # The log tells what was; pages of how-to are run by test_how_to.py in trees of their own.
    if page.name != "log.md" and not re.match(r"add_an?_", page.name)
)
PYTHON = r"(?:\.venv/bin/)?python3? -m "
STARTS = re.compile(
    rf"(?:[A-Z_]+=\S+ )*(?:{PYTHON}(?:launch|bench)\.|loadstone |make |wandb |"
    r"(?:deepspeed|torchrun|srun) .*launch\.)"
)
FILLED_IN = re.compile(r"(?<![\w/.'\"])\.\.\.(?![\w/'\"])|<the same>")


@dataclass(frozen=True)
class Command:
    page: str
    text: str
    """The whole line, continuation lines joined, without its comment."""

    @property
    def module(self) -> str | None:
        """Of `python -m` or `loadstone`, as in launch.train; None: it is none of ours."""
        if found := re.search(r"-m(?:odule)? (launch\.\w+|bench[.\w]*)", self.text):
            return found[1]
        if found := re.match(r"loadstone (\w+)", self.text):
            return f"launch.{found[1]}"
        return None

    @property
    def overrides(self) -> list[str]:
        """Arguments after the module, without what a reader fills in."""
        if self.text.startswith("loadstone"):
            rest = self.text.split(maxsplit=2)[2:]
        else:
            rest = re.split(r"-m(?:odule)? [\w.]+", self.text, maxsplit=1)[1:]
        optional = r"(?<=\s)\[[^=\]]*(?:=[^\]]*)?\](?=\s|$)"
        return shlex.split(FILLED_IN.sub(" ", re.sub(optional, " ", rest[0]))) if rest else []

    @property
    def starter(self) -> str:
        """What is written first: python, loadstone, make, deepspeed, ..."""
        return next(w for w in self.text.split() if "=" not in w).removeprefix(".venv/bin/")


def commands(page: Path) -> list[Command]:
    """Those of a page, in order, each once."""
    name = str(page.relative_to(ROOT))
    return list(dict.fromkeys(Command(name, line) for line in _lines(page.read_text())))


def _lines(text: str) -> Iterator[str]:
    for language, block in re.findall(
        r"^[ ]*```(\w*)[^\n]*\n(.*?)^[ ]*```[ ]*$", text, re.M | re.S
    ):
        if language in ("", "bash", "sh", "console", "shell"):
            joined = re.sub(r"\\\n\s*", " ", block)
            yield from (found for line in joined.splitlines() if (found := _command(line)))
    for span in re.findall(r"^\| `([^`]+)` \|", text, re.M):
        if found := _command(span):
            yield found


def _command(line: str) -> str | None:
    """The line without its comment and prompt; None: it is no command."""
    line = re.sub(r"^\$ ", "", line.strip())
    line = re.sub(r"\s+#\s.*$", "", line).strip()
    return re.sub(r"\s+", " ", line) if STARTS.match(line) else None


if __name__ == "__main__":
    for page in PAGES:
        for command in commands(page):
            print(f"{command.page:32} {command.module!s:20} {command.overrides}")
