"""Classes chosen by name in the config: import, check their arguments, bind them."""

from __future__ import annotations

import functools
import importlib
import inspect
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
ALLOWED_PREFIX = "model."
"""A config may name our own classes only: instantiating arbitrary dotted paths would execute anything."""


def resolve(component: ComponentConfig) -> Callable[..., Any]:
    """The class behind `_target_`.

    Raises:
        ValueError: the name is not one of our classes.
    """
    module_name, _, class_name = component.target.rpartition(".")
    if not component.target.startswith(ALLOWED_PREFIX):
        raise ValueError(f"_target_ {component.target!r} is outside the model package; only our own classes may be named")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"_target_ {component.target!r} does not exist: {error}") from error
    if not isinstance(found, type):
        raise ValueError(f"_target_ {component.target!r} is not a class")
    return found


def known_arguments(component: ComponentConfig) -> set[str]:
    """The knobs a component's class accepts."""
    return set(inspect.signature(resolve(component)).parameters) - GIVEN


def bind(component: ComponentConfig) -> Callable[..., Any]:
    return functools.partial(resolve(component), **component.arguments)


def build_model(config: RunConfig, groups: ParallelGroups | None = None) -> Transformer:
    """The transformer of a run, with this rank's share of the experts and its initial weights."""
    model: ModelConfig = config.model
    placement = None
    if config.parallel.placement is not None and groups is not None and groups.expert_size > 1:
        placement = Placement.load(Path(config.parallel.placement))
    parts = ModelParts(bind(config.router), bind(config.attention), bind(config.dispatcher), config.balance, config.experts,
                       placement)
    transformer = Transformer(model, parts, groups, config.seed)
    start_routers(transformer.routers(), config.budget, config.fail_safe)
    return transformer
