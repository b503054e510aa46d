"""Defaults written out: a saved config holds every setting, so that a default that changes later
changes no run.

Settings that conf/ does not name (model.rope_theta, say) come from the records.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from omegaconf import DictConfig, ListConfig, open_dict

from launch.config.build import hints_of
from launch.saved.former_defaults import HELD
from model.component import Component
from train.config.component import KINDS
from train.config.run import RunConfig


def complete(config: DictConfig, held: bool = False) -> DictConfig:
    """Add what the config of a run leaves out, in place; interpolations stay. What is no group
    where there should be one is left for launch.config.contradictions to refuse.

    Args:
        held: the config was saved by an earlier version, so a setting that it lacks has the default
            that held then (launch/saved/former_defaults.py). Else today's.
    """
    with open_dict(config):
        _fill(config, RunConfig, held)
    return config


def defaults_of(cls: type) -> dict[str, Any]:
    """Setting -> default, as plain data, of a record."""
    found = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            found[field.name] = _plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            made = field.default_factory()
            if isinstance(made, Component):
                found[field.name] = {"name": made.name}
            else:
                found[field.name] = {} if dataclasses.is_dataclass(made) else _plain(made)
    return found


def records(cls: type = RunConfig) -> Iterator[type]:
    """A record and those that it is made of, of components every one that may stand there."""
    yield cls
    for hint in hints_of(cls).values():
        for part in (hint, *get_args(hint)):
            if part in KINDS:
                yield from KINDS[part].values()
            elif isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from records(part)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _fill(node: Any, cls: type, held: bool) -> None:
    if not _is_group(node):
        return
    defaults = defaults_of(cls)
    if held:
        former = HELD.get(cls.__name__, {})
        defaults |= {key: value for key, value in former.items() if key in defaults}
    for key, value in defaults.items():
        if key not in node.keys():  # noqa: SIM118  (`in` takes a value that is to be given for none)
            node[key] = value
    for key, hint in hints_of(cls).items():
        if key in node.keys():  # noqa: SIM118
            _fill_child(node._get_node(key), hint, held)


def _fill_child(node: Any, hint: Any, held: bool) -> None:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):  # a group, or null
        for part in arguments:
            _fill_child(node, part, held)
    elif hint in KINDS:
        if (cls := _record_of(node, KINDS[hint])) is not None:
            _fill(node, cls, held)
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        _fill(node, hint, held)
    elif origin is tuple and isinstance(node, ListConfig) and not _is_empty(node):
        for i in range(len(node)):
            _fill_child(node._get_node(i), arguments[0], held)
    elif origin is dict and _is_group(node):
        for name in list(node.keys()):
            _fill_child(node._get_node(name), arguments[1], held)


def _record_of(node: Any, known: Mapping[str, type[Component]]) -> type | None:
    """The record of a component; None where it is not one of ours."""
    name = node._get_node("name") if _is_group(node) else None
    value = name._value() if name is not None else None
    return known.get(value) if isinstance(value, str) else None


def _is_group(node: Any) -> bool:
    return isinstance(node, DictConfig) and not _is_empty(node)


def _is_empty(node: Any) -> bool:
    """Whether the node stands for something else, or for nothing."""
    return bool(node._is_none() or node._is_missing() or node._is_interpolation())
