"""What people type, as Hydra takes it.

Hydra wants its own options together, a plus before a setting that no YAML names, and a grammar of
its own for values. People write settings in any order, and paths and sentences as they are.
"""

from __future__ import annotations

import difflib
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
    *("--help", "-h", "--hydra-help"),
)
"""Options that are not."""
KEY = re.compile(r"(\+{0,2}|~)([A-Za-z_][\w./@-]*)=(.*)", re.DOTALL)


INDEX = re.compile(r"\[(\d+)\](?=[^=]*=)")
OF_A_LIST = re.compile(r"((?:\w+\.)*(?:sources|groups))\.(?!\d)")
"""A setting of an item, of which the number is left out."""
SWEEPERS = ("hydra/sweeper", "hydra.sweeper")
OF_TRAINING = ("train", "plan", "compare")
FILES_OF_SETTINGS = ("config", "config_file", "config_path", "cfg_path")
NO_FILE = (
    "settings are not read from a file of yours; write them as name=value, or put the file into "
    "conf/experiment and choose it with experiment=NAME"
)


class ArgumentError(ValueError):
    """An argument that is no setting; the message says what to write instead."""


def arranged(arguments: Iterable[str], command: str = "train") -> list[str]:
    """The arguments of a command as Hydra takes them: its options first, then the settings.

    Raises:
        ArgumentError: with the first that is neither.
    """
    options: list[str] = []
    settings: list[str] = []
    waiting = False
    typed = list(arguments)
    for argument, after in zip(typed, [*typed, ""][1:], strict=True):
        if waiting:
            options.append(argument)
            waiting = False
        elif argument.startswith("-") and not KEY.match(argument):
            options += _option(argument, after, command)
            waiting = argument in WITH_VALUE
        else:
            settings.append(setting(argument, after))
    return [*options, *settings]


def key_of(argument: str) -> str | None:
    """The setting that an argument gives a value to, however it is written; None: to none."""
    found = KEY.fullmatch(_dotted(argument))
    return None if found is None or found[1] == "~" else found[2]


def replaced(arguments: Iterable[str], key: str, value: str) -> list[str]:
    """The arguments with another value of a setting, for a command that starts itself again."""
    return [*(a for a in arguments if key_of(a) != key), f"{key}={value}"]


def _dotted(argument: str) -> str:
    """data.sources[0].path=x as data.sources.0.path=x: messages name items as Python does."""
    return INDEX.sub(r".\1", argument, count=2) if "[" in argument else argument


def refuse_two_values(arguments: Iterable[str]) -> None:
    """Hydra would take the last one and say nothing.

    Raises:
        ArgumentError: a setting is given twice, with different values.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        key = key_of(argument)
        if key is None:
            continue
        first = given.setdefault(key, argument)
        if first.partition("=")[2] != argument.partition("=")[2]:
            raise ArgumentError(f"{first} and {argument} give {key} two values; drop one")


def require_sweep(arranged: Iterable[str]) -> None:
    """Without a setting of several values Hydra would run one job, and say nothing.

    Args:
        arranged: as Hydra takes them, with -m or --multirun among them.

    Raises:
        ArgumentError: no setting has several values, and no sweeper of another kind is chosen.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    settings = [argument for argument in arranged if KEY.match(argument)]
    if any(key_of(s) in SWEEPERS or str(key_of(s)).startswith("hydra.sweeper.") for s in settings):
        return
    if not any(o.is_sweep_override() for o in OverridesParser.create().parse_overrides(settings)):
        raise ArgumentError(
            "-m runs a job for each value of a setting, and none has several; write "
            "optim.lr=1e-3,1e-4, or leave -m out"
        )


def _option(argument: str, after: str, command: str) -> list[str]:
    name = argument.partition("=")[0]
    names_a_run = name == "--run" and re.match(r"[^-=]+$", after)  # as no option of Hydra's
    if name in WITH_VALUE or (name in ALONE and not names_a_run) or argument.startswith("-cd"):
        return [argument]
    from launch.config.build import ELSEWHERE

    name, _, value = argument.lstrip("-").partition("=")
    name = name.replace("-", "_")
    if name in FILES_OF_SETTINGS:
        raise ArgumentError(f"{argument}: {NO_FILE}")
    # Words of other frameworks are mostly settings of a training.
    foreign = ELSEWHERE.get(name) if command in OF_TRAINING else None
    ours = foreign or _is_group(name) or name in _top_level(command)
    if "=" in argument or re.match(r"--?[a-z_]+\.[a-z_.]+", argument) or ours:
        meant = f"{foreign or name}={value or _value_after(after)}"
        raise ArgumentError(f"{argument}: settings have no dashes; write {meant}")
    raise ArgumentError(f"{argument} is no option; settings are written as name=value")


def _top_level(command: str) -> list[str]:
    """Settings of a command that stand in no group."""
    file = ROOT / "conf" / f"{command}.yaml"
    return re.findall(r"^(\w+):", file.read_text(), re.M) if file.is_file() else []


def _value_after(after: str) -> str:
    """What stands behind a setting whose value was typed as an argument of its own."""
    return "VALUE" if after.startswith("-") or "=" in after else after or "VALUE"


def setting(argument: str, after: str = "") -> str:
    """One setting, with a plus where Hydra may need it, and with quotes around a value that its
    grammar cannot read.

    Args:
        after: the argument behind it, which may have been meant as its value.

    Raises:
        ArgumentError: it has no value, or chooses what cannot be a choice.
    """
    found = KEY.fullmatch(_dotted(argument))
    if found is None:
        if argument.startswith("~"):
            return argument
        raise ArgumentError(_no_setting(argument, after))
    sign, key, value = found.groups()
    if key in FILES_OF_SETTINGS:
        raise ArgumentError(f"{argument}: {NO_FILE}")
    if without := OF_A_LIST.match(key):
        first = f"{without[1]}.0.{key[without.end() :]}"
        raise ArgumentError(f"{key}: {without[1]} is a list; write {first}={value} for its first")
    is_file = "/" in value or (key == "data" and "." in value)
    if _is_group(key) and (value.isdigit() or is_file):
        raise ArgumentError(_no_choice(key, value))
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


def _no_choice(group: str, value: str) -> str:
    """Hydra would look for a file of that name under conf/, or end with a traceback."""
    choices = options(group)
    near = difflib.get_close_matches(f"{group}{value}", choices, 1, 0.4)
    if group == "data":
        own = f"data=files data.sources.0.path=text data.sources.0.data_files={value}"
        hint = f"text of your own is {own}; "
    else:
        near += [choice for choice in choices if choice.endswith(value)]
        hint = f"did you mean {group}={near[-1]}? " if near else ""
    return f"{group}={value} does not exist; {hint}choices: {', '.join(choices)}"


def options(group: str) -> list[str]:
    """The choices of a group of conf/; a base that others are made of is none."""
    folder = ROOT / "conf" / group
    if not group or not folder.is_dir():
        return []
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem != "base")


def _no_setting(argument: str, after: str) -> str:
    if argument == "=":
        return "a setting is written without spaces: name=value"
    if argument in ("help", "?"):
        return f"{argument} is no setting; --help lists them"
    if re.fullmatch(r"[A-Za-z_][\w.]*", argument) and not os.path.isfile(argument):
        return f"{argument} has no value; write {argument}={_value_after(after)}"
    if "=" not in argument and ("/" in argument or os.path.isfile(argument)):
        return f"{argument} is no setting; a run is named as run={argument}, and a file likewise"
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
