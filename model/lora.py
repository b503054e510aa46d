"""Low-rank adapters (LoRA, arXiv 2106.09685): a weight that stays as it is plus the product of two
thin matrices that are trained.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdaptedLinear(nn.Linear):
    """y = x W^T + bias + scale * (x A^T) B^T, with A [r, in] as lora_a and B [out, r] as lora_b. B
    starts at 0, so that nothing changes before the first step.

    Takes over weight and bias of a plain layer, whose names stay.
    """

    def __init__(self, plain: nn.Linear, rank: int, scale: float):
        super().__init__(
            plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta"
        )
        self.weight, self.bias = plain.weight, plain.bias
        self.scale = scale
        self.lora_a = nn.Parameter(plain.weight.new_empty(rank, plain.in_features))
        self.lora_b = nn.Parameter(plain.weight.new_zeros(plain.out_features, rank))

    def forward(self, input: Tensor) -> Tensor:
        low: Tensor = F.linear(F.linear(input, self.lora_a), self.lora_b)
        return super().forward(input) + self.scale * low


def weight_of(layer: nn.Linear) -> Tensor:
    """[out, in], what a layer multiplies with, adapter included."""
    if isinstance(layer, AdaptedLinear):
        return torch.addmm(layer.weight, layer.lora_b, layer.lora_a, alpha=layer.scale)
    return layer.weight


def draw(a: Tensor, generator: torch.Generator) -> None:
    """Fill A [r, in] as torch's own linear layers begin: uniform within 1 / sqrt(in), which is what
    peft begins with.
    """
    bound = 1 / math.sqrt(a.shape[-1])
    a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))


def adapter_names(parameter: str) -> tuple[str, str]:
    """Names of A and B of a parameter: of a linear layer's weight, of a stack of experts, or of one
    of its experts ("...experts.gate_up.3").
    """
    if parameter.endswith(".weight"):
        layer = parameter.removesuffix("weight")
        return f"{layer}lora_a", f"{layer}lora_b"
    stack, _, expert = parameter.rpartition(".")
    if not expert.isdecimal():
        stack, expert = parameter, ""
    module, _, name = stack.rpartition(".")
    end = f".{expert}" if expert else ""
    return f"{module}.lora_{name}_a{end}", f"{module}.lora_{name}_b{end}"


def is_adapter(parameter: str) -> bool:
    """Whether a parameter, or one expert of it, is an A or a B."""
    last = parameter.rpartition(".")
    name = last[0].rpartition(".")[2] if last[2].isdecimal() else last[2]
    return name.startswith("lora_")
