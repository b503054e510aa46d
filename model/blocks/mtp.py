"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): modules behind the model,
each of which predicts one token further ahead, as an objective of training. Generation does without
them.
"""

from __future__ import annotations

import torch
from torch import nn

from model.attention.base import AttentionSums, SequenceLayout
from model.blocks.block import Block
from model.config import ModelConfig
from model.layers import RMSNorm
from model.loss import is_ahead
from model.moe.balance import RouterSums
from model.moe.layer import ModelParts
from model.parallel.groups import ParallelGroups
from model.request import TokenBatch
from model.routers.base import RoutingRequest
from ops.router import RouterOutput


class PredictionModule(nn.Module):
    """From what the model, or the module before, makes of a token, and from the embedding of a
    later token, to what the shared head projects: the norms of both side by side, a projection
    [2D -> D], and a block with experts as the model's last layers have them.

    Module k, from 0, sees token i + k + 1 at position i, and predicts the one behind it. Both what
    it gets and what it returns is normalised, as in DeepSeek's and GLM's published modules.
    """

    def __init__(self, config: ModelConfig, groups: ParallelGroups, parts: ModelParts, number: int):
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.embedding_norm, self.hidden_norm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.projection = nn.Linear(2 * size, size, bias=False)
        self.block = Block(config, groups, parts, config.num_layers + number)
        self.norm = RMSNorm(size, eps)

    def forward(
        self,
        hidden: torch.Tensor,
        embedded: torch.Tensor,
        layout: SequenceLayout,
        request: RoutingRequest,
    ) -> tuple[torch.Tensor, AttentionSums | None, RouterSums | None, RouterOutput | None]:
        """hidden [B, S, D], embedded [B, S, D] of the tokens ahead -> [B, S, D], and the sums of
        its block.
        """
        both = torch.cat((self.embedding_norm(embedded), self.hidden_norm(hidden)), -1)
        out, attention, balance, routing = self.block(self.projection(both), layout, request)
        return self.norm(out), attention, balance, routing


def tokens_ahead(batch: TokenBatch, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands `number` tokens further on in a token's own document.

    Returns:
        ids [B, S] int64, 0 where the document or the row ends before; and [B, S] bool, whether
        there is such a token, and neither is padding.
    """
    there = is_ahead(batch.positions, number)
    if batch.token_mask is not None:
        there = there & batch.token_mask
    return torch.where(there, batch.input_ids.roll(-number, 1), 0), there
