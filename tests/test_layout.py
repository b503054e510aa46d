"""The house rules that a machine can hold: imports point down, third parties have homes, names are ours."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("launch", "train", "model", "ops")
"""A package may import itself and anything to its right."""
HOMES = {
    "hydra": ("launch/",), "omegaconf": ("launch/",),
    "deepspeed": ("train/engine.py",),
    "megatron": ("model/parallel.py", "train/data/", "train/schedule.py"),
    "wandb": ("train/tracker.py", "launch/dashboard.py"), "tensorboard": ("train/tracker.py",),
    "datasets": ("train/data/sources.py",), "tokenizers": ("train/data/",),
}


def imports(path: Path) -> list[tuple[int, str]]:
    """First words of absolute imports, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.lineno, node.module.split(".")[0]))
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def upward(package: str, words: list[tuple[int, str]]) -> list[tuple[int, str]]:
    banned = {*ORDER[:ORDER.index(package)], "tests", "bench"}
    return [(line, word) for line, word in words if word in banned]


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_down(package):
    wrong = [f"{p.relative_to(ROOT)}:{line} imports {word}" for p in files(package)
             for line, word in upward(package, imports(p))]
    assert not wrong, "\n".join(wrong)


def test_the_import_rule_catches_a_planted_violation(tmp_path):
    (tmp_path / "x.py").write_text("def f():\n    from train.loop import fit\n")
    assert upward("model", imports(tmp_path / "x.py")) == [(2, "train")]


@pytest.mark.parametrize("package", ORDER)
def test_third_parties_stay_in_their_homes(package):
    wrong = []
    for path in files(package):
        name = str(path.relative_to(ROOT))
        wrong += [f"{name}:{line} imports {word}" for line, word in imports(path)
                  if word in HOMES and not name.startswith(HOMES[word])]
    assert not wrong, "\n".join(wrong)


def test_relative_imports_are_not_used():
    wrong = [str(p) for package in ORDER for p in files(package)
             for node in ast.walk(ast.parse(p.read_text())) if isinstance(node, ast.ImportFrom) and node.level]
    assert not wrong


@pytest.mark.parametrize("package", ORDER)
def test_packages_come_from_this_tree(package):
    module = importlib.import_module(package)
    assert Path(module.__file__).parent == ROOT / package


def test_conf_holds_yaml_only_and_tests_are_no_package():
    assert not list((ROOT / "conf").rglob("*.py"))
    assert not list((ROOT / "tests").rglob("__init__.py"))
