"""How gradients spread over a layer's router, experts and tokens, by hooks: with
tracker.metrics=detailed, in logged steps.

What is summed of weights are squares of the gradients of single micro-batches on single ranks, so
nothing large travels. They say how unevenly experts learn, not how long the step's gradient is, and
depend on how the batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from model.moe.layer import MoELayer
from model.transformer import Transformer
from train.agenda import Step
from train.observe.base import Ask, Observer
from train.observe.routing import spread_over_layers


class GradientWatch(Observer):
    """Sums, while `measuring`: squared gradients of routers and experts; the router's part of the
    gradient of tokens.
    """

    def __init__(self, module: Transformer, device: torch.device):
        layers = module.moe_layers()
        self.layers, self.rows = module.config.moe_layers, module.part.moe
        self.measuring = False
        # router, experts, router's parts of tokens, tokens
        self.sums = torch.zeros(
            len(layers), 1 + module.config.num_experts + 2, dtype=torch.float64, device=device
        )
        for row, layer in enumerate(layers):
            layer.router.weight.register_hook(self._hook(row, (0,)))
            places = tuple(1 + expert for expert in layer.experts.global_ids)
            for weight in layer.experts.parameters():
                weight.register_hook(self._hook(row, places))
            self._watch_tokens(row, layer)

    def begin_step(self, step: Step) -> Ask:
        self.measuring = step.logs
        return Ask.NOTHING

    def log(self, step: Step) -> dict[str, Any]:
        """Collective."""
        return self.reduce()

    def _hook(self, row: int, places: tuple[int, ...]) -> Callable[[torch.Tensor], None]:
        def add(grad: torch.Tensor) -> None:
            if self.measuring:
                norms = torch.linalg.vector_norm(
                    grad.reshape(len(places), -1), dim=1, dtype=torch.float32
                )
                self.sums[row, list(places)] += norms.double().square()

        return add

    def _watch_tokens(self, row: int, layer: MoELayer) -> None:
        """Names the layer's input and the router's copy of it, so that each has a gradient of its
        own.
        """
        through_router: list[torch.Tensor] = []

        def whole(grad: torch.Tensor) -> None:
            routed = (
                through_router.pop().view_as(grad) if through_router else torch.zeros_like(grad)
            )
            parts = [
                torch.linalg.vector_norm(g, dim=-1, dtype=torch.float32)
                for g in (routed, grad - routed)
            ]
            total = parts[0] + parts[1]
            self.sums[row, -2] += (parts[0] / total.clamp_min(1e-30)).double().sum()
            self.sums[row, -1] += (total > 0).sum()

        def name(inputs: tuple[Any, ...], hook: Callable[[torch.Tensor], None]) -> tuple[Any, ...]:
            hidden, *rest = inputs
            if self.measuring and hidden.requires_grad:
                hidden = hidden.view_as(hidden)
                hidden.register_hook(hook)
            return hidden, *rest

        layer.register_forward_pre_hook(lambda _, inputs: name(inputs, whole))
        layer.router.register_forward_pre_hook(
            lambda _, inputs: name(inputs, through_router.append)
        )

    def reduce(self) -> dict[str, float]:
        """Metrics of the logged step, {} where none was measured; resets. Collective.

        moe/expert_grad_cv: standard deviation over mean of the experts' root sums.
        moe/router_grad_ratio: the router's root sum over that of all its experts together.
        moe/gate_grad_share: of a token's gradient at the layer's input, the norm of what came
        through the router (gates, balance, z-loss) over that plus the norm of the rest, mean over
        tokens.
        """
        whole = self.rows.placed(self.sums).clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(whole)
        sums, self.measuring = whole.cpu(), False
        self.sums.zero_()
        if not bool(sums.any()):
            return {}
        experts = sums[:, 1:-2].sqrt()
        return spread_over_layers(
            {
                "expert_grad_cv": experts.std(1, unbiased=False) / experts.mean(1).clamp_min(1e-30),
                "router_grad_ratio": (sums[:, 0] / sums[:, 1:-2].sum(1).clamp_min(1e-30)).sqrt(),
                "gate_grad_share": sums[:, -2] / sums[:, -1].clamp_min(1),
            },
            self.layers,
            True,
        )
