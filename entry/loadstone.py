"""`loadstone train ...` for `python -m launch.train ...`, once `pip install -e .` has put it on the
path. This file alone is installed: packages called train and model are nobody's to install
(docs/decisions/never_installed.md).
"""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def arguments(typed: list[str], cwd: Path) -> list[str]:
    """What Python is started with.

    Raises:
        SystemExit: there is no such command, or this is not the checkout.
    """
    name = typed[0] if typed else "--help"
    if cwd.resolve() != ROOT:
        raise SystemExit(f"loadstone runs in its checkout, where conf/ and runs/ are: cd {ROOT}")
    if name in ("--help", "-h", "help"):
        return ["-m", "launch"]
    if name not in commands():
        near = difflib.get_close_matches(name, commands(), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SystemExit(f"loadstone {name}: no such command; {hint}loadstone lists them all")
    return ["-m", f"launch.{name}", *typed[1:]]


def commands() -> list[str]:
    """Files and folders of launch/ that python -m runs."""
    files = [p.stem for p in (ROOT / "launch").glob("*.py") if not p.stem.startswith("__")]
    return sorted([*files, *(p.parent.name for p in (ROOT / "launch").glob("*/__main__.py"))])


def main() -> None:
    """Become that process: signals, exit code and rank are its own."""
    os.execv(sys.executable, [sys.executable, *arguments(sys.argv[1:], Path.cwd())])


if __name__ == "__main__":
    main()
