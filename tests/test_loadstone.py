"""The command `loadstone` starts the modules of this checkout, here and nowhere else."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch.command.help import commands

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("loadstone", ROOT / "entry/loadstone.py")
assert spec is not None and spec.loader is not None
loadstone = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loadstone)


def test_every_command_is_started_with_its_arguments():
    assert loadstone.commands() == sorted(commands())
    started = loadstone.arguments(["train", "optim.lr=1", "-m"], ROOT)
    assert started == ["-m", "launch.train", "optim.lr=1", "-m"]
    assert (
        loadstone.arguments([], ROOT) == loadstone.arguments(["--help"], ROOT) == ["-m", "launch"]
    )


def test_a_slip_and_another_folder_are_told(tmp_path):
    with pytest.raises(SystemExit, match=r"no such command; did you mean train\?"):
        loadstone.arguments(["trian"], ROOT)
    with pytest.raises(SystemExit, match=f"cd {ROOT}"):
        loadstone.arguments(["train"], tmp_path)


def test_it_becomes_the_command():
    typed = [sys.executable, "entry/loadstone.py", "report", "--help"]
    done = subprocess.run(typed, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: python -m launch.report" in done.stdout


def test_nothing_but_the_command_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"loadstone": "loadstone:main"}
    modules, places = (project["tool"]["setuptools"][k] for k in ("py-modules", "package-dir"))
    assert modules == ["loadstone"] and places == {"": "entry"}
    assert [path.name for path in (ROOT / "entry").iterdir() if path.suffix] == ["loadstone.py"]
    assert "dependencies" not in project["project"]
