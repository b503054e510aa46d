"""Experts of 8-bit weights as a safetensors file, bound to the checkpoint they were made of."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ops.grouped_mlp.eight_bit import DTYPES
from ops.grouped_mlp.spec import Stored
from train.files.durable import replacing
from train.files.manifest import require_owned

NAMES = ("gate_up", "gate_up_scales", "down", "down_scales")
"""Of a layer: 8 bits, fp32, 8 bits, fp32."""


def save_eight_bit(path: Path, layers: list[dict[str, Tensor]], made_of: str) -> None:
    """Write the experts of all MoE layers. made_of: names the checkpoint's content."""
    from safetensors.torch import save_file

    tensors = {
        f"layers.{i}.{name}": layer[name].contiguous().cpu()
        for i, layer in enumerate(layers)
        for name in NAMES
    }
    with replacing(path) as scratch:
        save_file(tensors, scratch, {"made_of": made_of})


def load_eight_bit(
    path: Path, num_layers: int, made_of: str, stored: Stored
) -> list[dict[str, Tensor]]:
    """The experts of all MoE layers.

    Raises:
        ValueError: the file is damaged, another model's, or made of other weights.
        CheckpointError: it is another user's.
    """
    from safetensors import SafetensorError, safe_open

    require_owned(path)
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("made_of")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}); {AGAIN} weights={stored}") from error
    again = f"{AGAIN} weights={stored}"
    if found != made_of:
        raise ValueError(f"{path} was made of other weights than the checkpoint has; {again}")
    expected = {f"layers.{i}.{name}" for i in range(num_layers) for name in NAMES}
    kinds = dict.fromkeys(("gate_up", "down"), DTYPES[stored])
    if set(tensors) != expected or any(
        tensor.dtype != kinds.get(name.rpartition(".")[2], torch.float32)
        for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path} has other experts than the model; {again}")
    return [{name: tensors[f"layers.{i}.{name}"] for name in NAMES} for i in range(num_layers)]


AGAIN = "write it anew: python -m launch.quantize run=RUN"
