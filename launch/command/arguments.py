"""What people type, as Hydra takes it.

Hydra wants its own options together, a plus before a setting that no YAML names, and a grammar of
its own for values. People write settings in any order, and paths and sentences as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from launch.config.overrides import quoted
from launch.process.identity import ROOT

TEXTS = ("prompt", "train.sample_prompt", "sample_prompt", "note", "question", "target")
"""Settings whose value is text, whatever it looks like."""
WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--info", "-i")
"""Options of Hydra's that are followed by a value."""
ALONE = (
    *("--multirun", "-m", "--run", "-r", "--resolve"),
    *("--help", "-h", "--hydra-help", "--version"),
)
"""Options that are not."""
KEY = re.compile(r"(\+{0,2}|~)([A-Za-z_][\w./@-]*)=(.*)", re.DOTALL)


class ArgumentError(ValueError):
    """An argument that is no setting; the message says what to write instead."""


def arranged(arguments: Iterable[str]) -> list[str]:
    """The arguments of a command as Hydra takes them: its options first, then the settings.

    Raises:
        ArgumentError: with the first that is neither.
    """
    options: list[str] = []
    settings: list[str] = []
    waiting = False
    for argument in arguments:
        if waiting:
            options.append(argument)
            waiting = False
        elif argument.startswith("-") and not KEY.match(argument):
            options += _option(argument)
            waiting = argument in WITH_VALUE
        else:
            settings.append(setting(argument))
    return [*options, *settings]


def _option(argument: str) -> list[str]:
    name = argument.partition("=")[0]
    if name in WITH_VALUE or name in ALONE or argument.startswith("-cd"):
        return [argument]
    if "=" in argument or re.match(r"--?[a-z_]+\.[a-z_.]+", argument):
        name, _, value = argument.lstrip("-").partition("=")
        meant = f"{name.replace('-', '_')}={value or 'VALUE'}"
        raise ArgumentError(f"{argument}: settings have no dashes; write {meant}")
    raise ArgumentError(f"{argument} is no option; settings are written as name=value")


def setting(argument: str) -> str:
    """One setting, with a plus where Hydra may need it, and with quotes around a value that its
    grammar cannot read.

    Raises:
        ArgumentError: it has no value.
    """
    found = KEY.fullmatch(argument)
    if found is None:
        if argument.startswith("~"):
            return argument
        raise ArgumentError(_no_setting(argument))
    sign, key, value = found.groups()
    if key in TEXTS:
        is_none = value == "null" and key != "prompt"
        return f"{sign}{key}={value if is_none else quoted(value)}"

    # A setting that only a record has, or that a resumed run's router has, is added; what no record
    # has is refused by launch.config.build, which can suggest.
    if sign == "" and not key.startswith("hydra") and not _is_group(key):
        sign = "++"
    if sign == "~" or _readable(f"{sign}{key}={value}"):
        return f"{sign}{key}={value}"
    if key.endswith("data_files") and value.startswith("[") and value.endswith("]"):
        # a list of patterns and of paths with a ~
        names = [name.strip().strip("'\"") for name in value[1:-1].split(",")]
        return f"{sign}{key}=[{','.join(quoted(os.path.expanduser(name)) for name in names)}]"
    return f"{sign}{key}={quoted(os.path.expanduser(value))}"


def _no_setting(argument: str) -> str:
    if argument == "=":
        return "a setting is written without spaces: name=value"
    if re.fullmatch(r"[A-Za-z_][\w.]*", argument):
        return f"{argument} has no value; write {argument}=VALUE"
    return f"{argument} is no setting; settings are written as name=value"


def _is_group(key: str) -> bool:
    """Whether options are chosen by it: a folder of conf/."""
    return "." not in key and (ROOT / "conf" / key.partition("@")[0]).is_dir()


def _readable(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True
