"""The pages of docs/how_to: the diff of each applies to this tree as it is, and in a copy of the
tree that has it the commands of the page succeed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(ROOT.glob("docs/how_to/add_*.md"))
COPIED = (
    "launch",
    "train",
    "infer",
    "model",
    "ops",
    "bench",
    "conf",
    "docs",
    "tests",
    "pyproject.toml",
)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)


def copy_tree(folder: Path) -> None:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder / name)


def run(command: list[str], folder: Path, text: str | None = None) -> subprocess.CompletedProcess:
    # Without what tells a process that it is a worker of this test run, and with this checkout's
    # compiled ops, which hang on their sources alone.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "GIT_"))}
    kernels = os.environ.get("LOADSTONE_KERNELS", str(ROOT / ".cache" / "kernels"))
    own = {"LOADSTONE_KERNELS": kernels, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    return subprocess.run(
        command, cwd=folder, env=kept | own, input=text, capture_output=True, text=True, timeout=300
    )


def applied(diff: str, folder: Path) -> str:
    """Apply a diff; what git says against it, or nothing."""
    return run(["git", "apply", "-C1", "-"], folder, diff).stderr


def changed_as(page: Path, folder: Path) -> str:
    """The tree in a folder, with the diff of a page applied; the page's text."""
    text = page.read_text()
    copy_tree(folder)
    (diff,) = blocks(text, "diff")
    assert not applied(diff, folder)

    # The page lists every file that its diff touches, and no other.
    touched = set(re.findall(r"^\+\+\+ b/(\S+)$", diff, re.M))
    listed = set(re.findall(r"^\| `([^`]+)` \|", text, re.M))
    assert listed == touched
    return text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_diff_applies(page, tmp_path):
    changed_as(page, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        p if p.stem == "add_a_metric" else pytest.param(p, marks=[pytest.mark.nightly])
        for p in PAGES
    ],
    ids=lambda page: page.stem,
)
def test_in_the_changed_tree_the_commands_of_the_page_succeed(page, tmp_path):
    text = changed_as(page, tmp_path)
    (commands,) = blocks(text, "sh")
    for line in commands.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == ".venv/bin/python"
            done = run([sys.executable, *words[1:]], tmp_path)
            assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_a_diff_that_no_longer_fits_is_seen(tmp_path):
    (tmp_path / "a.py").write_text("one = 1\ntwo = 2\n")
    diff = "--- a/a.py\n+++ b/a.py\n@@ -1,2 +1,3 @@\n one = 1\n-{}\n+two = 3\n+three = 3\n"
    assert "does not apply" in applied(diff.format("two = 22"), tmp_path)
    assert not applied(diff.format("two = 2"), tmp_path)
    assert (tmp_path / "a.py").read_text() == "one = 1\ntwo = 3\nthree = 3\n"


def test_every_page_is_listed():
    index = (ROOT / "docs/how_to/README.md").read_text()
    pages = {page.stem for page in ROOT.glob("docs/how_to/*.md")} - {"README"}
    assert set(re.findall(r"\]\((\w+)\.md\)", index)) == pages
