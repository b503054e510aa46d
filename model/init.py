"""Initial weights that depend on names and global expert ids only, never on ranks or construction
order.

Modules are built without numbers: a matrix is on the meta device as soon as a module has it
(`matrices_on_meta`), and `materialize` draws one after the other into the dtype that it is trained
in. So no rank ever holds more than its own weights and a piece of one matrix in fp32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from model.config import ModelConfig
from model.moe.experts import Experts
from model.parallel.family import own_part, whole_shape
from model.scaling import first_std

PIECE = 2**22
"""Numbers that are drawn in fp32 at a time. A multiple of 16, by which torch's stream goes on as if
they were drawn at once.
"""
TRUNCATED_AT = 3.0
"""Standard deviations beyond which model.init=truncated_normal draws nothing (OLMoE)."""


def stream_of(*key: object) -> torch.Generator:
    """A stream of random numbers that depends on the key alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@contextmanager
def matrices_on_meta() -> Iterator[None]:
    """Inside, every parameter of two or more dimensions that a module registers is a shape without
    numbers. Vectors begin as constants, which their modules know, and stay as they are.
    """

    def emptied(_: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.dim() < 2 or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # What a hook returns takes the parameter's place, which torch's annotation does not say.
    handle = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def materialize(
    model: nn.Module,
    seed: int,
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    settle: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Give every parameter its numbers: matrices are drawn as model.init says (model/scaling.py has
    the standard deviations).

    Norm gains stay 1, biases 0. Each expert draws from its own stream, keyed by (seed, parameter
    name, global expert id), so every expert-parallel size starts from the same model. Numbers are
    drawn in fp32 and rounded once, as a whole model would be that is built in fp32 and cast.

    settle: is called with each parameter once it has its numbers, before the next is drawn, and may
        leave a part of it in its place (train/engine/partition.py).
    """
    bound = TRUNCATED_AT if config.init == "truncated_normal" else math.inf
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{module_name}.{name}"
            if not parameter.is_meta:
                parameter.data = parameter.data.to(dtype)
            else:
                values = _drawn(module, full_name, parameter, dtype, seed, config, bound)
                real = nn.Parameter(values, requires_grad=parameter.requires_grad)
                real.__dict__.update(parameter.__dict__)  # marks of its family
                module.register_parameter(name, real)
                # No name is left for what `settle` lets go of.
                del values, real
            if settle is not None:
                settle(module.get_parameter(name))


def _drawn(
    module: nn.Module,
    full_name: str,
    parameter: nn.Parameter,
    dtype: torch.dtype,
    seed: int,
    config: ModelConfig,
    bound: float,
) -> torch.Tensor:
    """This rank's part of a matrix, or of its experts'. Drawn as a whole, so that the parts of all
    ranks are those of the same matrix.
    """
    scale = first_std(config, full_name)
    values = torch.empty(whole_shape(parameter), dtype=dtype)
    if not isinstance(module, Experts):
        _fill(values, scale, stream_of(seed, full_name), bound)
    elif parameter.dim() == 2:  # biases
        values.zero_()
    else:
        for local, expert in enumerate(module.global_ids):
            _fill(values[local], scale, stream_of(seed, full_name, expert), bound)
    return own_part(parameter, values)


def _fill(
    values: torch.Tensor, scale: float, stream: torch.Generator, bound: float = math.inf
) -> None:
    """The numbers of `torch.empty(shape).normal_(0, scale)` in fp32, a piece at a time. bound:
    numbers beyond so many standard deviations are not drawn.
    """
    flat, first = values.view(-1), 0
    while first < len(flat):
        left = len(flat) - first
        # Fewer than 16 would be drawn in another way.
        size = PIECE if left >= PIECE + 16 else left
        piece = torch.empty(size)
        if bound == math.inf:
            piece.normal_(0.0, scale, generator=stream)
        else:
            # By the inverse of the distribution, so that every number takes one from the stream.
            edge = math.erf(bound / math.sqrt(2))
            piece.uniform_(-edge, edge, generator=stream).erfinv_().mul_(scale * math.sqrt(2))
            piece.clamp_(-bound * scale, bound * scale)
        flat[first : first + size].copy_(piece)
        first += size
