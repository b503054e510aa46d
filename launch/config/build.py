"""From plain data to frozen records: strict keys with suggestions, and types."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal, get_args, get_origin

from omegaconf import DictConfig

from launch.config.overrides import plain
from launch.process.identity import ROOT
from launch.process.secrets import problems_of_settings, redact_text
from model.component import Component
from train.config.component import KINDS, renamed


def record(config: DictConfig, cls: type, path: str = "") -> Any:
    """Settings of one command or section as a checked record; `path` leads the names in messages.

    Raises:
        ConfigError: with every problem.
    """

    problems = problems_of_settings(plain(config), path)
    settings = build_record(plain(config), cls, path, problems)
    problems = problems or settings.problems()
    if problems:
        raise ConfigError(problems)
    return settings


def require_given(config: DictConfig, cls: type, is_given: bool, give: str) -> None:
    """Refuse a command that lacks what it needs, and name what was misspelt, which may be why.

    Args:
        cls: the record of the command's settings. give: what to give, as a sentence.

    Raises:
        ConfigError: keys that the record does not have, then `give`.
    """
    if is_given:
        return
    _asked.set(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    raise ConfigError([*(_suggest(key, "", known) for key in config if key not in known), give])


LARGEST = {"model.num_layers": 10_000, "model.num_mtp_layers": 10_000}
"""Above these, the checks themselves would take for ever."""
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
"""What a person calls a type."""
MAX_LINE = 600
"""Characters of a problem: a config may hold anything, and messages repeat its values."""


class ConfigError(ValueError):
    """All problems of a config, each one printable line without secrets."""

    def __init__(self, problems: list[str]):
        self.problems = [_line(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


def _line(text: str) -> str:
    text = redact_text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))
    return (
        text if len(text) <= MAX_LINE else f"{text[: MAX_LINE // 2]} ... {text[-(MAX_LINE // 3) :]}"
    )


ELSEWHERE = {
    "learning_rate": "optim.lr",
    "num_gpus": "launch.num_devices",
    "gpus": "launch.num_devices",
    "nproc_per_node": "launch.num_devices",
    "nnodes": "launch.num_nodes",
    "nodes": "launch.num_nodes",
    "batch_size": "train.global_batch_size",
    "per_device_batch_size": "train.micro_batch_size",
    "steps": "train.num_steps",
    "max_steps": "train.num_steps",
    "context_length": "train.seq_len",
    "sequence_length": "train.seq_len",
    "max_length": "train.seq_len",
    "seq_length": "train.seq_len",
    "warmup": "optim.warmup_steps",
    "dtype": "train.precision",
    "bf16": "train.precision",
    "save_every": "checkpoint.save_interval",
    "save_steps": "checkpoint.save_interval",
    "ep_size": "parallel.expert_parallel_size",
    "expert_parallel": "parallel.expert_parallel_size",
    "gradient_checkpointing": "model.recompute",
    "max_grad_norm": "train.clip_grad_norm",
    "output_dir": "run_dir",
    "output": "to",
    "tokenizer": "data.tokenizer.path",
    "init_from": "init.path",
    "run": "resume",
    "model_name_or_path": "init.path",
    "tp": "parallel.tensor_parallel_size",
    "pp": "parallel.pipeline_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_parallel_size",
    "coef": "balance.aux_loss_coeff",
    "router_aux_loss_coef": "balance.aux_loss_coeff",
    "moe_aux_loss_coeff": "balance.aux_loss_coeff",
    "lr": "optim.lr",
    "epochs": "train.num_epochs",
    "ckpt": "checkpoint",
    "max_tokens": "max_new_tokens",
    "num_samples": "max_sequences",
}
"""What other frameworks call a setting -> what it is called here."""
SEVERAL = {"betas": "optim.beta1 and optim.beta2", "zero_stage": "deepspeed=zero1, zero2 or zero3"}
"""Likewise, where it is no single setting here."""
_asked: ContextVar[type] = ContextVar("_asked")
"""The record of the whole command."""


@cache
def hints_of(cls: type) -> Mapping[str, Any]:
    """Names of a record's fields and their types, read from their text once for each record."""
    return types.MappingProxyType(typing.get_type_hints(cls))


@cache
def _places(cls: type) -> dict[str, tuple[str, ...]]:
    """Last part of a key -> every key of the record that ends so; components have many."""
    found: dict[str, list[str]] = {}

    def visit(record: type, path: str) -> None:
        for name, hint in hints_of(record).items():
            if name not in {field.name for field in dataclasses.fields(record)}:
                continue
            found.setdefault(name, []).append(f"{path}{name}")
            item = "0." if get_origin(hint) is tuple else ""
            for part in (hint, *get_args(hint)):
                if dataclasses.is_dataclass(part):
                    visit(typing.cast(type, part), f"{path}{name}.{item}")

    visit(cls, "")
    return {name: tuple(keys) for name, keys in found.items()}


def _suggest(name: Any, path: str, known: set[str]) -> str:
    name = name if isinstance(name, str) else repr(name)
    return f"unknown key {path}{name}: {_hint(name[:100], path, known)}"


def _of_an_item(key: Any, path: str, hints: Mapping[str, Any]) -> str | None:
    """What to say of data.path, a setting of the items of data.sources; None: of no list beside
    it.
    """
    for name, hint in hints.items():
        (item, *_) = get_args(hint) or (None,)
        is_list = get_origin(hint) is tuple and dataclasses.is_dataclass(item)
        if is_list and key in {field.name for field in dataclasses.fields(item)}:
            return f"unknown key {path}{key}: did you mean {path}{name}.0.{key}?"
    return None


def _hint(name: str, path: str, known: set[str]) -> str:
    """The same word elsewhere, another framework's word, a word like it, or what there is."""
    places = _places(_asked.get()) if _asked.get(None) is not None else {}
    foreign = ELSEWHERE.get(name.lower())
    if foreign is not None and foreign in places.get(foreign.rpartition(".")[2], ()):
        return f"did you mean {foreign}?"
    if name in SEVERAL and "optim" in places:
        return f"did you mean {SEVERAL[name]}?"
    if name in places:
        return f"did you mean {' or '.join(places[name][:3])}?"
    near = difflib.get_close_matches(name, sorted(known), 1, 0.6)
    if near:
        return f"did you mean {path}{near[0]}?"
    far = difflib.get_close_matches(name, sorted(places), 1, 0.75)
    if far:
        return f"did you mean {' or '.join(places[far[0]][:3])}?"
    return f"known keys: {', '.join(sorted(known)) or 'none'}"


def build_record(node: Any, cls: type, path: str, problems: list[str]) -> Any:
    """A frozen record from plain data, or None with the reasons appended to `problems`."""
    if not isinstance(node, dict):
        names = ", ".join(f"{path}{field.name}" for field in dataclasses.fields(cls)[:4])
        group = path.rstrip(".")
        problems.append(f"{group} is {node!r}; it must be a group of settings, such as {names}")
        return None
    if path == "":
        _asked.set(cls)
    hints = hints_of(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    problems += [
        _of_an_item(key, path, hints) or _suggest(key, path, set(fields))
        for key in node
        if key not in fields
    ]
    values = {}
    for name, field in fields.items():
        if name in node:
            values[name] = _value(node[name], hints[name], f"{path}{name}", problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{path}{name} is missing")
    return None if problems else cls(**values)


def _value(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [a for a in arguments if a is not type(None)]
        lists = [a for a in choices if get_origin(a) is tuple]  # a word, or a list
        if lists and isinstance(value, (list, tuple, dict)):
            return _value(value, lists[0], path, problems)
        return _value(value, choices[0], path, problems)
    if hint in KINDS:
        return _component(value, KINDS[typing.cast(type[Component], hint)], path, problems)
    if dataclasses.is_dataclass(hint):
        return build_record(value, typing.cast(type, hint), f"{path}.", problems)
    if origin is tuple:
        if isinstance(value, dict) and all(str(k).isdigit() for k in value):
            value = list(value.values())
        if not isinstance(value, (list, tuple)):
            problems.append(f"{path} is {value!r}; it must be a list")
            return None
        return tuple(
            _value(item, arguments[0], f"{path}[{i}]", problems) for i, item in enumerate(value)
        )
    if origin is Literal:
        if value not in arguments:
            problems.append(f"{path} is {value!r}; choose one of {', '.join(map(str, arguments))}")
        return value
    if origin is dict:
        return _table(value, arguments[1], path, problems)
    if value == "???":
        problems.append(f"{path} is missing; set it")
        return value
    largest = LARGEST.get(path, 2**63 - 1)
    if type(value) is int and abs(value) > largest:
        problems.append(
            f"{path} is a number of {value.bit_length()} bits; it must be at most {largest}"
        )
        return value
    if hint is float and type(value) is int:
        value = float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{path} is {value}; it must be a finite number")
    if hint in WORDS and type(value) is not hint:
        is_whole = hint is int and isinstance(value, float) and value.is_integer()
        mend = f"; write {value:.0f}" if is_whole and abs(value) < 2**53 else ""
        problems.append(f"{path} is {value!r}; it must be {WORDS[hint]}{mend}")
    return value


def _table(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    """A group of settings with names of its own. Numbers become text where text is wanted:
    launch.env.OMP_NUM_THREADS=4.
    """
    if not isinstance(value, dict):
        problems.append(f"{path} is {value!r}; it must be a group of settings")
        return value
    problems += [
        f"{path} has the key {key!r}; it must be text" for key in value if not isinstance(key, str)
    ]
    if hint is Any:
        return value
    numbers = {key: str(v) for key, v in value.items() if hint is str and type(v) in (int, float)}
    return {key: _value(v, hint, f"{path}.{key}", problems) for key, v in (value | numbers).items()}


def _component(
    value: Any, known: Mapping[str, type[Component]], path: str, problems: list[str]
) -> Any:
    """The record that the name chooses, from the settings beside it."""
    choices = ", ".join(known)
    settings = renamed(value) if isinstance(value, dict) else {}
    name = settings.pop("name", None)
    if isinstance(name, str) and name in known:
        problems += _of_others(settings, name, known, path)
        return build_record(settings, known[name], f"{path}.", problems)
    if name is not None:
        problems.append(f"{path}.name is {name!r}; choose one of {choices}")
    elif "_target_" in settings:
        problems.append(
            f"{path}._target_ is {settings['_target_']!r}, which no version of this project has "
            f"written; set {path}.name instead, to one of {choices}"
        )
    else:
        problems.append(f"{path} needs a name; choose one of {choices}")
    return None


def _of_others(
    settings: dict[str, Any], name: str, known: Mapping[str, type[Component]], path: str
) -> list[str]:
    """Settings that other components have and this one has not; they are taken out."""
    having = {
        choice: {field.name for field in dataclasses.fields(record)}
        for choice, record in known.items()
    }
    found = []
    for key in [key for key in settings if key not in having[name]]:
        if others := [choice for choice, keys in having.items() if key in keys]:
            del settings[key]
            first = _option(path, others[0])
            found.append(
                f"{path}.{key} is no setting of {path}={_option(path, name)}, but of "
                f"{', '.join(_option(path, other) for other in others)}: add {path}={first}"
            )
    return found


def _option(group: str, name: str) -> str:
    """The file of conf/<group> that chooses a component: the one of its name, or the first."""
    files = sorted((ROOT / "conf" / group).glob("*.yaml"))
    having = [path.stem for path in files if re.search(rf"^name: {name}$", path.read_text(), re.M)]
    return name if name in having or not having else having[0]
