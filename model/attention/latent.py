"""Multi-head latent attention (arXiv 2405.04434): keys and values of all heads come from one small
latent, which is all that a cache holds of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.attention.base import AttentionSums, SequenceLayout
from model.attention.cache import LatentCache, LatentPages
from model.attention.config.latent import MlaConfig
from model.attention.dense import attend_packed
from model.config import ModelConfig
from model.layers import RMSNorm, apply_rotary
from model.lora import weight_of

NORM_EPS = 1e-6
"""Of the norms of the latents, whatever model.norm_eps is: that of DeepSeek's models and of those
after them.
"""
QUERY_CHUNK = 256
"""Queries that attend to a cache at a time, so that their mask stays small."""


class LatentAttention(nn.Module):
    """Causal attention within each document, of num_heads heads whose keys and values are
    projections of one latent of kv_lora_rank values.

    A head's query and key have a part of qk_nope_head_dim dimensions without positions, and one of
    qk_rope_head_dim that is turned; the turned key is the same for all heads. Rotary dimensions are
    half-split, as everywhere here (DeepSeek's files interleave them).

    Three ways lead to the same numbers. Training and the first tokens of a cache expand latents
    into keys and values and run the kernels of dense attention. A few tokens against a cache are
    `absorbed`: kv_b_proj is applied to queries and outputs instead of to every cached token, so
    that all heads attend to the cache's rows themselves. Many tokens against a cache expand it.
    """

    def __init__(self, config: ModelConfig, settings: MlaConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.latent_dim = settings.kv_lora_rank
        self.nope_dim, self.rope_dim = settings.qk_nope_head_dim, settings.qk_rope_head_dim
        self.value_dim = settings.v_head_dim
        self.scale = settings.softmax_scale(config)

        # Queries through a latent of their own, which saves parameters and activations, or plain.
        hidden_size, query_width = config.hidden_size, self.num_heads * settings.qk_head_dim
        self.q_proj = self.q_a_proj = self.q_a_norm = self.q_b_proj = None
        if settings.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, settings.q_lora_rank, bias=False)
            self.q_a_norm = RMSNorm(settings.q_lora_rank, NORM_EPS)
            self.q_b_proj = nn.Linear(settings.q_lora_rank, query_width, bias=False)

        self.kv_a_proj = nn.Linear(hidden_size, self.latent_dim + self.rope_dim, bias=False)
        self.kv_a_norm = RMSNorm(self.latent_dim, NORM_EPS)
        self.kv_b_proj = nn.Linear(
            self.latent_dim, self.num_heads * (self.nope_dim + self.value_dim), bias=False
        )
        self.o_proj = nn.Linear(self.num_heads * self.value_dim, hidden_size, bias=False)

    def clipped_rows(self, factors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Factors on the rows of projections that multiply the logits of each head by [heads]
        `factors`: name of a parameter -> [rows]. The parts without positions take half each; of the
        turned parts the key is that of all heads and stays, and the query takes all (K2, arXiv
        2507.20534, section 2.1).
        """
        half, rest = factors.sqrt(), torch.ones_like(factors)
        parts = ((half, self.nope_dim), (factors, self.rope_dim))
        queries = torch.cat([f[:, None].expand(-1, size) for f, size in parts], 1)
        parts = ((half, self.nope_dim), (rest, self.value_dim))
        keys = torch.cat([f[:, None].expand(-1, size) for f, size in parts], 1)
        name = "q_b_proj" if self.q_proj is None else "q_proj"
        return {f"{name}.weight": queries.flatten(), "kv_b_proj.weight": keys.flatten()}

    def new_cache(
        self, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> LatentCache:
        return LatentCache(batch_size, max_len, self.latent_dim + self.rope_dim, dtype, device)

    def new_pages(
        self, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> LatentPages:
        return LatentPages(num_pages, page_size, self.latent_dim + self.rope_dim, dtype, device)

    def forward(
        self,
        hidden: torch.Tensor,
        layout: SequenceLayout,
        cache: LatentCache | LatentPages | None = None,
    ) -> tuple[torch.Tensor, AttentionSums | None]:
        """hidden [B, S, D] -> [B, S, D]. See model/attention/base.py for the layout and the
        cache.
        """
        q, rows = self._queries(hidden, layout), self._rows(hidden, layout)
        if isinstance(cache, LatentPages):
            return self.o_proj(self._attend_to_pages(q, rows, layout, cache).flatten(2)), None
        held = 0 if cache is None else cache.length
        if cache is not None:
            rows = cache.append(rows)

        # Nothing was held: these tokens are all there is, cached or not.
        if held == 0:
            own, k, v = self._shared_out(q, rows, layout)
            layout.see_logits(own, k, self.scale)
            out = layout.to_tokens(self._attend(own, k, v, layout))
        elif q.shape[1] <= self._most_absorbed():
            out = self._attend_absorbed(q, rows)
        else:
            out = self._attend_expanded(q, *self._expanded(rows))
        return self.o_proj(out.flatten(2)), None

    def _shared_out(
        self, q: torch.Tensor, rows: torch.Tensor, layout: SequenceLayout
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of the tokens that attend here, and keys and values of whole rows, of the heads
        that this rank attends with. Where ranks gather they gather latents, which are a fraction of
        the keys and values that each then makes of them.
        """
        gathering = layout.gathering
        if gathering is None:
            own, k, v = layout.to_heads(q, *self._expanded(rows))
            return own, k, v
        k, v = layout.to_heads(*self._expanded(gathering.rows(rows)))
        (own,) = layout.to_heads(q)

        def placed(x: torch.Tensor) -> torch.Tensor:
            # By ranks that exchange heads, in each by those that gather: in a deal it is the other
            # way round.
            size = gathering.exchange.size
            parts = x.flatten(2).unflatten(1, (-1, size, rows.shape[1])).transpose(1, 2)
            found: torch.Tensor = gathering.placed(parts.flatten(1, 3)).unflatten(2, x.shape[2:])
            return found

        return own, placed(k), placed(v)

    def _attend_to_pages(
        self, q: torch.Tensor, rows: torch.Tensor, layout: SequenceLayout, cache: LatentPages
    ) -> torch.Tensor:
        """The last S tokens of every row, [B, S, heads, value_dim]."""
        paging = layout.paging
        assert paging is not None
        cache.write(rows, paging.slots)
        if paging.fresh:
            return self._attend(q, *self._expanded(rows), layout)
        held = cache.read(paging.pages)
        mask = paging.visible(q.shape[1], cache.page_size)
        if q.shape[1] <= self._most_absorbed():
            return self._attend_absorbed(q, held, mask)
        k, v = self._expanded(held)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale=self.scale
        )
        return out.transpose(1, 2)

    def _queries(self, hidden: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """[B, S, heads, nope_dim + rope_dim], the last part turned."""
        if self.q_proj is not None:
            q = self.q_proj(hidden)
        else:
            assert self.q_a_proj is not None
            assert self.q_a_norm is not None and self.q_b_proj is not None
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(hidden)))
        q = q.view(*hidden.shape[:2], self.num_heads, self.nope_dim + self.rope_dim)
        nope, rope = q.split((self.nope_dim, self.rope_dim), -1)
        return torch.cat((nope, apply_rotary(rope, layout.cos, layout.sin)), -1)

    def _rows(self, hidden: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """[B, S, latent_dim + rope_dim]: what a cache holds."""
        latent, rope = self.kv_a_proj(hidden).split((self.latent_dim, self.rope_dim), -1)
        turned = apply_rotary(rope.unsqueeze(2), layout.cos, layout.sin).squeeze(2)
        return torch.cat((self.kv_a_norm(latent), turned), -1)

    def _expanded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, T, heads, nope_dim + rope_dim] and values [B, T, heads, value_dim] of rows."""
        latent, rope = rows.split((self.latent_dim, self.rope_dim), -1)
        up = self.kv_b_proj(latent).view(
            *rows.shape[:2], self.num_heads, self.nope_dim + self.value_dim
        )
        nope, v = up.split((self.nope_dim, self.value_dim), -1)
        shared = rope.unsqueeze(2).expand(-1, -1, self.num_heads, -1)
        return torch.cat((nope, shared), -1), v

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout
    ) -> torch.Tensor:
        """[B, S, heads, value_dim]. Torch's fused kernels take one head dimension, and without one
        the scores of all pairs would be in memory: the shorter side is filled up with zeros.
        """
        width = max(q.shape[-1], v.shape[-1])
        padded = [F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v)]
        out = attend_packed(padded[0], padded[1], padded[2], layout, self.scale)
        return out[..., : self.value_dim]

    def _attend_expanded(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The last tokens q [B, S, heads, .] of k and v [B, T, heads, .], a chunk at a time."""
        outs, first = [], k.shape[1] - q.shape[1]
        for start in range(0, q.shape[1], QUERY_CHUNK):
            part = q[:, start : start + QUERY_CHUNK]
            end = first + start + part.shape[1]
            out = F.scaled_dot_product_attention(
                part.transpose(1, 2),
                k[:, :end].transpose(1, 2),
                v[:, :end].transpose(1, 2),
                attn_mask=_last_queries_mask(part.shape[1], end, q.device),
                scale=self.scale,
            )
            outs.append(out.transpose(1, 2))
        return torch.cat(outs, 1)

    def _most_absorbed(self) -> float:
        """Queries up to which absorbing takes fewer products than expanding the cache.

        Of a cached token and a head, expanding takes latent_dim * (nope + value) products once, and
        absorbing 2 * latent_dim - nope - value more for every query.
        """
        more = 2 * self.latent_dim - self.nope_dim - self.value_dim
        expanding = self.latent_dim * (self.nope_dim + self.value_dim)
        return expanding / more if more > 0 else float("inf")

    def _attend_absorbed(
        self, q: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The last tokens q [B, S, heads, .] of rows [B, T, latent_dim + rope_dim], which are the
        one key that all heads share, and their first latent_dim values its value. mask: [B, 1, S,
        T] bool, what they see; None: everything up to themselves.
        """
        batch, length, heads, _ = q.shape
        up = weight_of(self.kv_b_proj).view(heads, self.nope_dim + self.value_dim, self.latent_dim)
        to_key, to_value = up.split((self.nope_dim, self.value_dim), 1)
        nope, rope = q.split((self.nope_dim, self.rope_dim), -1)
        queries = torch.cat((torch.einsum("bshn,hnl->bshl", nope, to_key), rope), -1)

        # Tokens and heads are all queries of one head.
        if mask is None and length > 1:
            mask = _last_queries_mask(length, rows.shape[1], q.device)
        if mask is not None:
            mask = mask.repeat_interleave(heads, -2)
        keys = rows.unsqueeze(1)
        out = F.scaled_dot_product_attention(
            queries.flatten(1, 2).unsqueeze(1),
            keys,
            keys[..., : self.latent_dim],
            attn_mask=mask,
            scale=self.scale,
        )
        out = out.view(batch, length, heads, self.latent_dim)
        return torch.einsum("bshl,hvl->bshv", out, to_value)


def _last_queries_mask(new: int, total: int, device: torch.device) -> torch.Tensor:
    """[new, total] bool: the last `new` of `total` tokens see those up to themselves."""
    order = torch.arange(total, device=device)
    return order.unsqueeze(0) <= order[total - new :].unsqueeze(1)
