"""Classes chosen by name in the config: import, check their arguments, bind them."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.budget import start_routers
from model.config import ModelConfig
from model.moe import ModelParts
from model.parallel import ParallelGroups
from model.placement import Placement
from model.transformer import Transformer
from train.config import ComponentConfig, RunConfig

GIVEN = frozenset({"config", "groups", "layer_idx", "placement"})
"""Arguments that the model itself passes to a component's constructor."""
KINDS = {"router": "model.routers", "attention": "model.attention", "dispatcher": "model.dispatch"}
"""Setting -> the package or module that holds its classes."""


@functools.cache
def classes(kind: str) -> dict[str, type[Any]]:
    """What may stand in `_target_` of a setting: the classes of its package that have `problems`.

    Names in a config are only compared with these, never imported: a dotted path could execute anything.
    """
    home = importlib.import_module(KINDS[kind])
    names = [home.__name__, *(f"{home.__name__}.{m.name}" for m in pkgutil.iter_modules(getattr(home, "__path__", [])))]
    modules = [importlib.import_module(name) for name in names]
    return {f"{module.__name__}.{name}": value for module in modules for name, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "problems")}


def resolve(component: ComponentConfig, kind: str) -> Any:
    """The class behind `_target_` of router, attention or dispatcher.

    Raises:
        ValueError: the name is not one of our classes of that kind.
    """
    known = classes(kind)
    if component.target not in known:
        why = f"does not exist as {kind}" if component.target.startswith("model.") else "is outside the model package"
        raise ValueError(f"_target_ {component.target!r} {why}; choose one of {', '.join(known)}")
    return known[component.target]


def parameters(component: ComponentConfig, kind: str) -> dict[str, bool]:
    """Name of every knob of a component's class -> whether it must be given."""
    return {name: parameter.default is inspect.Parameter.empty
            for name, parameter in inspect.signature(resolve(component, kind)).parameters.items() if name not in GIVEN}


def bind(component: ComponentConfig, kind: str) -> Callable[..., Any]:
    return functools.partial(resolve(component, kind), **component.arguments)


def build_model(config: RunConfig, groups: ParallelGroups | None = None) -> Transformer:
    """The transformer of a run, with this rank's share of the experts and its initial weights."""
    model: ModelConfig = config.model
    placement = None
    if config.parallel.placement is not None and groups is not None and groups.expert_size > 1:
        placement = Placement.load(Path(config.parallel.placement))
    parts = ModelParts(bind(config.router, "router"), bind(config.attention, "attention"),
                       bind(config.dispatcher, "dispatcher"), config.balance, config.experts, placement)
    transformer = Transformer(model, parts, groups, config.seed)
    start_routers(transformer.routers(), config.budget, config.fail_safe)
    return transformer
