"""Held-out loss, perplexity, bits per byte and routing statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from model.balance import balance_metrics
from model.loss import IGNORE_INDEX, ModelOutput
from train.data.loader import Batch


@torch.no_grad()
def evaluate(forward: Callable[..., ModelOutput], batches: Iterable[Batch], token_bytes: np.ndarray,
             device: torch.device) -> dict[str, Any]:
    """Sums over every rank's batches, divided once at the end. Collective: all ranks have as many batches.

    Returns:
        val_loss (nats per token), perplexity, bits_per_byte (nats of all targets over the bytes they stand for), the
        number of targets, balance metrics, and the counts [layers][experts].
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    counts: torch.Tensor | None = None
    for batch in batches:
        output = forward(**batch.inputs(device))
        targets = batch.targets[batch.targets != IGNORE_INDEX].numpy()
        sums[0] += output.loss_sum
        sums[1] += len(targets)
        sums[2] += int(token_bytes[targets].sum())
        counts = output.counts if counts is None else counts + output.counts
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
        if counts is not None and counts.numel():
            dist.all_reduce(counts)
    loss_sum, num_targets, num_bytes = sums.tolist()
    if num_targets == 0:
        raise ValueError("the held-out split has no token to predict; raise data.validation_fraction")
    loss = loss_sum / num_targets
    result: dict[str, Any] = {
        "val_loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss_sum / math.log(2) / num_bytes if num_bytes else math.nan,
        "num_targets": int(num_targets),
    }
    if counts is not None and counts.numel():
        result.update(balance_metrics(counts.cpu()))
        result["counts"] = counts.tolist()
    return result
