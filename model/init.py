"""Initial weights that depend on names and global expert ids only, never on ranks or construction
order.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

from model.moe.experts import Experts


def stream_of(*key: object) -> torch.Generator:
    """A stream of random numbers that depends on the key alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int, std: float, num_layers: int) -> None:
    """Normal(0, std) everywhere; projections back into the residual stream get std / sqrt(2 *
    num_layers) (GPT-2).

    Norm gains stay 1. Each expert draws from its own stream, keyed by (seed, parameter name, global
    expert id), so every expert-parallel size starts from the same model.
    """
    residual_std = std / math.sqrt(2 * num_layers)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                continue
            full_name = f"{module_name}.{name}"
            into_residual = "o_proj" in full_name or full_name.endswith((".down", ".down.weight"))
            scale = residual_std if into_residual else std
            if isinstance(module, Experts):
                if parameter.dim() == 2:  # biases, which start at 0 as vectors elsewhere
                    continue
                for local, expert in enumerate(module.global_ids):
                    values = torch.empty(parameter.shape[1:])
                    values.normal_(0.0, scale, generator=stream_of(seed, full_name, expert))
                    parameter[local].copy_(values)
            elif parameter.dim() > 1:
                values = torch.empty(parameter.shape).normal_(
                    0.0, scale, generator=stream_of(seed, full_name)
                )
                parameter.copy_(values)
