"""Adapters into a model that is built: where they sit and what they begin with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from model.init import stream_of
from model.lora import AdaptedLinear, draw
from model.moe.experts import Experts


@torch.no_grad()
def add_adapters(model: nn.Module, ranks: Mapping[str, int], alpha: float, seed: int) -> None:
    """Give projections low-rank adapters, and leave their weights as they are: nothing of what
    was there asks for a gradient from now on.

    Args:
        ranks: name of a projection (model/cost/projections.py) -> rank of its adapter.
        alpha: an adapter counts alpha / rank times.
        seed: of what A begins with, by name and global expert, never by rank of the job.
    """
    model.requires_grad_(False)
    for name, rank in ranks.items():
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        if isinstance(module, Experts):
            a = module.add_adapter(last, rank, alpha / rank)
            for row, expert in enumerate(module.global_ids):
                draw(a[row], stream_of(seed, f"{parent}.lora_{last}_a", expert))
            continue

        plain = module.get_submodule(last)
        assert isinstance(plain, nn.Linear), name
        adapted = AdaptedLinear(plain, rank, alpha / rank)
        draw(adapted.lora_a, stream_of(seed, f"{name}.lora_a"))
        setattr(module, last, adapted)
