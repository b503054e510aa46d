"""Every setting of a command with its sentence, read from the records and the comments of conf/.
Imports no torch.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from launch.process.identity import ROOT

RECORDS = {
    "train": "train.config.run:RunConfig",
    "plan": "train.config.run:RunConfig",
    "prepare": "train.config.run:RunConfig",
    "compare": "train.config.run:RunConfig",
    "evaluate": "train.config.commands.evaluate:EvaluateConfig",
    "generate": "train.config.commands.generate:GenerateConfig",
    "export": "train.config.commands.export:ExportConfig",
    "branch": "train.config.commands.export:BranchConfig",
    "runs": "launch.runs.command:RunsConfig",
    "serve": "train.config.commands.serve:ServeConfig",
    "benchmark": "train.config.commands.benchmark:BenchmarkConfig",
    "quantize": "train.config.commands.export:QuantizeConfig",
    "teach": "train.config.run:RunConfig",
    "report": "launch.report.command:ReportConfig",
    "place": "launch.place.settings:PlaceConfig",
}
"""Command -> the record of its settings; those of others stand in their YAML."""
OF_ONE_COMMAND = {
    "prepare": (
        *("data", "prepare", "model.vocab_size", "seed"),
        *("init.path", "init.run", "init.checkpoint"),
    ),
    "teach": ("objective",),
}
"""Of the record of another command, what a command reads."""
OWN = {
    "prepare": "train.config.commands.prepare:PrepareCommandConfig",
    "plan": "train.config.commands.plan:PlanCommandConfig",
    "teach": "train.config.commands.prepare:TeachCommandConfig",
    "compare": "launch.comparing.settings:CompareConfig",
}
"""Of a command that reads another one's record, what it has beside it."""


@dataclass(frozen=True)
class Setting:
    key: str
    default: str
    """As one would type it; empty where there is none."""
    choices: tuple[str, ...]
    sentence: str
    """What it does; empty where its name says it."""


def settings(command: str) -> list[Setting]:
    """All settings of a command, in the order of its record, then what only its YAML names."""
    if command not in RECORDS:
        return [
            Setting(key, value, (), comment) for key, (value, comment) in _yaml(command).items()
        ]
    module, _, name = RECORDS[command].partition(":")
    found = list(_of_record(getattr(importlib.import_module(module), name), "", command))
    only = OF_ONE_COMMAND.get(command)
    if only is not None:
        found = [s for s in found if s.key in only or s.key.partition(".")[0] in only]
    return [*found, *own_settings(command)]


def own_settings(command: str) -> list[Setting]:
    """What a command that reads another one's record has beside it."""
    if command not in OWN:
        return []
    module, _, name = OWN[command].partition(":")
    return list(_of_record(getattr(importlib.import_module(module), name), "", command))


def _of_record(cls: type, path: str, command: str) -> Iterator[Setting]:
    from train.config.component import KINDS

    hints, sentences = typing.get_type_hints(cls), _sentences(cls)
    for field in dataclasses.fields(cls):
        key, hint = f"{path}{field.name}", hints[field.name]
        parts = [part for part in (hint, *get_args(hint)) if isinstance(part, type)]
        record = next((p for p in parts if dataclasses.is_dataclass(p) and p not in KINDS), None)
        component = next((part for part in parts if part in KINDS), None)
        if component is not None:
            for choice, settings in KINDS[component].items():
                yield Setting(f"{key}.name", choice, (), _first_sentence(settings))
                yield from _of_record(settings, f"{key}.", command)
        elif record is not None:
            item = "0." if get_origin(hint) is tuple else ""
            item = "NAME." if get_origin(hint) is dict else item
            yield from _of_record(record, f"{key}.{item}", command)
        else:
            value, comment = _yaml(command).get(key, ("", ""))
            default = value or _default(field)
            yield Setting(key, default, _choices(hint), sentences.get(field.name) or comment)


def _choices(hint: Any) -> tuple[str, ...]:
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Literal:
            return tuple(map(str, get_args(part)))
    return ()


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return ""
    text = {None: "null", True: "true", False: "false"}
    value = field.default
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return text[value] if value is None or isinstance(value, bool) else str(value)


@cache
def _sentences(cls: type) -> dict[str, str]:
    """Field -> its docstring, of a record and of those that it extends."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[field.target.id] = " ".join(text.value.value.split())
    return found


def _first_sentence(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split()).partition(". ")[0].rstrip(".") + "."


@cache
def _yaml(command: str) -> dict[str, tuple[str, str]]:
    """Dotted key -> what conf/<command>.yaml, with the first options of its groups, gives it and
    says of it in a comment.
    """
    text = composed_from(command).read_text()
    found: dict[str, tuple[str, str]] = {}
    for base in _bases(text):
        found |= _yaml(base)
    found |= _keys(text, "")
    for group, option in groups_of(command):
        path = ROOT / "conf" / group / f"{option}.yaml"
        if path.is_file():
            found |= _keys(path.read_text(), f"{group}.")
    return found


def _keys(text: str, path: str) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = re.match(r"( *)([A-Za-z_]\w*):\s*([^#]*?)\s*(?:#\s*(.*))?$", line)
        if match is None or match[2] == "defaults":
            continue
        indent = len(match[1])
        while stack and stack[-1][0] >= indent:
            stack.pop()
        key = ".".join([*(name for _, name in stack), match[2]])
        if match[3]:
            found[f"{path}{key}"] = (match[3], match[4] or "")
        else:
            stack.append((indent, match[2]))
    return found


def composed_from(command: str) -> Path:
    """The file of conf/ that a command begins with."""
    return ROOT / "conf" / f"{command}.yaml"


def _bases(text: str) -> list[str]:
    """Commands whose settings a file of conf/ begins with."""
    defaults = re.search(r"^defaults:\n((?:  - .*\n)+)", text, re.M)
    named = re.findall(r"^  - (\w+)$", defaults[1] if defaults else "", re.M)
    return [name for name in named if name != "_self_"]


def groups_of(command: str) -> list[tuple[str, str]]:
    """Groups of a command and the option that each begins with, in the order of its defaults."""
    text = composed_from(command).read_text()
    defaults = re.search(r"^defaults:\n((?:  - .*\n)+)", text, re.M)
    lines = defaults[1].splitlines() if defaults else []
    pairs = [re.match(r"  - (?:override )?/?(\w+): (\w+)", line) for line in lines]
    found = [(pair[1], pair[2]) for pair in pairs if pair]
    # the command is another one's with settings of its own
    for base in _bases(text):
        found = groups_of(base) + found
    return found
