"""Dense causal attention of which some layers see a sliding window; a learned sink per head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.attention.base import SequenceLayout
from model.attention.cache import KVCache, KVPages
from model.attention.config.windowed import WindowedAttentionConfig
from model.attention.dense import MASKED, DenseAttention, of_runs
from model.config import ModelConfig
from model.parallel.deal import Run

ROOM = 8
"""Dimensions that carry the sinks beside those of a head: what keeps rows aligned on a GPU."""


class WindowedAttention(DenseAttention):
    """Dense attention; on the layers that slide, of the last `window` tokens alone.

    A sink is a logit per head that takes its share of the softmax and has no value (gpt-oss, arXiv
    2508.10925). Neither torch's variable-length kernel nor its others know of it, so it comes in
    as a key: queries have one more dimension with their head's sink in it, the key 1 there and 0
    elsewhere, and its value is 0. Windows are computed in pieces of `window` queries, each of which
    sees its own piece and the one before: S x 2 window products instead of S x S.

    Args:
        settings: window, layers and sinks; layer_idx: its place in the model.
    """

    def __init__(self, config: ModelConfig, settings: WindowedAttentionConfig, layer_idx: int):
        super().__init__(config)
        self.window = settings.window if settings.slides(config, layer_idx) else None
        # a vector, which materialize leaves as it is
        self.sinks = nn.Parameter(torch.zeros(self.num_heads)) if settings.sinks else None

    def _attend_densely(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: SequenceLayout,
        cache: KVCache | KVPages | None,
    ) -> torch.Tensor:
        if self.window is None and self.sinks is None:
            return super()._attend_densely(q, k, v, layout, cache)
        if isinstance(cache, KVPages):
            assert layout.paging is not None
            cache.write(k, v, layout.paging.slots)
            if not layout.paging.fresh:
                mask = layout.paging.visible(q.shape[1], cache.page_size, self.window)
                return self._attend(q, *cache.read(layout.paging.pages), mask, self.sinks)
        elif cache is not None:
            return self._attend_to_last(q, *cache.append(k, v))
        sinks = None if self.sinks is None else layout.own_heads(self.sinks)
        if layout.gathering is not None:
            return self._attend_runs(q, k, v, layout.gathering.runs, sinks)
        if self.window is None and (documents := layout.documents) is not None:
            return self._attend_runs(q, k, v, documents, sinks)
        if self.window is None:
            mask = layout.shared("causal", lambda: _causal_mask(layout, *q.shape[:2]))
            return self._attend(q, k, v, mask, sinks)
        return self._attend_in_pieces(q, k, v, self.window, layout, sinks)

    def _attend_to_last(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """New tokens [B, S, ...] against all that are cached, themselves included."""
        new, total = q.shape[1], k.shape[1]
        first = 0 if self.window is None else max(0, total - new + 1 - self.window)
        queries = torch.arange(total - new, total, device=q.device).unsqueeze(1)
        keys = torch.arange(first, total, device=q.device).unsqueeze(0)
        mask = keys <= queries
        if self.window is not None:
            mask &= keys > queries - self.window
        mask = mask.view(1, 1, new, total - first)
        return self._attend(q, k[:, first:], v[:, first:], mask, self.sinks)

    def _attend_runs(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        runs: tuple[Run, ...],
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """As attend_runs; of a window the last tokens alone, some queries at a time."""
        outs = []
        for run, queries in of_runs(q, runs):
            first = run.first
            for some in queries.split(self.window or MASKED, 1):
                end = first + some.shape[1]
                start = run.document
                if self.window is not None:
                    start = max(start, first - self.window + 1)
                places = torch.arange(first, end, device=q.device).unsqueeze(1)
                keys = torch.arange(start, end, device=q.device).unsqueeze(0)
                mask = keys <= places
                if self.window is not None:
                    mask &= keys > places - self.window
                row, at = slice(run.row, run.row + 1), slice(start, end)
                outs.append(self._attend(some, k[row, at], v[row, at], mask[None, None], sinks))
                first = end
        return torch.cat(outs, 1).view_as(q)

    def _attend_in_pieces(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window: int,
        layout: SequenceLayout,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        num_tokens = q.shape[0] * q.shape[1]
        size = min(window, num_tokens)
        mask = layout.shared(
            f"window {window}", lambda: _window_mask(layout.cu_seqlens, num_tokens, window, size)
        )

        # [pieces, size, heads, head_dim], and of keys and values the piece before in front of each.
        missing = -num_tokens % size
        pieces = [
            F.pad(x.flatten(0, 1), (0, 0, 0, 0, 0, missing)).unflatten(0, (-1, size))
            for x in (q, k, v)
        ]
        queries, keys, values = pieces
        keys, values = (
            torch.cat((F.pad(x, (0, 0) * 3 + (1, 0))[:-1], x), dim=1) for x in (keys, values)
        )
        out = self._attend(queries, keys, values, mask, sinks)
        return out.flatten(0, 1)[:num_tokens].view_as(q)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """q [N, Q, heads, head_dim], k and v [N, K, kv_heads, head_dim], mask [N or 1, 1, Q, K]
        bool, True where attention is allowed; every query is allowed something. sinks: [heads].
        """
        scale = self.head_dim**-0.5
        # the kernels that take a mask want a key for every query head
        groups = self.num_heads // self.num_kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)

        if sinks is not None:
            sinks = (sinks.float() / scale).to(q.dtype).view(1, 1, -1, 1)
            q = torch.cat((q, F.pad(sinks, (0, ROOM - 1)).expand(*q.shape[:3], -1)), dim=-1)
            sink_key = k.new_zeros(k.shape[0], 1, k.shape[2], self.head_dim + ROOM)
            sink_key[..., self.head_dim].fill_(1)
            k = torch.cat((F.pad(k, (0, ROOM)), sink_key), dim=1)
            v = F.pad(v, (0, 0, 0, 0, 0, 1))
            mask = F.pad(mask, (0, 1), value=True)

        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
        )
        return out.transpose(1, 2)


def _documents(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[num_tokens] int32, which document each of the flattened tokens is of."""
    tokens = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], tokens, right=True, out_int32=True)


def _causal_mask(layout: SequenceLayout, batch: int, length: int) -> torch.Tensor:
    """[B, 1, S, S] bool: same document and not in the future. As layout.mask, which is left out
    where a variable-length kernel needs none.
    """
    if layout.mask is not None:
        return layout.mask
    documents = _documents(layout.cu_seqlens, batch * length).view(batch, length)
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril().unsqueeze(1)


def _window_mask(cu_seqlens: torch.Tensor, num_tokens: int, window: int, size: int) -> torch.Tensor:
    """[pieces, 1, size, 2 size] bool for pieces of `size` queries against their own piece and the
    one before: same document, not in the future, at most window - 1 tokens back. What fills up the
    last piece sees what fills it up too.
    """
    padded = num_tokens + -num_tokens % size
    documents = _documents(cu_seqlens, padded)
    # before the first piece there is nothing
    before = torch.cat((documents.new_full((size,), -1), documents[:-size])).view(-1, 1, size)
    own = documents.view(-1, 1, size)
    same = torch.cat((before, own), dim=2) == own.transpose(1, 2)

    queries = torch.arange(size, 2 * size, device=cu_seqlens.device).unsqueeze(1)
    keys = torch.arange(2 * size, device=cu_seqlens.device).unsqueeze(0)
    return (same & (keys <= queries) & (keys > queries - window)).unsqueeze(1)
