"""The decoder-only transformer: embedding, blocks, head, loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.attention.base import STATS, AttentionSums, KVCache, SequenceLayout, document_mask, has_varlen_kernel
from model.attention.sparse import SparseAttention
from model.balance import RouterSums, auxiliary_loss_sums, rank_shares
from model.config import ModelConfig
from model.init import initialize_parameters
from model.layers import GatedMLP, RMSNorm, rotary_tables
from model.loss import ModelOutput, cross_entropy_sum, token_cross_entropy
from model.moe import ModelParts, MoELayer
from model.parallel import ParallelGroups
from model.routers.base import Router, RoutingRequest
from model.weight_sums import Embedding, uses_of
from ops.all_to_all import Communication, total_communication
from ops.router import RouterOutput


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

    def forward(self, hidden: torch.Tensor, layout: SequenceLayout, request: RoutingRequest,
                cache: KVCache | None = None
                ) -> tuple[torch.Tensor, AttentionSums | None, RouterSums | None, RouterOutput | None]:
        attended, attention_sums = self.attention(self.attention_norm(hidden), layout, cache)
        hidden = hidden + attended
        normed = self.mlp_norm(hidden)
        if isinstance(self.mlp, MoELayer):
            out, sums, routing = self.mlp(normed, request)
            return hidden + out, attention_sums, sums, routing
        return hidden + self.mlp(normed), attention_sums, None, None


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
        self.rank_shares = rank_shares(config.num_experts, len(config.moe_layers), groups.expert_size, parts.placement)
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, groups, parts, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialize_parameters(self, seed, config.init_std, config.num_layers)

    def routers(self) -> list[Router]:
        """The routers of the MoE layers, in layer order."""
        return [block.mlp.router for block in self.blocks if isinstance(block.mlp, MoELayer)]

    def sparse_attentions(self) -> list[SparseAttention]:
        """The attention of the layers that are sparse, in layer order."""
        return [block.attention for block in self.blocks
                if isinstance(block.attention, SparseAttention) and block.attention.is_sparse]

    def measure_communication(self, measuring: bool) -> Communication:
        """Count from now on, or no longer, what the MoE layers exchange; returns what was counted so far."""
        meters = [block.mlp.dispatcher.meter for block in self.blocks if isinstance(block.mlp, MoELayer)]
        for meter in meters:
            meter.measuring = measuring
        return total_communication([meter.take() for meter in meters])

    def set_step(self, step: int) -> None:
        """Optimisation steps done so far: sparse layers may be dense, or select with noise, early in training."""
        for attention in self.sparse_attentions():
            attention.step = step

    def _layout(self, positions: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, dtype: torch.dtype,
                token_ids: torch.Tensor | None = None, token_mask: torch.Tensor | None = None,
                measure: bool = False) -> SequenceLayout:
        cos, sin = rotary_tables(positions, self.config.attention_head_dim, self.config.rope_theta)
        mask = None
        if not has_varlen_kernel(positions.device, dtype) and cu_seqlens.numel() - 1 > positions.shape[0]:
            mask = document_mask(positions)
        return SequenceLayout(cos, sin, cu_seqlens, max_seqlen, mask, token_ids, token_mask, measure)

    def _backbone(self, input_ids: torch.Tensor, layout: SequenceLayout, request: RoutingRequest,
                  given_ids: tuple[torch.Tensor, ...] | None = None, caches: list[KVCache] | None = None
                  ) -> tuple[torch.Tensor, list[AttentionSums], list[RouterSums], list[RouterOutput]]:
        hidden = self.embedding(input_ids)
        attention_sums: list[AttentionSums] = []
        all_sums: list[RouterSums] = []
        routings: list[RouterOutput] = []
        for i, block in enumerate(self.blocks):
            own = request if given_ids is None else request._replace(
                given_ids=given_ids[len(routings)] if len(routings) < len(given_ids) else None)
            if self.config.recompute == "block" and self.training and torch.is_grad_enabled():
                hidden, attended, sums, routing = checkpoint(block, hidden, layout, own, use_reentrant=False)
            else:
                hidden, attended, sums, routing = block(hidden, layout, own, caches[i] if caches is not None else None)
            if attended is not None:
                attention_sums.append(attended)
            if sums is not None:
                all_sums.append(sums)
                routings.append(routing)
        return self.norm(hidden), attention_sums, all_sums, routings

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def _loss(self, hidden: torch.Tensor, targets: torch.Tensor, by_token: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """loss_sum and token_losses of ModelOutput, with the logits of model.loss_chunk_size tokens in memory at a time."""
        def of_chunk(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None
                     ) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self._project(hidden) if weight is None else F.linear(hidden, weight)
            by_tokens = token_cross_entropy(logits, targets) if by_token else logits.new_empty(0, dtype=torch.float32)
            return cross_entropy_sum(logits, targets), by_tokens

        size = self.config.loss_chunk_size
        if not 0 < size < targets.numel():
            return of_chunk(hidden, targets)
        hiddens, parts = hidden.flatten(0, 1).split(size), targets.flatten().split(size)
        weights: list[torch.Tensor] | list[None] = [None] * len(parts)
        if torch.is_grad_enabled() and hidden.dtype != torch.float32:
            weights = uses_of((self.embedding if self.head is None else self.head).weight, len(parts))
        sums, by_tokens = zip(*(
            checkpoint(of_chunk, *chunk, use_reentrant=False) if torch.is_grad_enabled() else of_chunk(*chunk)
            for chunk in zip(hiddens, parts, weights, strict=True)), strict=True)
        return torch.stack(sums).sum(), torch.cat(by_tokens).view(targets.shape if by_token else 0)

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor,
                cu_seqlens: torch.Tensor, max_seqlen: int, token_mask: torch.Tensor | None = None,
                previous_counts: torch.Tensor | None = None, token_ids: torch.Tensor | None = None,
                given_ids: tuple[torch.Tensor, ...] | None = None, keep_routing: bool = False,
                with_histogram: bool | None = None, frozen: bool = False, snapshot: bool = False,
                measure_attention: bool = False) -> ModelOutput:
        """Sums over the micro-batch.

        Args:
            input_ids, targets, positions: [B, S] int64; positions restart at 0 with each document.
            cu_seqlens: [documents + 1] int32 over the flattened tokens; max_seqlen: the longest document.
            token_mask: [B, S] bool, False for padding; None when nothing is padded.
            previous_counts: scope_counts of the step's earlier micro-batches, for aux_loss_scope=global_batch.
            token_ids: [B, S] int64 names of the tokens, for checksum and audit.
            given_ids: [B * S, K] per MoE layer, experts to use instead of the routers' choice (replay).
            keep_routing: return every layer's routing, in evaluation also the tokens' losses.
            with_histogram: count the scores (None: in training).
            frozen, snapshot: see RoutingRequest. measure_attention: fill attention_stats.
        """
        flat_mask = None if token_mask is None else token_mask.reshape(-1)
        flat_ids = None if token_ids is None else token_ids.reshape(-1)
        layout = self._layout(positions, cu_seqlens, max_seqlen, self.embedding.weight.dtype, flat_ids, flat_mask,
                              measure_attention)
        counting = self.training if with_histogram is None else with_histogram
        request = RoutingRequest(flat_mask, 1, int(counting), flat_ids, None, frozen, snapshot)
        hidden, attention_sums, sums, routings = self._backbone(input_ids, layout, request, given_ids)
        loss_sum, token_losses = self._loss(hidden, targets, keep_routing and not self.training)
        zero = loss_sum.new_zeros(())
        penalty_sum, attention_stats = zero, loss_sum.new_zeros((0, len(STATS)))
        if attention_sums:
            penalty_sum = torch.stack([s.penalty_sum for s in attention_sums]).sum()
            attention_stats = torch.stack([s.stats for s in attention_sums])
        if not sums:
            empty = torch.zeros((0, 0), dtype=torch.int64, device=input_ids.device)
            return ModelOutput(loss_sum, zero, zero, penalty_sum, empty, empty, empty, empty.sum(), (), attention_stats,
                               token_losses)
        counts = torch.stack([s.counts for s in sums])
        z_sum = torch.stack([s.z_sum for s in sums]).sum()
        if self.balance.entropy_coeff > 0:
            penalty_sum = penalty_sum + self.balance.entropy_coeff * torch.stack([s.entropy_sum for s in sums]).sum()
        if self.balance.orthogonality_coeff > 0:
            orthogonality = torch.stack([s.orthogonality_sum for s in sums]).sum()
            penalty_sum = penalty_sum + self.balance.orthogonality_coeff * orthogonality
        aux_sum, scope_counts = zero, counts.sum(1)
        if self.balance.aux_loss_coeff > 0:
            score_sums = torch.stack([s.score_sums for s in sums])
            aux_sums, scope_counts = auxiliary_loss_sums(counts, score_sums, self.balance.aux_loss_scope, self.groups,
                                                         previous_counts)
            aux_sum = aux_sums.sum()
        stats = torch.stack([s.stats for s in sums])
        return ModelOutput(loss_sum, aux_sum, z_sum, penalty_sum, counts.sum(1), scope_counts, stats,
                           torch.stack([s.processed for s in sums]).sum(), tuple(routings) if keep_routing else (),
                           attention_stats, token_losses)

    def logits(self, input_ids: torch.Tensor, caches: list[KVCache] | None = None) -> torch.Tensor:
        """Next-token logits [B, S, vocab_size] of unpacked rows; with caches, input_ids continue what they hold."""
        batch, length = input_ids.shape
        start = caches[0].length if caches else 0
        positions = torch.arange(start, start + length, device=input_ids.device).expand(batch, length)
        cu_seqlens = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=input_ids.device)
        layout = self._layout(positions, cu_seqlens, length, self.embedding.weight.dtype)
        hidden, *_ = self._backbone(input_ids, layout, RoutingRequest(), None, caches)
        return self._project(hidden)

    def new_caches(self, batch_size: int, max_len: int) -> list[KVCache]:
        """Empty key/value caches, one per layer."""
        weight = self.embedding.weight
        return [block.attention.new_cache(batch_size, max_len, weight.dtype, weight.device) for block in self.blocks]
