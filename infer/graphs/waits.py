"""What in a model makes a decoding step wait for the host, so that no graph can hold it."""

from __future__ import annotations

import torch

from model.paging import is_bounded
from model.transformer import Transformer
from ops.router import select_backend

STATIC = ("triton", "grouped_mm")
"""Back-ends of the experts whose launches do not hang on how many tokens an expert has."""


def why_not(model: Transformer) -> list[str]:
    """Why the model's decoding steps cannot be CUDA graphs; none: they can."""
    device = model.any_weight.device
    if device.type != "cuda":
        return [f"the model is on {device.type}, and graphs are of a CUDA device"]
    return waits(model, device)


def waits(model: Transformer, device: torch.device) -> list[str]:
    """Its parts that, on a device, have the host read a number there, or that wait for ranks."""
    found = []
    if model.groups.expert_size > 1:
        found.append(
            f"experts are spread over {model.groups.expert_size} ranks, which agree on every step"
        )
    if any(attention.spec.num_levels == 2 for attention in model.sparse_attentions()):
        found.append("attention.num_levels=2 reads the lengths of rows on the host")
    if is_bounded(model):
        found.append("attention.resident_blocks reads the lengths of rows on the host, to evict")

    layers = model.moe_layers()
    if layers and select_backend(device, torch.float32) != "fused":
        found.append("the router's fused kernel is not there, and plain torch reads its buffers")
    backends = {layer.experts.backend_on(device, model.any_weight.dtype) for layer in layers}
    for name in sorted(backends - set(STATIC)):
        found.append(f"experts.backend={name} reads how many tokens every expert has")
    return found
