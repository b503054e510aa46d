"""Sparse attention in the model: select, compress, correct (ops/sparse_attention), its ablations
and its training stages.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from model.attention.base import STATS, AttentionSums, SequenceLayout
from model.attention.cache import KVCache, KVPages
from model.attention.config import SparseAttentionConfig
from model.attention.dense import DenseAttention
from model.config import ModelConfig
from ops.sparse_attention import (
    AttentionOutput,
    SelectionNoise,
    SparseAttentionSpec,
    decode,
    decode_pages,
    sparse_attention,
)
from ops.sparse_attention.audit import audit_rows
from ops.sparse_attention.cache import EntryCache, EntryPages, Weigh
from ops.sparse_attention.ranking import union_counts

UNION_TILE = 16
"""Queries of a tile of the union factor: what a kernel's tile of 128 rows holds at eight heads a
group.
"""


class SparseAttention(DenseAttention):
    """Causal attention whose cost per token is nearly constant: window, selected blocks, pooled
    rest, one softmax.

    Args:
        settings: what it does; None: the defaults.
        layer_idx: its place in the model, which says whether it is sparse and seeds its random
            choices.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: SparseAttentionConfig | None = None,
        layer_idx: int = 0,
    ):
        super().__init__(config)
        settings = settings or SparseAttentionConfig()
        self.spec = settings.spec()
        self.merge = settings.merge
        self.layer_idx = layer_idx
        self.is_sparse = settings.is_sparse(config, layer_idx)
        self.coeffs = settings.regularisers
        self.audit_rows = settings.audit_rows

        # Stages of training: dense attention, selection under noise, selection alone.
        self.dense_steps = settings.dense_steps
        self.noise_steps = settings.noise_steps
        self.temperature = settings.temperature
        self.min_top_k = settings.min_top_k
        self.step = self.dense_steps + self.noise_steps  # without a trainer: the last stage

        heads = self.num_heads
        # vectors, except for what multiplies the hidden state: materialize leaves vectors
        # as they are
        self.offset = (
            nn.Parameter(torch.zeros(heads)) if settings.offset and self.is_sparse else None
        )
        self.trust = (
            nn.Linear(config.hidden_size, heads) if settings.trust and self.is_sparse else None
        )
        self.sink = nn.Parameter(torch.zeros(heads)) if settings.sink and self.is_sparse else None
        self.gates = (
            nn.Linear(config.hidden_size, 3 * heads)
            if self.merge == "gated" and self.is_sparse
            else None
        )

        # A vector too, though it is used as [Hk, d, 2, d]: zeros pool equally.
        self.entry_weights = (
            nn.Parameter(torch.zeros(2 * self.num_kv_heads * self.head_dim**2))
            if settings.entries == "gated" and self.is_sparse
            else None
        )

        # The sigmoid of 4 is near 1: the entries' logits start almost as they are, and the branches
        # with equal gates.
        with torch.no_grad():
            if self.trust is not None:
                self.trust.bias.fill_(4.0)
            if self.gates is not None:
                self.gates.bias.zero_()

    def new_cache(
        self, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        if not self.is_sparse:
            return super().new_cache(batch_size, max_len, dtype, device)
        return SparseKVCache(
            self.spec,
            batch_size,
            max_len,
            self.num_kv_heads,
            self.head_dim,
            dtype,
            device,
            None if self.entry_weights is None else self._pool_logits,
        )

    def new_pages(
        self, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> KVPages:
        """Raises ValueError where a page is not one of its blocks."""
        if not self.is_sparse:
            return super().new_pages(num_pages, page_size, dtype, device)
        if page_size != self.spec.block_size:
            raise ValueError(
                f"page_size {page_size} must be attention.block_size {self.spec.block_size}"
            )
        return SparseKVPages(
            self.spec,
            num_pages,
            self.num_kv_heads,
            self.head_dim,
            dtype,
            device,
            None if self.entry_weights is None else self._pool_logits,
        )

    def forward(
        self, hidden: torch.Tensor, layout: SequenceLayout, cache: KVCache | KVPages | None = None
    ) -> tuple[torch.Tensor, AttentionSums | None]:
        """hidden [B, S, D] -> [B, S, D], and the layer's sums unless it is a dense layer."""
        if not self.is_sparse:
            return super().forward(hidden, layout, cache)
        q, k, v = self._project(hidden, layout)

        # The stages: dense attention first, which keeps the other parameters in the reductions.
        if self.step < self.dense_steps:
            q, k, v = layout.to_heads(q, k, v)
            k, v = layout.to_keys(k, v)
            out = layout.to_tokens(self._attend_densely(q, k, v, layout, cache))
            return self.o_proj(out.flatten(2)), AttentionSums(self._unused(hidden), _no_stats(out))

        # Pages: new keys and pooled entries are in place before anything is looked at.
        if isinstance(cache, SparseKVPages):
            assert layout.paging is not None
            cache.write(k, v, layout.paging.slots)
            if not layout.paging.fresh:
                out = self._attend_to_pages(hidden, q, layout, cache)
                return self.o_proj(out.flatten(2)), AttentionSums(
                    out.new_zeros((), dtype=torch.float32), _no_stats(out)
                )
            cache = None
        assert cache is None or isinstance(cache, KVCache)

        # Decoding: the pooled past is in the cache.
        if cache is not None and cache.length:
            out = self._attend_to_cache(hidden, q, k, v, cache)
            return self.o_proj(out.flatten(2)), AttentionSums(
                out.new_zeros((), dtype=torch.float32), _no_stats(out)
            )

        # Training and prefill: all tokens at once, documents end to end.
        if cache is not None:
            cache.append(k, v)
        q, k, v = layout.to_heads(q, k, v)
        k, v = layout.to_keys(k, v)
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        attend = self._gated if self.merge == "gated" else self._one_softmax
        out, sums = attend(hidden, flat[0], flat[1], flat[2], layout)
        return self.o_proj(layout.to_tokens(out.view_as(q)).flatten(2)), sums

    def _unused(self, hidden: torch.Tensor) -> torch.Tensor:
        """[] zero, through which every parameter that dense attention lacks has a gradient: a
        missing one would be missing from the reductions over ranks. Modules are called, so that
        ZeRO-3 gathers them.
        """
        values = [p for p in (self.offset, self.sink, self.entry_weights) if p is not None]
        values += [
            module(hidden[:1, :1]) for module in (self.trust, self.gates) if module is not None
        ]
        return sum(
            (0.0 * value.float().sum() for value in values),
            hidden.new_zeros((), dtype=torch.float32),
        )

    def _sink_logits(self) -> torch.Tensor | None:
        return None if self.sink is None else self.sink.float()

    def _own_sinks(self, layout: SequenceLayout) -> torch.Tensor | None:
        """Those of the heads that attend here."""
        sink = self._sink_logits()
        return None if sink is None else layout.own_heads(sink)

    def _pool_logits(
        self, values: torch.Tensor, layout: SequenceLayout | None = None
    ) -> torch.Tensor:
        """Of a token's weight within its entry: values [..., Hk, d] -> [..., Hk, 2, d], by a matrix
        per key/value head. Values say what a token holds and know nothing of its position, and a
        cache has them already. layout: the values are those of this rank's heads alone.
        """
        assert self.entry_weights is not None
        weights = self.entry_weights.view(self.num_kv_heads, self.head_dim, -1)
        weights = weights if layout is None else layout.own_heads(weights)
        found = torch.einsum("...hd,hde->...he", values, weights.to(values.dtype))
        logits: torch.Tensor = found.unflatten(-1, (2, self.head_dim))
        return logits

    def _noise(self, layout: SequenceLayout) -> SelectionNoise | None:
        done = self.step - self.dense_steps
        if not self.training or done >= self.noise_steps:
            return None
        # A head draws by its place in the layer, whichever rank it is on.
        first, num_kv_heads = layout.place_of_heads(self.num_kv_heads)
        return SelectionNoise(
            self.layer_idx,
            self.temperature * (1 - done / self.noise_steps),
            self.min_top_k,
            first,
            num_kv_heads,
        )

    def _bias(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[..., heads] fp32: learned offset and trust of the coarse entries."""
        bias = None
        if self.trust is not None:
            bias = F.logsigmoid(self.trust(hidden).float())
        if self.offset is not None:
            offset = self.offset.float()
            bias = offset.expand(*hidden.shape[:-1], -1) if bias is None else bias + offset
        return bias

    def _one_softmax(
        self,
        hidden: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: SequenceLayout,
    ) -> tuple[torch.Tensor, AttentionSums]:
        """hidden [B, S, D] of the tokens here; k, v [T, ...] of whole rows; q [n, ...] of the
        tokens that attend here, as what returns.
        """
        bias = self._bias(hidden)
        if bias is not None:
            bias = layout.to_heads(bias)[0].flatten(0, 1)
        pool_logits = None if self.entry_weights is None else self._pool_logits(v, layout)
        attended = sparse_attention(
            q,
            k,
            v,
            layout.cu_seqlens,
            self.spec,
            bias=bias,
            sink=self._own_sinks(layout),
            pool_logits=pool_logits,
            noise=self._noise(layout),
            token_ids=layout.of_attending(layout.token_ids),
            queries=layout.attending(),
        )
        return attended.out, self._sums(q, k, v, attended, bias, layout, pool_logits=pool_logits)

    def _gated(
        self,
        hidden: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: SequenceLayout,
    ) -> tuple[torch.Tensor, AttentionSums]:
        """Three softmaxes: every complete past block's entries; own, first and selected blocks; the
        window.
        """
        coarse, selected, window = _branches(self.spec)
        attend = functools.partial(
            sparse_attention, q, k, v, layout.cu_seqlens, queries=layout.attending()
        )
        chosen = attend(
            selected,
            noise=self._noise(layout),
            token_ids=layout.of_attending(layout.token_ids),
            coarse=False,
        )
        branches = attend(coarse, exact=False).out, chosen.out, attend(window, coarse=False).out
        sums = self._sums(q, k, v, chosen, None, layout, audit=False)
        gates = layout.to_heads(self._gates(hidden))[0].flatten(0, 1)
        return _merged(gates, branches), sums

    def _gates(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., heads, 3], of the branches."""
        assert self.gates is not None
        gates = torch.sigmoid(self.gates(hidden))
        return gates.view(*gates.shape[:-1], self.num_heads, 3)

    def _attend_to_cache(
        self,
        hidden: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: KVCache,
    ) -> torch.Tensor:
        """New tokens [B, S, ...], one after the other, against the cache."""
        if not isinstance(cache, SparseKVCache):
            raise TypeError(
                f"{type(cache).__name__} has no pooled entries; take caches from "
                "Transformer.new_caches"
            )

        # A token may complete a block, which the next one then sees pooled: one at a time.
        outs = []
        for i in range(q.shape[1]):
            keys, values = cache.append(k[:, i : i + 1], v[:, i : i + 1])
            attend = functools.partial(
                decode, q[:, i], keys, values, cache.entries.entries, cache.length
            )
            if self.gates is None:
                bias = self._bias(hidden[:, i])
                outs.append(attend(self.spec, bias=bias, sink=self._sink_logits())[0])
                continue
            coarse, selected, window = _branches(self.spec)
            branches = (
                attend(coarse, exact=False)[0],
                attend(selected, coarse=False)[0],
                attend(window, coarse=False)[0],
            )
            outs.append(_merged(self._gates(hidden[:, i]), branches))
        return torch.stack(outs, 1)

    def _attend_to_pages(
        self, hidden: torch.Tensor, q: torch.Tensor, layout: SequenceLayout, cache: SparseKVPages
    ) -> torch.Tensor:
        """The last S tokens [B, S, ...] of every row, each as a row of its own: a token sees pooled
        only the blocks that were complete before it, so that all of them attend at once.
        """
        paging, (batch, new) = layout.paging, q.shape[:2]
        assert paging is not None
        length = paging.lengths.unsqueeze(1) - new + 1 + torch.arange(new, device=q.device)
        flat = hidden.flatten(0, 1)
        attend = functools.partial(
            decode_pages,
            q.flatten(0, 1),
            cache.keys,
            cache.values,
            cache.entries.entries,
            paging.pages.repeat_interleave(new, 0),
            length.flatten().clamp_min(1),  # padding before a shorter row stays finite
        )
        if self.gates is None:
            out, _ = attend(self.spec, bias=self._bias(flat), sink=self._sink_logits())
        else:
            coarse, selected, window = _branches(self.spec)
            branches = (
                attend(coarse, exact=False)[0],
                attend(selected, coarse=False)[0],
                attend(window, coarse=False)[0],
            )
            out = _merged(self._gates(flat), branches)
        return out.view(batch, new, *out.shape[1:])

    def _sums(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attended: AttentionOutput,
        bias: torch.Tensor | None,
        layout: SequenceLayout,
        audit: bool = True,
        pool_logits: torch.Tensor | None = None,
    ) -> AttentionSums:
        regularised = any(self.coeffs) and self.training
        found = dict.fromkeys(STATS, q.new_zeros((), dtype=torch.float32))
        penalty = found["error"]

        if layout.measure:
            found |= _measure(attended, layout.of_attending(layout.token_mask))

        # A few rows, the same whatever the batch is packed like, are compared with dense attention.
        if audit and self.audit_rows > 0 and (layout.measure or regularised):
            rows = layout.audited_rows(self.layer_idx, self.audit_rows, len(k))

            # Without a regulariser nothing of it has to be kept for backward.
            sinks = self._own_sinks(layout)
            with torch.set_grad_enabled(regularised and torch.is_grad_enabled()):
                audited = audit_rows(
                    q,
                    k,
                    v,
                    layout.cu_seqlens,
                    self.spec,
                    attended,
                    rows,
                    bias,
                    sinks,
                    pool_logits,
                    layout.attending(),
                )

            # A sampled row stands for 1 / audit_rows tokens. The mean is over all heads: ranks that
            # attend with some of them add up to it.
            if regularised:
                values = (audited.mass_kl, audited.coherence, audited.alignment)
                penalty = sum(
                    (c * x.mean(-1).sum() for c, x in zip(self.coeffs, values, strict=True)),
                    penalty,
                )
                _, num_heads = layout.place_of_heads(self.num_heads)
                penalty = penalty * (q.shape[1] / num_heads) / self.audit_rows

            if layout.measure:
                # rounding of the outputs
                slack = 1e-4 if q.dtype in (torch.float32, torch.float64) else 3e-2
                found |= {
                    "audited": audited.error.new_tensor(audited.error.numel()),
                    "error": audited.error.clamp_max(1).sum(),
                    "error_squared": audited.error.clamp_max(1).square().sum(),
                    "certificate": audited.certificate.clamp_max(1).sum(),
                    "covered": (audited.error <= audited.certificate + slack).sum(),
                    "bound_violations": (audited.error > audited.bound + audited.rounding).sum(),
                    "mass_kl": audited.mass_kl.detach().sum(),
                    "coherence": audited.coherence.detach().sum(),
                }
        return AttentionSums(penalty, torch.stack([found[name].float() for name in STATS]))


class SparseKVCache(KVCache):
    """Keys, values and the pooled entries of the blocks that are complete."""

    def __init__(
        self,
        spec: SparseAttentionSpec,
        batch_size: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        weigh: Weigh | None = None,
    ):
        super().__init__(batch_size, max_len, num_kv_heads, head_dim, dtype, device)
        self.entries = EntryCache(
            spec, batch_size, max_len, num_kv_heads, head_dim, dtype, device, weigh
        )

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.length
        found = super().append(keys, values)
        self.entries.update(*found, before)
        return found


class SparseKVPages(KVPages):
    """Keys, values and the pooled entries of the pages that are full; a page is a block."""

    def __init__(
        self,
        spec: SparseAttentionSpec,
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        weigh: Weigh | None = None,
    ):
        super().__init__(num_pages, spec.block_size, num_kv_heads, head_dim, dtype, device)
        self.entries = EntryPages(spec, num_pages, num_kv_heads, head_dim, dtype, device, weigh)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*super().tensors(), *self.entries.entries)

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        super().write(keys, values, slots)
        # A block is pooled when its last token arrives.
        self.entries.update(self.keys, self.values, slots)


def _merged(gates: torch.Tensor, branches: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Sum of branches [T, heads, head_dim] under gates [T, heads, 3]."""
    return sum(
        (gates[..., i, None] * branch for i, branch in enumerate(branches)),
        torch.zeros_like(branches[0]),
    )


def _no_stats(like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros(len(STATS), dtype=torch.float32)


@torch.no_grad()
def _measure(attended: AttentionOutput, token_mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    if token_mask is None:
        real = attended.tail_mass.new_ones(len(attended.tail_mass))
    else:
        real = token_mask.float()
    heads = attended.tail_mass.shape[1]
    per_query = (attended.selected >= 0).sum(-1).float() * real
    union_blocks, tile_blocks = union_counts(attended.selected, UNION_TILE)
    return {
        "queries": real.sum() * heads,
        "tail_mass": (attended.tail_mass * real.unsqueeze(1)).sum(),
        "selected_mass": (attended.selected_mass * real.unsqueeze(1)).sum(),
        "selected_blocks": per_query.mean(0).sum() * heads,
        "union_blocks": union_blocks,
        "tile_blocks": tile_blocks,
    }


@functools.cache
def _branches(
    spec: SparseAttentionSpec,
) -> tuple[SparseAttentionSpec, SparseAttentionSpec, SparseAttentionSpec]:
    """Specs of merge=gated: coarse entries, selected blocks (with own and first ones), window."""
    return (
        replace(spec, tail="coarse"),
        replace(spec, window_size=0),
        replace(spec, top_k=0, num_sink_blocks=0, top_p=None),
    )
