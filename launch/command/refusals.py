"""Hydra's errors in our words: one line that names the value and the way out."""

from __future__ import annotations

import difflib
import re

from launch.command.arguments import options
from launch.process.identity import ROOT


def explained(error: Exception) -> list[str]:
    """What is wrong with the command line, in sentences; [] for an error that is not Hydra's."""
    from hydra.errors import HydraException, MissingConfigException

    if not isinstance(error, HydraException):
        return []
    text = str(error)
    if isinstance(error, MissingConfigException):
        return [_missing(error.missing_cfg_file or "")]
    if found := re.search(r"Could not override '([^']+)'", text):
        return [_unknown(found[1])]
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return [_several(found[1])]
    if found := re.search(r"Could not delete from config. '?([^'\s]+)'? does not exist", text):
        return [f"~{found[1]}: there is no such setting to leave out"]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [lines[0] if lines else type(error).__name__]


def _missing(option: str) -> str:
    """router/foo"""
    group, _, name = option.strip("/").rpartition("/")
    choices = options(group)
    if not choices:
        return f"{option} does not exist under conf/"
    near = difflib.get_close_matches(name, choices, 1, 0.55)
    hint = f"did you mean {group}={near[0]}? " if near else ""
    return f"{group}={name} does not exist; {hint}choices: {', '.join(choices)}"


def _unknown(key: str) -> str:
    groups = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir())
    if key == "model":
        return "model is no setting of this command; run=RUN or path=DIR names one that is trained"
    if key in groups:
        return f"this command has no choice of {key}; --help lists its settings"
    near = difflib.get_close_matches(key, groups, 1, 0.6)
    return f"unknown setting {key}" + (f": did you mean {near[0]}?" if near else "")


def _several(argument: str) -> str:
    key, _, values = argument.lstrip("+").partition("=")
    return (
        f"{key}={values} are several values: -m {key}={values} runs a job for each; "
        f"{key}=[{values}] is a list; \"{key}='{values}'\" is text"
    )
