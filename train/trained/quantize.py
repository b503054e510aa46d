"""Experts of 8 bits for a trained run: made, measured against the run's own, kept beside it."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.loss import IGNORE_INDEX
from model.moe.layer import MoELayer
from model.request import ForwardRequest
from model.transformer import Transformer
from ops.grouped_mlp import dequantized, quantize_rows
from ops.grouped_mlp.eight_bit import DTYPES
from ops.grouped_mlp.spec import Stored
from train.data.loader import Batch
from train.files.manifest import MANIFEST
from train.pretrained.eight_bit import load_eight_bit
from train.trained.budgets import ratio_interval

FOLDER = "quantized"


def quantized_path(run_dir: Path, checkpoint: str, stored: Stored) -> Path:
    return run_dir / FOLDER / f"{checkpoint}-{stored}.safetensors"


def made_of(checkpoint: Path) -> str:
    """What names the content of a checkpoint: its manifest has the checksums of all files."""
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


def use_eight_bit(model: Transformer, run_dir: Path, checkpoint: Path, weights: str) -> None:
    """Put the run's experts of 8 bits in place of the model's, where weights is int8 or fp8.

    Raises:
        ValueError: there are none, or they do not fit.
    """
    if weights not in DTYPES:
        return
    path = quantized_path(run_dir, checkpoint.name, weights)
    if not path.is_file():
        raise ValueError(
            f"weights={weights}: {path} does not exist; make it: python -m launch.quantize "
            + shlex.quote(f"run={run_dir}")
            + f" weights={weights}"
        )
    layers = model.moe_layers()
    kept = load_eight_bit(path, len(layers), made_of(checkpoint), weights)
    for layer, stacks in zip(layers, kept, strict=True):
        layer.experts.hold_eight_bit(**stacks)


def quantized(layer: MoELayer, stored: Stored) -> dict[str, Tensor]:
    """The experts of a layer in 8 bits, as Experts.hold_eight_bit takes them."""
    experts = layer.experts
    gate_up, gate_up_scales = quantize_rows(experts.gate_up, stored)
    down, down_scales = quantize_rows(experts.down, stored)
    return {
        "gate_up": gate_up,
        "gate_up_scales": gate_up_scales,
        "down": down,
        "down_scales": down_scales,
    }


def expert_errors(layer: MoELayer, stacks: dict[str, Tensor]) -> list[float]:
    """Of every expert the length of what rounding took from its weights, over their own."""
    squares = [torch.zeros(2, dtype=torch.float64) for _ in range(len(stacks["down"]))]
    for name in ("gate_up", "down"):
        weight = getattr(layer.experts, name).detach()
        for e, square in enumerate(squares):
            exact = weight[e].double()
            error = dequantized(stacks[name][e], stacks[f"{name}_scales"][e]).double() - exact
            square += torch.stack((error.square().sum(), exact.square().sum())).cpu()
    return [float((s[0] / s[1].clamp_min(1e-300)).sqrt()) for s in squares]


@dataclass(frozen=True)
class HeldOut:
    """What a model makes of held-out text."""

    sums: Tensor
    """[rows] fp64 summed losses; counts: [rows] fp64 their targets."""
    counts: Tensor
    expert_ids: list[Tensor]
    """By batch [MoE layers, tokens, K] int16, without padding."""


@torch.no_grad()
def measure(
    model: Transformer, batches: Callable[[], Iterator[Batch]], device: torch.device
) -> HeldOut:
    """Losses by row and the experts that every token visits."""
    sums, counts, ids = [], [], []
    for batch in batches():
        given = batch.inputs(device)
        output = model(given, ForwardRequest(keep_routing=True))
        sums.append(output.token_losses.double().sum(1).cpu())
        counts.append((given.targets != IGNORE_INDEX).sum(1).double().cpu())
        chosen = torch.stack([routing.expert_ids for routing in output.routings])
        if given.token_mask is not None:
            chosen = chosen[:, given.token_mask.flatten()]
        ids.append(chosen.to(torch.int16).cpu())
    return HeldOut(torch.cat(sums), torch.cat(counts), ids)


@dataclass(frozen=True)
class Comparison:
    """Of a model with its quantised self, on the same held-out rows."""

    loss: float
    quantized_loss: float
    difference: float
    low: float
    high: float
    """95% of the difference, over rows."""
    agreement: list[float]
    """By layer: the share of chosen experts that stay chosen."""
    same_set: list[float]
    """By layer: the share of tokens whose experts are all the same."""
    tokens_of_experts: list[list[int]]
    """By layer and expert, of the unquantised model: what was measured with few tokens says
    little.
    """


def compare(before: HeldOut, after: HeldOut, num_experts: int) -> Comparison:
    """Args: before, after: of the same rows."""
    difference, low, high = ratio_interval(after.sums - before.sums, before.counts)
    total = float(before.counts.sum())
    chosen = kept = same = tokens = None
    counts: Tensor | None = None
    for one, other in zip(before.expert_ids, after.expert_ids, strict=True):
        was, now = (_membership(ids, num_experts) for ids in (one, other))
        here = was.sum((1, 2)), (was & now).sum((1, 2)), (was == now).all(2).sum(1)
        number = was.sum(1)
        if chosen is None or kept is None or same is None or counts is None or tokens is None:
            (chosen, kept, same), counts, tokens = here, number, one.shape[1]
        else:
            chosen, kept, same = chosen + here[0], kept + here[1], same + here[2]
            counts, tokens = counts + number, tokens + one.shape[1]
    assert chosen is not None and kept is not None and same is not None
    assert counts is not None and tokens is not None
    return Comparison(
        loss=float(before.sums.sum()) / total,
        quantized_loss=float(after.sums.sum()) / total,
        difference=difference,
        low=low,
        high=high,
        agreement=(kept.double() / chosen.clamp_min(1)).tolist(),
        same_set=(same.double() / max(1, tokens)).tolist(),
        tokens_of_experts=counts.tolist(),
    )


def _membership(ids: Tensor, num_experts: int) -> Tensor:
    """[layers, tokens, K] -> [layers, tokens, num_experts] bool."""
    found = torch.zeros((*ids.shape[:2], num_experts + 1), dtype=torch.bool)
    # -1, a slot without an expert, counts in a column of its own
    found.scatter_(2, torch.where(ids < 0, num_experts, ids).long(), True)
    return found[..., :num_experts]


def sizes(model: Transformer) -> dict[str, Any]:
    """Bytes of the weights by group, and what stays as it is."""
    experts = {p for layer in model.moe_layers() for p in layer.experts.parameters()}
    before = sum(p.numel() * p.element_size() for p in experts)
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if p not in experts)
    return {"experts": before, "others": rest}


LEAST_SHARE = 0.95
"""Of the numbers in the experts' matrices that must have become 8 bits."""


def left_out(model: Transformer) -> dict[str, dict[str, int]]:
    """What stays as it is: by group of parameters, the number of them and their bytes. A
    group is named as in the model, without the numbers of its layers.

    Raises:
        ValueError: more than a twentieth of the experts' matrices is among them: what is called
            8 bits would be something else.
    """
    matrices = {
        p for layer in model.moe_layers() for p in layer.experts.parameters() if p.dim() == 3
    }
    scales = {
        getattr(layer.experts, name)
        for layer in model.moe_layers()
        for name in ("gate_up_scales", "down_scales")
        if hasattr(layer.experts, name)
    }
    found: dict[str, dict[str, int]] = {}
    whole = kept = 0
    for name, parameter in model.named_parameters():
        number = parameter.numel()
        if parameter in scales:
            continue
        whole += number * (parameter in matrices)
        if parameter.dtype in DTYPES.values():
            continue
        kept += number * (parameter in matrices)
        group = found.setdefault(_group(name), {"parameters": 0, "bytes": 0})
        group["parameters"] += number
        group["bytes"] += number * parameter.element_size()
    if kept > (1 - LEAST_SHARE) * whole:
        raise ValueError(
            f"{kept:,} of the {whole:,} numbers in the experts' matrices would stay as they are, "
            f"more than {1 - LEAST_SHARE:.0%}: these are no experts of 8 bits; nothing was written"
        )
    return found


def _group(name: str) -> str:
    """ "blocks.3.mlp.experts.down_bias" -> "mlp.experts"."""
    parts = [part for part in name.split(".")[:-1] if part != "blocks" and not part.isdecimal()]
    return ".".join(parts[: 2 if parts[0] == "mlp" else 1])
