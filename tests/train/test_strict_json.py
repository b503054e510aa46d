"""What the project writes as JSON is JSON: numbers that are not finite are null."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest

from train.files.strict_json import dumps

ROOT = Path(__file__).resolve().parent.parent.parent


def strict(text: str):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null_however_deep():
    value = {
        "a": math.nan,
        "b": [1.5, (math.inf, {"c": -math.inf})],
        "d": True,
        "e": None,
        "f": "NaN",
    }
    assert strict(dumps(value)) == {
        "a": None,
        "b": [1.5, [None, {"c": None}]],
        "d": True,
        "e": None,
        "f": "NaN",
    }


@pytest.mark.parametrize(
    "value", [{"a": [1, 2.5, "x"], "b": None}, [0.1 + 0.2, 1e300, -0.0], "NaN", {"z": 1, "a": 2}]
)
def test_finite_values_are_written_as_before(value):
    assert dumps(value) == json.dumps(value)
    assert dumps(value, sort_keys=True, indent=1) == json.dumps(value, sort_keys=True, indent=1)


def writes(tree: ast.AST) -> list[ast.Call]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) in ("json.dump", "json.dumps")]


@pytest.mark.parametrize("package", ["launch", "train", "infer", "model", "ops", "bench"])
def test_every_writer_of_json_refuses_what_json_cannot_say(package):
    loose = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for call in writes(ast.parse(path.read_text()))
        if not any(
            k.arg == "allow_nan" and getattr(k.value, "value", True) is False for k in call.keywords
        )
    ]
    assert not loose, (
        f"use train.files.strict_json.dumps, or allow_nan=False, in {', '.join(loose)}"
    )
