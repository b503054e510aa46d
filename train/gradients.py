"""How gradients spread over a layer's router and experts, by hooks: with tracker.metrics=detailed, in logged steps.

What is summed are squares of the gradients of single micro-batches on single ranks, so nothing large is exchanged. They say
how unevenly experts learn, not how long the step's gradient is, and depend on how the batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from model.moe import MoELayer
from model.transformer import Transformer
from train.routing_metrics import spread_over_layers


class GradientWatch:
    """Sums squared gradients of routers and experts while `measuring`."""

    def __init__(self, module: Transformer, device: torch.device):
        layers = [block.mlp for block in module.blocks if isinstance(block.mlp, MoELayer)]
        self.layers = module.config.moe_layers
        self.measuring = False
        self.sums = torch.zeros(len(layers), 1 + module.config.num_experts, dtype=torch.float64, device=device)
        for row, layer in enumerate(layers):
            layer.router.weight.register_hook(self._hook(row, (0,)))
            places = tuple(1 + expert for expert in layer.experts.global_ids)
            for weight in (layer.experts.gate_up, layer.experts.down):
                weight.register_hook(self._hook(row, places))

    def _hook(self, row: int, places: tuple[int, ...]) -> Callable[[torch.Tensor], None]:
        def add(grad: torch.Tensor) -> None:
            if self.measuring:
                norms = torch.linalg.vector_norm(grad.reshape(len(places), -1), dim=1, dtype=torch.float32)
                self.sums[row, list(places)] += norms.double().square()
        return add

    def reduce(self) -> dict[str, float]:
        """Metrics of the logged step, {} where none was measured; resets. Collective.

        moe/expert_grad_cv: standard deviation over mean of the experts' root sums. moe/router_grad_ratio: the router's root
        sum over that of all its experts together.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.sums)
        sums, self.measuring = self.sums.clone().cpu(), False
        self.sums.zero_()
        if not bool(sums.any()):
            return {}
        experts = sums[:, 1:].sqrt()
        return spread_over_layers({
            "expert_grad_cv": experts.std(1, unbiased=False) / experts.mean(1).clamp_min(1e-30),
            "router_grad_ratio": (sums[:, 0] / sums[:, 1:].sum(1).clamp_min(1e-30)).sqrt()}, self.layers, True)
