"""The decoder-only transformer: embedding, blocks, head, loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.attention.base import KVCache, SequenceLayout, document_mask, has_varlen_kernel
from model.balance import RouterSums, auxiliary_loss_sum
from model.config import ModelConfig
from model.init import initialize_parameters
from model.layers import GatedMLP, RMSNorm, rotary_tables
from model.loss import ModelOutput, cross_entropy_sum
from model.moe import ModelParts, MoELayer
from model.parallel import ParallelGroups
from model.routers.base import Router


class Block(nn.Module):
    """Pre-norm residual block: attention, then a dense MLP or an MoE layer."""

    def __init__(self, config: ModelConfig, groups: ParallelGroups, parts: ModelParts, layer_idx: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = parts.attention(config, layer_idx=layer_idx)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp: nn.Module
        if config.is_moe_layer(layer_idx):
            self.mlp = MoELayer(config, groups, parts, layer_idx)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: torch.Tensor, layout: SequenceLayout, token_mask: torch.Tensor | None,
                cache: KVCache | None = None) -> tuple[torch.Tensor, RouterSums | None]:
        hidden = hidden + self.attention(self.attention_norm(hidden), layout, cache)
        normed = self.mlp_norm(hidden)
        if isinstance(self.mlp, MoELayer):
            out, sums = self.mlp(normed, token_mask)
            return hidden + out, sums
        return hidden + self.mlp(normed), None


class Transformer(nn.Module):
    """Token ids in, summed losses out (or logits, through `logits`).

    Args:
        config: the shape; parts: builders of router, attention, dispatcher, and the balance settings.
        groups: parallel groups; this rank builds only its own experts.
        seed: of the initial weights, which are the same under every parallel layout.
    """

    def __init__(self, config: ModelConfig, parts: ModelParts, groups: ParallelGroups | None = None, seed: int = 0):
        super().__init__()
        groups = groups or ParallelGroups.single()
        self.config, self.balance, self.groups = config, parts.balance, groups
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, groups, parts, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialize_parameters(self, seed, config.init_std, config.num_layers)

    def routers(self) -> list[Router]:
        """The routers of the MoE layers, in layer order."""
        return [block.mlp.router for block in self.blocks if isinstance(block.mlp, MoELayer)]

    def _layout(self, positions: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int,
                dtype: torch.dtype) -> SequenceLayout:
        cos, sin = rotary_tables(positions, self.config.attention_head_dim, self.config.rope_theta)
        mask = None
        if not has_varlen_kernel(positions.device, dtype) and cu_seqlens.numel() - 1 > positions.shape[0]:
            mask = document_mask(positions)
        return SequenceLayout(cos, sin, cu_seqlens, max_seqlen, mask)

    def _backbone(self, input_ids: torch.Tensor, layout: SequenceLayout, token_mask: torch.Tensor | None,
                  caches: list[KVCache] | None = None) -> tuple[torch.Tensor, list[RouterSums]]:
        hidden = self.embedding(input_ids)
        all_sums = []
        for i, block in enumerate(self.blocks):
            if self.config.recompute == "block" and self.training and torch.is_grad_enabled():
                hidden, sums = checkpoint(block, hidden, layout, token_mask, use_reentrant=False)
            else:
                hidden, sums = block(hidden, layout, token_mask, caches[i] if caches is not None else None)
            if sums is not None:
                all_sums.append(sums)
        return self.norm(hidden), all_sums

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor,
                cu_seqlens: torch.Tensor, max_seqlen: int, token_mask: torch.Tensor | None = None,
                previous_counts: torch.Tensor | None = None) -> ModelOutput:
        """Sums over the micro-batch.

        Args:
            input_ids, targets, positions: [B, S] int64; positions restart at 0 with each document.
            cu_seqlens: [documents + 1] int32 over the flattened tokens; max_seqlen: the longest document.
            token_mask: [B, S] bool, False for padding; None when nothing is padded.
            previous_counts: scope_counts of the step's earlier micro-batches, for aux_loss_scope=global_batch.
        """
        layout = self._layout(positions, cu_seqlens, max_seqlen, self.embedding.weight.dtype)
        hidden, sums = self._backbone(input_ids, layout, token_mask)
        loss_sum = cross_entropy_sum(self._project(hidden), targets)
        zero = loss_sum.new_zeros(())
        if not sums:
            empty = torch.zeros((0, 0), dtype=torch.int64, device=input_ids.device)
            return ModelOutput(loss_sum, zero, zero, empty, empty, 0)
        counts = torch.stack([s.counts for s in sums])
        z_sum = torch.stack([s.z_sum for s in sums]).sum()
        aux_sum, scope_counts = zero, counts
        if self.balance.aux_loss_coeff > 0:
            if self.balance.aux_loss_scope == "sequence":
                aux_sum = torch.stack([s.sequence_aux_sum for s in sums]).sum()
            else:
                score_sums = torch.stack([s.score_sums for s in sums])
                aux_sum, scope_counts = auxiliary_loss_sum(counts, score_sums, self.balance, self.groups,
                                                           previous_counts)
        return ModelOutput(loss_sum, aux_sum, z_sum, counts, scope_counts, sum(s.processed for s in sums))

    def logits(self, input_ids: torch.Tensor, caches: list[KVCache] | None = None) -> torch.Tensor:
        """Next-token logits [B, S, vocab_size] of unpacked rows; with caches, input_ids continue what they hold."""
        batch, length = input_ids.shape
        start = caches[0].length if caches else 0
        positions = torch.arange(start, start + length, device=input_ids.device).expand(batch, length)
        cu_seqlens = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=input_ids.device)
        layout = self._layout(positions, cu_seqlens, length, self.embedding.weight.dtype)
        hidden, _ = self._backbone(input_ids, layout, None, caches)
        return self._project(hidden)

    def new_caches(self, batch_size: int, max_len: int) -> list[KVCache]:
        """Empty key/value caches, one per layer."""
        weight = self.embedding.weight
        return [KVCache(batch_size, max_len, self.config.num_kv_heads, self.config.attention_head_dim,
                        weight.dtype, weight.device) for _ in self.blocks]
