"""Dense causal grouped-query attention through torch's kernels."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from model.attention.base import AttentionSums, KVCache, SequenceLayout, has_varlen_kernel
from model.config import ModelConfig
from model.layers import RMSNorm, apply_rotary


class DenseAttention(nn.Module):
    """Causal attention within each document; grouped key/value heads, rotary positions, optional QK-norm.

    CUDA in half precision uses torch's variable-length kernel over cu_seqlens; everything else uses
    scaled_dot_product_attention, with the document mask of the layout where rows hold several documents.
    """

    def __init__(self, config: ModelConfig, layer_idx: int = 0):
        super().__init__()
        self.head_dim = config.attention_head_dim
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        hidden_size = config.hidden_size
        self.q_proj = nn.Linear(hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden_size, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = RMSNorm(self.head_dim if per_head else self.num_heads * self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim if per_head else self.num_kv_heads * self.head_dim, config.norm_eps)

    def _project(self, hidden: torch.Tensor, layout: SequenceLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, length, _ = hidden.shape
        q, k, v = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        if self.qk_norm == "hidden":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(batch, length, self.num_heads, self.head_dim)
        k = k.view(batch, length, self.num_kv_heads, self.head_dim)
        v = v.view(batch, length, self.num_kv_heads, self.head_dim)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary(q, layout.cos, layout.sin), apply_rotary(k, layout.cos, layout.sin), v

    def new_cache(self, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        return KVCache(batch_size, max_len, self.num_kv_heads, self.head_dim, dtype, device)

    @staticmethod
    def problems(config: ModelConfig, **arguments: Any) -> list[str]:
        """Contradictions of the arguments with the model; the config itself has been checked."""
        return []

    def forward(self, hidden: torch.Tensor, layout: SequenceLayout, cache: KVCache | None = None
                ) -> tuple[torch.Tensor, AttentionSums | None]:
        """hidden [B, S, D] -> [B, S, D]. See model/attention/base.py for the layout and the cache."""
        q, k, v = self._project(hidden, layout)
        return self.o_proj(self._attend_densely(q, k, v, layout, cache).flatten(2)), None

    def _attend_densely(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout,
                        cache: KVCache | None) -> torch.Tensor:
        if cache is not None:
            return self._attend_cached(q, *cache.append(k, v))
        if has_varlen_kernel(q.device, q.dtype):
            return self._attend_varlen(q, k, v, layout)
        return _sdpa(q, k, v, layout.mask)

    def _attend_cached(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        new, total = q.shape[1], k.shape[1]
        rows = torch.arange(total - new, total, device=q.device).unsqueeze(1)
        mask = torch.arange(total, device=q.device).unsqueeze(0) <= rows
        return _sdpa(q, k, v, mask)

    def _attend_varlen(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        parameters = _parameters(varlen_attn)
        options: dict[str, object] = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
        if self.num_kv_heads != self.num_heads:
            if "enable_gqa" in parameters:
                options["enable_gqa"] = True
            else:  # torch 2.11: repeat the key/value heads
                groups = self.num_heads // self.num_kv_heads
                k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        cu_seqlens, longest = layout.cu_seqlens, layout.max_seqlen
        out = varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, cu_seqlens, longest, longest,
                          **options)
        return out.view_as(q)


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, S, heads, head_dim] in and out; causal when no mask is given."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                         is_causal=mask is None, enable_gqa=q.shape[2] != k.shape[2])
    return out.transpose(1, 2)
