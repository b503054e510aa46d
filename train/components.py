"""The model of a run, from the records of its parts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from model.adapters import add_adapters
from model.moe.budget import start_routers
from model.moe.layer import ModelParts
from model.parallel.deal import Dealer
from model.parallel.groups import ParallelGroups
from model.placement.record import Placement
from model.transformer import Transformer
from ops.grouped_mlp import select_backend
from train.config.kinds import kind_of
from train.config.lora import ranks_of
from train.config.run import RunConfig


def training_dtype(config: RunConfig) -> torch.dtype:
    """Of the weights in training (train.precision)."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def dealer_of(config: RunConfig) -> Dealer | None:
    """Who deals out rows to the ranks that gather keys and values; None: none do."""
    size = config.parallel.context_gather_size
    if size == 1:
        return None
    return Dealer(size, functools.partial(config.attention.work, config.model))


def experts_backend(config: RunConfig, device: torch.device) -> str:
    """What computes the experts of a run in training.

    Raises:
        ValueError: experts.backend cannot, on this device.
    """
    model = config.model
    return select_backend(
        config.experts.backend,
        device,
        training_dtype(config),
        model.hidden_size,
        model.expert_intermediate_size,
        model.plain_experts,
        config.experts.precision,
    )


def build_model(
    config: RunConfig,
    groups: ParallelGroups | None = None,
    dtype: torch.dtype = torch.float32,
    settle: Callable[[nn.Parameter], None] | None = None,
) -> Transformer:
    """The transformer of a run, or the stage of it that `groups` say, with this rank's share of the
    experts and its initial weights. settle: of model.init.materialize.
    """
    placement = None
    if config.parallel.placement is not None and groups is not None and groups.expert_size > 1:
        placement = Placement.load(Path(config.parallel.placement))
    parts = ModelParts(
        config.router,
        config.attention,
        config.dispatcher,
        config.balance,
        config.experts,
        placement,
    )
    layers = None
    if groups is not None and groups.pipeline_size > 1:
        layers = config.stage_runs[groups.pipeline_rank]
    transformer = Transformer(config.model, parts, groups, config.seed, layers, dtype, settle)
    start_routers(transformer.routers(), config.budget, config.fail_safe)
    adapted = ranks_of(config.lora, config.model, config.attention.arguments)
    if adapted:
        ranks = {name: rank for name, (_, rank) in adapted.items()}
        add_adapters(transformer, ranks, config.lora.alpha, config.seed)
        for name, parameter in transformer.named_parameters():
            if kind_of(name) in (*config.lora.also_train, "lora"):
                parameter.requires_grad_(True)
    return transformer
