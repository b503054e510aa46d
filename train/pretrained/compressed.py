"""Weights of 8-bit floats in an exported folder, as compressed-tensors describes them: a scale for
each row of every linear layer (its preset FP8_DYNAMIC, which vLLM computes experts from).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from model.families.names import Parts, further_parts, parts_of
from model.families.reading import CHANNEL_SCALES, FamilyError, Reading, Settings

if TYPE_CHECKING:
    import torch

OWN_LAYERS = ("router.weight", "shared_gate.weight")
"""Endings of our names of matrices in a layer that stay as they are: small, and they decide."""
MOST_MOVED = 0.25
"""Of the standard deviation of the logits: the root mean square that rounding to 8 bits may move
them by. A matrix product of 3 mantissa bits is off by about 0.026 of itself.
"""
NOTE = (
    "engines that compute with these weights round activations to 8 bits as well, with a scale for "
    "each token, which verify=true does not: it holds the stored numbers against the checkpoint"
)


def in_fp8(reading: Reading) -> tuple[list[str], Settings]:
    """Names on disk of the weights that become 8-bit floats, and the quantization_config that says
    so.

    Raises:
        FamilyError: the layout cannot say it of this family.
    """
    if reading.family.attention == "compressed":
        raise FamilyError(
            [
                f"dtype=fp8: the files of {reading.family.model_type} have a layout of 8-bit "
                "floats of their own, which is read and not written; give dtype=bf16"
            ]
        )
    parts = dict(parts_of(reading))
    for number in range(reading.num_further_layers):
        parts |= further_parts(reading, number)
    names = linear_layers(parts, reading.family.model_type)
    return names, scheme(parts, names)


def linear_layers(parts: Parts, family: str) -> list[str]:
    """Names on disk of the matrices that become 8-bit floats: all linear layers of the blocks but
    routers and gates.

    Raises:
        FamilyError: the family's files stack experts into one tensor, which has no module that a
            target of compressed-tensors could name.
    """
    found = []
    for key, several in parts.items():
        if not key.startswith("blocks.") or key.endswith(OWN_LAYERS):
            continue
        for part in several:
            if part.index is not None:
                raise FamilyError(
                    [
                        f"dtype=fp8: the files of {family} hold the experts of a layer in one "
                        f"tensor ({part.name}), which compressed-tensors has no name for; give "
                        "dtype=bf16, which vLLM can make fp8 of while it loads"
                    ]
                )
            if len(part.shape) == 2:
                found.append(part.name)
    return found


def scheme(parts: Parts, quantised: list[str]) -> Settings:
    """quantization_config of config.json: FP8_DYNAMIC of compressed-tensors for all linear layers,
    and by name those that are left as they are.
    """
    eight_bits: Settings = {"num_bits": 8, "type": "float", "symmetric": True}
    names = {part.name for several in parts.values() for part in several if len(part.shape) == 2}
    left = sorted(
        name.removesuffix(".weight")
        for name in names - set(quantised)
        if name.endswith(".weight") and "embed_tokens" not in name
    )
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": list(dict.fromkeys([*left, "lm_head"])),
        "kv_cache_scheme": None,
    }


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, C] -> e4m3 [R, C] and bf16 scales [R, 1], whose product is nearest to the weight: the
    scale of a row is its largest magnitude over 448, 1 for a row of zeros.

    Raises:
        ValueError: a number is not finite.
    """
    import torch

    from ops.grouped_mlp.fp8 import FP8, LARGEST

    weight = weight.float()
    if not weight.isfinite().all():
        raise ValueError("has numbers that are not finite")
    largest = weight.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0).to(torch.bfloat16)
    # A scale below the least bf16 number would be 0; its row is then all but 0 as well.
    scale = scale.clamp_min(torch.finfo(torch.bfloat16).tiny)
    small = (weight / scale.float()).clamp(-LARGEST, LARGEST)
    return small.to(FP8), scale


def with_scales(
    shapes: Mapping[str, tuple[int, ...]], quantised: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """The tensors of a folder, each weight followed by the scales of its rows."""
    of_rows = set(quantised)
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        found[name] = shape
        if name in of_rows:
            found[name + CHANNEL_SCALES] = (shape[0], 1)
    return found


def dtypes_of(quantised: Sequence[str]) -> dict[str, Any]:
    """Dtypes of those weights and of their scales."""
    import torch

    weights = dict.fromkeys(quantised, torch.float8_e4m3fn)
    return weights | {name + CHANNEL_SCALES: torch.bfloat16 for name in quantised}
