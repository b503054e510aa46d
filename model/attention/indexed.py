"""Attention to what a learned index chooses, as DSA, MSA and QSA have it, over grouped-query
projections (ops/index_attention).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from model.attention.base import STATS, AttentionSums, SequenceLayout
from model.attention.cache import KVCache, KVPages, LayerCache, Pages
from model.attention.config.indexed import IndexedAttentionConfig
from model.attention.dense import DenseAttention
from model.config import ModelConfig
from model.layers import RMSNorm, apply_rotary, rotary_tables
from ops.index_attention import (
    Index,
    IndexSpec,
    attend_cached,
    audit_index,
    group_means,
    group_starts,
    indexed_attention,
)

LAYER_NORM_EPS = 1e-6
"""Of DSA's index keys, as DeepSeek-V3.2 has it, whatever model.norm_eps is."""


class Indexer(nn.Module):
    """What the index makes of hidden states; its projections and norms are those of the published
    modules (DeepSeek-V3.2, MiniMax-M3, Qwen4), queries being projected from the hidden state.
    """

    def __init__(self, config: ModelConfig, spec: IndexSpec, heads: int, width: int):
        super().__init__()
        self.spec, self.heads, self.width = spec, heads, width
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * self.width, bias=False)
        self.k_proj = nn.Linear(hidden, self.width, bias=False)
        self.weights_proj: nn.Linear | None = None
        self.q_norm: RMSNorm | None = None
        self.k_norm: nn.Module
        if self.spec.rule == "dsa":
            self.weights_proj = nn.Linear(hidden, self.heads, bias=False)
            self.k_norm = nn.LayerNorm(self.width, LAYER_NORM_EPS)
        else:
            self.q_norm = RMSNorm(self.width, config.norm_eps)
            self.k_norm = RMSNorm(self.width, config.norm_eps)
        self._rotary = config.rope_theta, config.rope_scaling

    def queries(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, D] -> queries [B, S, I, w], turned, and weights [B, S, I]."""
        queries = self.q_proj(hidden).unflatten(-1, (self.heads, self.width))
        if self.q_norm is not None:
            queries = self.q_norm(queries)
        weights = None if self.weights_proj is None else self.weights_proj(hidden)
        return apply_rotary(queries, cos, sin), weights

    def token_keys(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """[B, S, D] -> [B, S, w], what a cache holds of a token: its key, or with rule=qsa what its
        block's key is a mean of.
        """
        keys: torch.Tensor = self.k_proj(hidden)
        if self.spec.pools_keys:
            return keys
        return self.block_keys(keys, cos, sin)

    def block_keys(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Keys [b, n, w], or means of blocks, normalised and turned by the positions of the
        tables: of a block that of its first token.
        """
        return apply_rotary(self.k_norm(keys).unsqueeze(2), cos, sin).squeeze(2)

    def of_rows(self, hidden: torch.Tensor, layout: SequenceLayout, bounds: list[int]) -> Index:
        """Of packed rows, flattened."""
        queries, weights = self.queries(hidden, layout.cos, layout.sin)
        keys = self.token_keys(hidden, layout.cos, layout.sin).flatten(0, 1)
        if self.spec.pools_keys:
            size = self.spec.block_size
            starts = layout.shared(
                f"blocks of {size}", lambda: group_starts(bounds, size).to(hidden.device)
            )
            cos, sin = (x.flatten(0, 1)[starts].unsqueeze(0) for x in (layout.cos, layout.sin))
            keys = self.block_keys(group_means(keys, starts, size).unsqueeze(0), cos, sin)[0]
        return Index(
            queries.flatten(0, 1), keys, None if weights is None else weights.flatten(0, 1)
        )

    def of_cache(self, held: torch.Tensor, rotary_dim: int) -> torch.Tensor:
        """held [B, N, w] of tokens from a document's first one on, of single tokens' keys in any
        shape -> keys as attend_cached takes them.
        """
        if not self.spec.pools_keys:
            return held
        size = self.spec.block_size
        number = held.shape[1] // size
        means = held[:, : number * size].unflatten(1, (number, size)).float().mean(2)
        theta, scaling = self._rotary
        places = size * torch.arange(number, device=held.device).unsqueeze(0)
        return self.block_keys(
            means.to(held.dtype), *rotary_tables(places, rotary_dim, theta, scaling)
        )


class IndexedAttention(DenseAttention):
    """Causal attention to the tokens that an index of its own chooses, which learns from the
    attention's masses alone: hidden states reach it without a gradient.

    Before step `dense_steps` everything is attended to, and the index learns from all of it; from
    then on it chooses, and learns from what it chose.

    Args:
        settings: what it does; layer_idx: its place in the model, which says whether it has an
            index.
    """

    def __init__(self, config: ModelConfig, settings: IndexedAttentionConfig, layer_idx: int = 0):
        super().__init__(config)
        self.spec = settings.spec()
        self.layer_idx = layer_idx
        self.is_sparse = settings.is_sparse(config, layer_idx)
        self.coeff, self.audit_rows = settings.index_coeff, settings.audit_rows
        self.dense_steps = settings.dense_steps
        self.step = self.dense_steps  # without a trainer: the index chooses
        self.rotary_size = config.rotary_size
        self.indexer: Indexer | None = None
        if self.is_sparse:
            self.indexer = Indexer(config, self.spec, *settings.index_shape(config))

    @property
    def chooses(self) -> bool:
        """Whether the index has learned for as long as it was to."""
        return self.indexer is not None and self.step >= self.dense_steps

    def new_cache(
        self, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        if self.indexer is None:
            return super().new_cache(batch_size, max_len, dtype, device)
        return IndexedKVCache(
            batch_size,
            max_len,
            self.num_kv_heads,
            self.head_dim,
            self.indexer.width,
            dtype,
            device,
        )

    def new_pages(
        self, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> Pages:
        if self.indexer is None:
            return super().new_pages(num_pages, page_size, dtype, device)
        return IndexedKVPages(
            num_pages,
            page_size,
            self.num_kv_heads,
            self.head_dim,
            self.indexer.width,
            dtype,
            device,
        )

    def forward(
        self, hidden: torch.Tensor, layout: SequenceLayout, cache: KVCache | KVPages | None = None
    ) -> tuple[torch.Tensor, AttentionSums | None]:
        """hidden [B, S, D] -> [B, S, D], and the layer's sums unless it has no index."""
        if self.indexer is None:
            return super().forward(hidden, layout, cache)
        q, k, v = self._project(hidden, layout)

        # Densely, and nobody asks what the index makes of it.
        teach = cache is None and (self.training or layout.measure)
        if not self.chooses and not teach:
            out = self._attend_densely(q, k, v, layout, cache)
            return self.o_proj(out.flatten(2)), _nothing(out)

        # Tokens that continue what a cache holds.
        hidden = hidden.detach()
        if isinstance(cache, IndexedKVPages):
            assert layout.paging is not None
            cache.write(k, v, layout.paging.slots)
            cache.write_index(
                self.indexer.token_keys(hidden, layout.cos, layout.sin), layout.paging.slots
            )
            if not layout.paging.fresh:
                pools = [pool.flatten(0, 1) for pool in cache.tensors()]
                paging, size = layout.paging, cache.page_size
                rows = layout.shared(f"rows of pages of {size}", lambda: paging.rows(size))
                if self.spec.pools_keys:
                    pools[2] = cache.read_index(paging.pages)
                out = self._attend_held(hidden, q, pools, layout, rows)
                return self.o_proj(out.flatten(2)), _nothing(out)
        elif isinstance(cache, IndexedKVCache):
            began = cache.length
            keys, values = cache.append(k, v)
            held = cache.append_index(self.indexer.token_keys(hidden, layout.cos, layout.sin))
            if began:
                out = self._attend_held(hidden, q, [keys, values, held], layout, began=began)
                return self.o_proj(out.flatten(2)), _nothing(out)
        elif cache is not None:
            raise TypeError(
                f"{type(cache).__name__} has no index keys; take caches from Transformer.new_caches"
            )

        # All tokens at once, documents end to end.
        bounds = layout.shared("bounds", lambda: layout.cu_seqlens.cpu()).tolist()
        index = self.indexer.of_rows(hidden, layout, bounds)
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        found = indexed_attention(
            flat[0],
            flat[1],
            flat[2],
            index,
            bounds,
            self.spec,
            dense=not self.chooses,
            teach=teach,
            token_mask=layout.token_mask,
        )
        sums = _nothing(found.out)
        if teach:
            sums = AttentionSums(self.coeff * found.divergence.float(), sums.stats)
        if layout.measure:
            stats = self._measure(flat[0], flat[1], index, bounds, layout)
            counted = len(flat[0]) if layout.token_mask is None else layout.token_mask.sum()
            stats |= {
                "index_tokens": found.divergence.detach().new_ones(()) * counted,
                "index_loss": found.divergence.detach(),
            }
            zero = sums.stats.new_zeros(())
            measured = torch.stack([stats.get(name, zero).to(zero) for name in STATS])
            sums = AttentionSums(sums.penalty_sum, measured)
        return self.o_proj(found.out.view_as(q).flatten(2)), sums

    def _attend_held(
        self,
        hidden: torch.Tensor,
        q: torch.Tensor,
        held: Sequence[torch.Tensor],
        layout: SequenceLayout,
        rows: torch.Tensor | None = None,
        began: int = 0,
    ) -> torch.Tensor:
        """The last S tokens [B, S, ...] of every row against all of it.

        Args:
            held: keys, values, index keys, of rows or with `rows` of pools, as attend_cached takes
                them, but for what index keys of blocks are made of.
            began: tokens before them; with pools their lengths say it.
        """
        assert self.indexer is not None
        new = torch.arange(q.shape[1], device=q.device)
        if rows is None:
            position = (began + new).expand(q.shape[0], -1)
        else:
            assert layout.paging is not None
            # padding before a shorter row sees its first token, and stays finite
            position = layout.paging.lengths.unsqueeze(1) - q.shape[1] + new
            position = position.clamp_min(0)
        queries, weights = self.indexer.queries(hidden, layout.cos, layout.sin)
        keys, values, index_keys = held
        index_keys = self.indexer.of_cache(index_keys, self.rotary_size)
        return attend_cached(
            q, keys, values, queries, index_keys, weights, position, self.spec, rows
        )

    def _measure(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        index: Index,
        bounds: list[int],
        layout: SequenceLayout,
    ) -> dict[str, torch.Tensor]:
        """A few rows, the same whatever the batch is packed like, are compared with dense
        attention: also before the index chooses, so that one sees when it could.
        """
        if self.audit_rows == 0:
            return {}
        rows = layout.audited_rows(self.layer_idx, self.audit_rows, len(q))
        recall = audit_index(q, k, index, bounds, self.spec, rows.tolist()).recall
        return {"index_audited": recall.new_tensor(len(recall)), "index_recall": recall.sum()}


class IndexedKVCache(KVCache):
    """Keys, values and index keys [B, max_len, w] of the tokens."""

    def __init__(
        self,
        batch_size: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__(batch_size, max_len, num_kv_heads, head_dim, dtype, device)
        self.index_keys = torch.zeros((batch_size, max_len, width), dtype=dtype, device=device)

    def append_index(self, keys: torch.Tensor) -> torch.Tensor:
        """Store [B, S, w] of the tokens that were appended last, and return all so far."""
        self.index_keys[:, self.length - keys.shape[1] : self.length] = keys
        return self.index_keys[:, : self.length]


class IndexedKVPages(KVPages):
    """Keys, values and index keys [num_pages, page_size, w] of the tokens."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__(num_pages, page_size, num_kv_heads, head_dim, dtype, device)
        self.index_keys = torch.zeros((num_pages, page_size, width), dtype=dtype, device=device)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*super().tensors(), self.index_keys)

    def write_index(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """Store [B, S, w] at slots [B * S] int64 = page * page_size + place."""
        self.index_keys.flatten(0, 1)[slots] = keys.flatten(0, 1)

    def read_index(self, pages: torch.Tensor) -> torch.Tensor:
        """[B, P * page_size, w] of pages [B, P] int64."""
        return self.index_keys[pages].flatten(1, 2)


def _nothing(like: torch.Tensor) -> AttentionSums:
    zeros = like.new_zeros(len(STATS), dtype=torch.float32)
    return AttentionSums(zeros.new_zeros(()), zeros)
