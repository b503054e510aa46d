"""The contract between routers and everything behind them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Routing(NamedTuple):
    """Which experts each token visits. A NamedTuple so that ZeRO-3's hooks find the tensors inside.

    weights: [T, max_top_k] fp32 gates, 0 where unused.
    expert_ids: [T, max_top_k] int64, -1 where unused: an adaptive router may pick fewer.
    scores: [T, num_experts] fp32 in [0, 1], before selection bias and renormalisation; for balance and statistics.
    log_z: [T] fp32, log-sum-exp of the router logits, for the z-loss.
    """

    weights: torch.Tensor
    expert_ids: torch.Tensor
    scores: torch.Tensor
    log_z: torch.Tensor


class Router(Protocol):
    """Called once per layer and micro-batch.

    hidden: [T, hidden_size]; token_mask: [T] bool, False for padding, which visits no expert; None when nothing is padded.
    max_top_k: slots per token of the Routing it returns.
    balance_bias: [num_experts] fp32 buffer added to the scores for selection only (loss-free balancing).
    """

    max_top_k: int
    balance_bias: torch.Tensor

    def __call__(self, hidden: torch.Tensor, token_mask: torch.Tensor | None = None) -> Routing: ...
