"""Top-k routing: the same number of experts for every token."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from model.config import ModelConfig
from model.parallel import ParallelGroups
from model.routers.base import Routing


class TopKRouter(nn.Module):
    """Each token visits the `top_k` experts with the highest score + bias; ties go to the lower expert id.

    score_function: "softmax" over the experts (Switch, arXiv 2101.03961) or "sigmoid" per expert (DeepSeek-V3,
        arXiv 2412.19437). Logits and scores are fp32 whatever the precision of the model.
    normalize_weights: gates of a token sum to 1. With top_k = 1 this would make every gate 1 and starve the router of
        gradient, so it is refused.
    scaling_factor: multiplies the gates (routed_scaling_factor).
    """

    def __init__(self, config: ModelConfig, groups: ParallelGroups, layer_idx: int, *, top_k: int,
                 score_function: Literal["softmax", "sigmoid"] = "softmax", normalize_weights: bool = True,
                 scaling_factor: float = 1.0):
        super().__init__()
        found = self.problems(config, top_k=top_k, score_function=score_function,
                              normalize_weights=normalize_weights, scaling_factor=scaling_factor)
        if found:
            raise ValueError("; ".join(found))
        self.max_top_k = top_k
        self.score_function = score_function
        self.normalize_weights = normalize_weights
        self.scaling_factor = scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.balance_bias: torch.Tensor
        self.register_buffer("balance_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    @staticmethod
    def problems(config: ModelConfig, *, top_k: int, score_function: str = "softmax", normalize_weights: bool = True,
                 scaling_factor: float = 1.0) -> list[str]:
        """Contradictions between the router's knobs and the model, for launch.validate."""
        found = []
        if not 1 <= top_k <= config.num_experts:
            found.append(f"router.top_k is {top_k}; it must be between 1 and model.num_experts {config.num_experts}")
        if score_function not in ("softmax", "sigmoid"):
            found.append(f"router.score_function is {score_function!r}; choose softmax or sigmoid")
        if top_k == 1 and normalize_weights:
            found.append("router.normalize_weights with router.top_k=1 makes every gate 1, so the router would get no "
                         "gradient; set router.normalize_weights=false")
        if scaling_factor <= 0:
            found.append(f"router.scaling_factor is {scaling_factor}; it must be positive")
        return found

    def forward(self, hidden: torch.Tensor, token_mask: torch.Tensor | None = None) -> Routing:
        """hidden [T, hidden_size] -> Routing with max_top_k = top_k slots."""
        logits = F.linear(hidden.float(), self.weight.float())
        log_z = logits.logsumexp(-1)
        scores = logits.softmax(-1) if self.score_function == "softmax" else logits.sigmoid()
        ranked = (scores.detach() + self.balance_bias).sort(dim=-1, descending=True, stable=True)
        expert_ids = ranked.indices[:, : self.max_top_k].contiguous()
        weights = scores.gather(1, expert_ids)
        if self.normalize_weights:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        weights = weights * self.scaling_factor
        if token_mask is not None:
            expert_ids = expert_ids.masked_fill(~token_mask.unsqueeze(1), -1)
            weights = weights.masked_fill(~token_mask.unsqueeze(1), 0.0)
        return Routing(weights, expert_ids, scores, log_z)
