"""In which settings several runs differ."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from launch.saved.resume import OF_THE_COMMAND, UNSET, flat
from train.config.component import SETTINGS

OF_THE_PLACE = (*OF_THE_COMMAND, "launch.master_*", "launch.node_rank", "hydra.*")
"""Settings, as patterns, in which runs differ that are the same otherwise."""
NUMERIC = (
    *("model.*", "router.*", "attention.*", "balance.*", "budget.*", "fail_safe.*", "experts.*"),
    *("dispatcher.*", "optim.*", "parallel.*_size", "train.*", "seed", "launch.num_*"),
    *("data.validation_fraction", "data.mixture.*", "data.format", "data.train_on"),
    *("data.sources.*.weight", "data.sources.*.max_epochs", "data.tokenizer.vocab_size"),
    *("init.checkpoint", "checkpoint.save_interval", "alarms.*.action", "alarms.*.above"),
)
"""Settings that are numbers and choices, and no text of a person's: they may stand on a page that
is passed on.
"""
FREE_TEXT = ("train.sample_prompt", "optim.groups*")


class _Set:
    def __repr__(self) -> str:
        return "set"


SET = _Set()
"""Value of a group that other runs do not have."""
Differences = dict[str, tuple[Any, ...]]
"""Dotted key -> its value in each run; UNSET where a run does not have it."""


def differences(configs: Sequence[Mapping[str, Any]], shareable: bool = False) -> Differences:
    """Every setting that is not the same in all resolved configs: a component's name first, then in
    the order of the first config.

    Args:
        shareable: leave out what may hold a name, a path or a secret.
    """
    tables = [flat(dict(config)) for config in configs]
    keys = dict.fromkeys(key for table in tables for key in table)
    # What is empty in one run and has items in another is told by these.
    with_items = {group for key in keys for group in _groups(key)}
    found = {}
    for key in keys:
        if key in with_items:
            continue
        values = tuple(table.get(key, UNSET) for table in tables)
        if all(_same(value, values[0]) for value in values) or _is(key, OF_THE_PLACE):
            continue
        if shareable and not _is_shareable(key):
            continue
        found[key] = values
    return _gathered(found)


def _groups(key: str) -> list[str]:
    """a and a.b of a.b.c."""
    parts = key.split(".")
    return [".".join(parts[:number]) for number in range(1, len(parts))]


def shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resolved config that may be passed on, by their dotted keys."""
    return {key: value for key, value in flat(dict(config)).items() if _is_shareable(key)}


def _is_shareable(key: str) -> bool:
    return _is(key, NUMERIC) and not _is(key, FREE_TEXT)


def _gathered(found: Differences) -> Differences:
    """Names of components first, without settings that only one of two components has; a group that
    only some runs have is one line.
    """
    names = [kind for kind in SETTINGS if f"{kind}.name" in found]
    result = {f"{kind}.name": found[f"{kind}.name"] for kind in names}
    for key, values in found.items():
        group, _, _ = key.rpartition(".")
        if UNSET not in values:
            result[key] = values
        elif group and group not in names:
            result[group] = tuple(UNSET if value is UNSET else SET for value in values)
    return result


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and bool(one == other))


def _is(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
