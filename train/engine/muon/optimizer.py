"""Muon: matrices move by an orthogonalised momentum, everything else by AdamW.

    m <- momentum m + (1 - momentum) g                        of the clipped gradient g
    u <- momentum m + (1 - momentum) g  (nesterov), or m
    w <- (1 - lr weight_decay) w - lr update_rms sqrt(max(rows, columns)) orthogonalize(u)

An orthogonal matrix has elements of root mean square 1 / sqrt(max(rows, columns)), so that an
update has lr update_rms: 0.2 is about AdamW's, and learning rates and weight decays carry over.

Sources: K. Jordan et al., Muon (2024); J. Liu et al., Muon is scalable for LLM training
(arXiv 2502.16982), for the scale and the weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from train.config.training import OptimConfig
from train.engine.average import MovingAverage
from train.engine.muon.exchange import Layout
from train.engine.muon.orthogonalize import orthogonalize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOMENTUM = "momentum_buffer"
"""Muon's one state of a parameter, by torch's name for it."""


class Muon(torch.optim.AdamW):
    """Groups with `muon` true move by Muon, the others are AdamW's.

    A group's parameters may be the flat slices that ZeRO makes of them. Where the matrices lie in
    each is told by `place`, before the first step.

    Args:
        groups: of train.engine.optimizer.parameter_groups.
        config: the settings of both.
        fused: AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, fused: bool):
        super().__init__(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused
        )
        self.settings = config
        self.layouts: dict[Tensor, Layout] = {}
        self.device: torch.device | None = None
        self.average: MovingAverage | None = None

    def place(self, layouts: dict[Tensor, Layout], device: torch.device) -> None:
        """Say what the parameters of Muon's groups are made of.

        Args:
            layouts: of every one of them, as they are when `step` is called.
            device: where matrices are orthogonalised and exchanged; the parameters may lie on the
                host.
        """
        self.layouts, self.device = layouts, device

    @property
    def sent_bytes(self) -> int:
        """What this rank sends for one update: pieces there, and updates back."""
        width = DTYPES[self.settings.orthogonalize_dtype].itemsize
        return width * sum(layout.exchanged for layout in self.layouts.values())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update everything that has a gradient. Collective over the ranks that share a cut
        matrix.
        """
        groups = self.param_groups
        # AdamW would take every group that it sees, and ZeRO shows them one by one.
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            result = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                for master in group["params"]:
                    if master.grad is not None:
                        self._update(master, group["lr"], group["weight_decay"])
        if self.average is not None:
            self.average.follow(self)
        return result

    def _update(self, master: Tensor, lr: float, weight_decay: float) -> None:
        settings, layout = self.settings, self.layouts[master]
        dtype = DTYPES[settings.orthogonalize_dtype]
        gradient, flat = master.grad, master.view(-1)
        assert gradient is not None
        gradient = gradient.view(-1)

        state = self.state[master]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(master)
        momentum = state[MOMENTUM].view(-1)
        momentum.lerp_(gradient, 1 - settings.momentum)
        flat.mul_(1 - lr * weight_decay)

        def source(offset: int, size: int) -> Tensor:
            part = momentum[offset : offset + size]
            if settings.nesterov:
                part = gradient[offset : offset + size].lerp(part, settings.momentum)
            found: Tensor = part.to(self.device, dtype)
            return found

        def function(matrices: Tensor) -> Tensor:
            return orthogonalize(matrices, settings.orthogonalize_steps)

        def sink(offset: int, rows: int, columns: int, update: Tensor) -> None:
            scale = lr * settings.update_rms * math.sqrt(max(rows, columns))
            part = flat[offset : offset + len(update)]
            part.add_(update.to(part.device, part.dtype), alpha=-scale)

        layout.update(source, function, sink)
