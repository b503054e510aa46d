"""QK-clip (Kimi K2, arXiv 2507.20534, section 2.1): after an update, the projections of a head
whose largest attention logit S was above the threshold are scaled so that its logits shrink by
threshold / S. Muon lets attention logits grow; with it this makes MuonClip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from model.loss import ModelOutput
from model.transformer import Transformer
from train.engine.deepspeed import Engine


class Clipped(NamedTuple):
    """What a clip has found."""

    largest: float
    """Attention logit of the step, over layers, heads, ranks and micro-batches."""
    num_heads: int
    """Heads that were scaled."""


class QkClip:
    """Collects the largest logits of a step's micro-batches, and clips after its update.

    Args:
        threshold: what logits are held to.
        interval: every so many steps they are measured; in the others nothing is clipped.
    """

    def __init__(self, threshold: float, interval: int):
        self.threshold, self.interval = threshold, interval
        self._largest: torch.Tensor | None = None

    def is_due(self, step: int) -> bool:
        """Whether step number `step`, the first of which is 1, is measured."""
        return step % self.interval == 0

    def see(self, output: ModelOutput) -> None:
        """Take in a micro-batch that was measured."""
        found = output.largest_logits.detach()
        self._largest = found if self._largest is None else torch.maximum(self._largest, found)

    def apply(self, engine: Engine) -> Clipped:
        """Clip by what was seen since the last time. The largest of all ranks is the same on each,
        and so is what they do. Collective.
        """
        largest, self._largest = self._largest, None
        assert largest is not None  # a step has a micro-batch
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        factors = (self.threshold / largest).where(largest > self.threshold, 1.0)
        rows = clipped_rows(engine.module, factors)
        if rows:
            engine.scale_rows(rows)
        return Clipped(float(largest.max()), int((factors < 1).sum()))

    def forget(self) -> None:
        """Leave out what was seen: the step was skipped."""
        self._largest = None


def clipped_rows(model: Transformer, factors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameter -> factors on its rows, of the layers in which a head is clipped. factors:
    [layers, heads], in the order of Transformer.attentions.
    """
    acting = (factors < 1).any(1).tolist()
    return {
        f"{name}.{key}": rows
        for (name, attention), layer, acts in zip(model.attentions(), factors, acting, strict=True)
        if acts
        for key, rows in attention.clipped_rows(layer).items()  # type: ignore[operator]
    }
