"""Dense causal grouped-query attention through torch's kernels."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from model.attention.base import AttentionSums, SequenceLayout, has_varlen_kernel
from model.attention.cache import KVCache, KVPages, LayerCache, Pages
from model.config import ModelConfig
from model.layers import RMSNorm, RowLinear, apply_rotary
from model.parallel.deal import Run


class DenseAttention(nn.Module):
    """Causal attention within each document; grouped key/value heads, rotary positions, optional
    biases and QK-norm.

    CUDA in half precision uses torch's variable-length kernel over cu_seqlens; everything else uses
    scaled_dot_product_attention, with the document mask of the layout where rows hold several
    documents.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.attention_head_dim
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        # The kernels multiply logits by 1 / sqrt(head_dim); another factor goes into the queries.
        self.query_scale = 1.0
        if config.attention_scale is not None:
            self.query_scale = config.attention_scale * math.sqrt(self.head_dim)

        hidden_size = config.hidden_size
        into, back = config.attention_bias != "none", config.attention_bias == "qkvo"
        self.q_proj = nn.Linear(hidden_size, self.num_heads * self.head_dim, bias=into)
        self.k_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=into)
        self.v_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=into)
        self.o_proj = RowLinear(self.num_heads * self.head_dim, hidden_size, bias=back)

        # materialize leaves vectors as they are, and torch draws them at random.
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

        self.qk_norm = config.qk_norm
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = RMSNorm(
                self.head_dim if per_head else self.num_heads * self.head_dim, config.norm_eps
            )
            self.k_norm = RMSNorm(
                self.head_dim if per_head else self.num_kv_heads * self.head_dim, config.norm_eps
            )

    def _project(
        self, hidden: torch.Tensor, layout: SequenceLayout
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, length, _ = hidden.shape
        q, k, v = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        if self.qk_norm == "hidden":
            # Over all heads, of which a rank may have a part.
            q, k = self.q_norm(q, layout.tensor), self.k_norm(k, layout.tensor)
        q = q.view(batch, length, self.num_heads, self.head_dim)
        k = k.view(batch, length, self.num_kv_heads, self.head_dim)
        v = v.view(batch, length, self.num_kv_heads, self.head_dim)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rotary(q, layout.cos, layout.sin, self.query_scale)
        return q, apply_rotary(k, layout.cos, layout.sin), v

    def new_cache(
        self, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        return KVCache(batch_size, max_len, self.num_kv_heads, self.head_dim, dtype, device)

    def new_pages(
        self, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> Pages:
        return KVPages(num_pages, page_size, self.num_kv_heads, self.head_dim, dtype, device)

    def forward(
        self, hidden: torch.Tensor, layout: SequenceLayout, cache: KVCache | KVPages | None = None
    ) -> tuple[torch.Tensor, AttentionSums | None]:
        """hidden [B, S, D] -> [B, S, D]. See model/attention/base.py for the layout and the
        cache.
        """
        q, k, v = layout.to_heads(*self._project(hidden, layout))
        k, v = layout.to_keys(k, v)
        layout.see_logits(q, k, 1 / math.sqrt(self.head_dim))
        out = layout.to_tokens(self._attend_densely(q, k, v, layout, cache))
        return self.o_proj(out.flatten(2)), None

    def clipped_rows(self, factors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Factors on the rows of projections that multiply the logits of each head by [heads]
        `factors`: name of a parameter -> [rows]. Queries and keys take half each, but keys that
        heads share stay, and queries take all (K2, arXiv 2507.20534, section 2.1).
        """
        shares_keys = self.num_heads != self.num_kv_heads
        rows = (factors if shares_keys else factors.sqrt()).repeat_interleave(self.head_dim)
        projections = {"q_proj": self.q_proj}
        if not shares_keys:
            projections["k_proj"] = self.k_proj
        return {
            f"{name}.{key}": rows
            for name, projection in projections.items()
            for key, _ in projection.named_parameters()
        }

    def _attend_densely(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: SequenceLayout,
        cache: KVCache | KVPages | None,
    ) -> torch.Tensor:
        if isinstance(cache, KVPages):
            assert layout.paging is not None
            cache.write(k, v, layout.paging.slots)
            if layout.paging.fresh:
                return attend_packed(q, k, v, layout)
            mask = layout.paging.visible(q.shape[1], cache.page_size)
            return _sdpa(q, *cache.read(layout.paging.pages), mask)

        # The first tokens of a cache are all there is, and need no mask of all pairs.
        if cache is not None and cache.length:
            return self._attend_cached(q, *cache.append(k, v))
        if cache is not None:
            cache.append(k, v)
        return attend_packed(q, k, v, layout)

    def _attend_cached(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        new, total = q.shape[1], k.shape[1]
        rows = torch.arange(total - new, total, device=q.device).unsqueeze(1)
        mask = torch.arange(total, device=q.device).unsqueeze(0) <= rows
        return _sdpa(q, k, v, mask)


def attend_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SequenceLayout,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention within each document of packed rows, by torch's kernels.

    q: [B, n, heads, head_dim] of the tokens that attend here; k, v: [B, S, kv_heads, head_dim],
    heads a multiple of kv_heads.
    scale: of the logits; None: 1 / sqrt(head_dim).
    Returns [B, n, heads, head_dim].
    """
    if layout.gathering is not None:
        return attend_runs(q, k, v, layout.gathering.runs, scale)
    if not has_varlen_kernel(q.device, q.dtype):
        documents = layout.documents
        if documents is not None:
            return attend_runs(q, k, v, documents, scale)
        return _sdpa(q, k, v, layout.mask, scale)
    from torch.nn.attention.varlen import varlen_attn

    parameters = _parameters(varlen_attn)
    options: dict[str, Any] = (
        {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    )
    if scale is not None and "scale" in parameters:
        options["scale"] = scale
    elif scale is not None:  # the kernel divides by sqrt(head_dim)
        q = q * (scale * math.sqrt(q.shape[-1]))
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_kv_heads != num_heads:
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11: repeat the key/value heads
            groups = num_heads // num_kv_heads
            k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    cu_seqlens, longest = layout.cu_seqlens, layout.max_seqlen
    # without return_aux it is the output alone
    out: torch.Tensor = varlen_attn(  # type: ignore[assignment]
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        **options,
    )
    return out.view_as(q)


MASKED = 1024
"""Queries of a run that attend under one mask at a time."""


def attend_runs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    runs: tuple[Run, ...],
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention of some of the tokens, run by run, each to what is before it in its
    document: products that no query may see are left out but for those of a run itself.

    q: [B, n, heads, head_dim], of the runs one after the other; k, v: [B, S, kv_heads, head_dim] of
    whole rows. Returns [B, n, heads, head_dim].
    """
    outs = []
    for run, queries in of_runs(q, runs):
        row = slice(run.row, run.row + 1)
        # A document's first tokens see nothing but each other.
        if run.first == run.document:
            at = slice(run.first, run.end)
            outs.append(_sdpa(queries, k[row, at], v[row, at], None, scale))
            continue
        at = slice(run.document, run.end)
        outs.append(_attend_to_past(queries, k[row, at], v[row, at], scale))
    return torch.cat(outs, 1).view(q.shape[0], q.shape[1], *outs[0].shape[2:])


def of_runs(q: torch.Tensor, runs: tuple[Run, ...]) -> Iterator[tuple[Run, torch.Tensor]]:
    """Every run and its queries [1, m, heads, head_dim], of q [B, n, heads, head_dim]."""
    sizes = [run.end - run.first for run in runs]
    yield from zip(runs, q.flatten(0, 1).unsqueeze(0).split(sizes, 1), strict=True)


def _attend_to_past(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """The last m of L tokens, q [1, m, heads, head_dim], to all of them up to themselves."""
    new, total = q.shape[1], k.shape[1]
    if has_varlen_kernel(q.device, q.dtype):
        # here, since importing it imports torch's compiler
        from torch.nn.attention.bias import causal_lower_right

        groups = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        out: torch.Tensor = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=causal_lower_right(new, total),
            scale=scale,
        )
        return out.transpose(1, 2)
    # Without a kernel that knows of it the mask is in memory, so of some queries at a time.
    outs = []
    for first in range(0, new, MASKED):
        some = q[:, first : first + MASKED]
        end = total - new + first + some.shape[1]
        keys = torch.arange(end, device=q.device)
        mask = keys <= keys[end - some.shape[1] :].unsqueeze(1)
        outs.append(_sdpa(some, k[:, :end], v[:, :end], mask, scale))
    return torch.cat(outs, 1)


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None = None,
) -> torch.Tensor:
    """[B, S, heads, head_dim] in and out; causal when no mask is given."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
