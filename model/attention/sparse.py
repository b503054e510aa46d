"""Sparse attention in the model: select, compress, correct (ops/sparse_attention), its ablations
and its training stages.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.attention.base import STATS, AttentionSums, Paging, SequenceLayout
from model.attention.cache import KVCache, KVPages, LayerCache, Pages, Regions
from model.attention.config.sparse import SparseAttentionConfig
from model.attention.dense import DenseAttention
from model.attention.indexed import Indexer
from model.config import ModelConfig
from ops.index_attention import IndexSpec, Teacher, select_blocks, select_held, teach_index
from ops.sparse_attention import (
    AttentionOutput,
    SelectionNoise,
    SparseAttentionSpec,
    decode,
    decode_pages,
    pool_entries,
    sparse_attention,
)
from ops.sparse_attention.audit import audit_rows
from ops.sparse_attention.cache import EntryCache, EntryPages, Weigh
from ops.sparse_attention.ranking import union_counts
from ops.sparse_attention.resident import Kept, Residence, select_resident
from ops.sparse_attention.resident_cache import NewTokens, ResidentCache, ResidentPages

UNION_TILE = 16
"""Queries of a tile of the union factor: what a kernel's tile of 128 rows holds at eight heads a
group.
"""


class Choice(NamedTuple):
    """What an index has made of the tokens of a forward pass, for the layers that choose as one.

    These teach it by its own inputs, which have no gradient, so that nothing of a layer's graph
    reaches another layer, and blocks can be computed again.
    """

    indexer: Indexer
    hidden: torch.Tensor
    """[B, S, D], of the layer that has the index."""
    selected: torch.Tensor | None
    """[Hk, T, K] int32 as sparse_attention takes it, or of tokens that continue a cache
    [B, S, Hk, K] as decode does; None where nobody asks.
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
        self.index_steps = settings.index_steps
        # without a trainer: the last stage
        self.step = self.dense_steps + self.noise_steps + self.index_steps

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

        # An index chooses in its own layer and in those that follow, which teach it as a mean.
        group = settings.index_group(config, layer_idx)
        self.index_owner = group[0] if group else None
        self.index_coeff = settings.index_coeff / max(1, len(group))
        self.indexer: Indexer | None = None
        if self.index_owner == layer_idx:
            index_spec = IndexSpec("msa", self.spec.block_size, self.spec.top_k)
            self.indexer = Indexer(config, index_spec, *settings.index_shape(config))

        # The sigmoid of 4 is near 1: the entries' logits start almost as they are, and the branches
        # with equal gates.
        with torch.no_grad():
            if self.trust is not None:
                self.trust.bias.fill_(4.0)
            if self.gates is not None:
                self.gates.bias.zero_()

    @property
    def chooses_by_index(self) -> bool:
        """Whether an index chooses the blocks; else their mass does."""
        return self.index_owner is not None and self.step >= self.dense_steps + self.index_steps

    @property
    def index_width(self) -> int:
        """Numbers of a token's index key here; 0: there is none."""
        return 0 if self.indexer is None else self.indexer.width

    def new_cache(
        self, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        if not self.is_sparse:
            return super().new_cache(batch_size, max_len, dtype, device)
        if self.spec.resident_blocks is not None:
            weigh = None if self.entry_weights is None else self._pool_logits
            shape = (batch_size, max_len, self.num_kv_heads, self.head_dim)
            return ResidentKVCache(ResidentCache(self.spec, *shape, dtype, device, weigh))
        return SparseKVCache(
            self.spec,
            batch_size,
            max_len,
            self.num_kv_heads,
            self.head_dim,
            dtype,
            device,
            None if self.entry_weights is None else self._pool_logits,
            self.index_width,
        )

    def new_pages(
        self,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        regions: Regions | None = None,
    ) -> Pages:
        """regions: of a bounded cache. Raises ValueError where a page is not one of its blocks."""
        if not self.is_sparse:
            return super().new_pages(num_pages, page_size, dtype, device)
        if page_size != self.spec.block_size:
            raise ValueError(
                f"page_size {page_size} must be attention.block_size {self.spec.block_size}"
            )
        weigh = None if self.entry_weights is None else self._pool_logits
        shape = (self.num_kv_heads, self.head_dim)
        if self.spec.resident_blocks is not None:
            assert regions is not None
            held = ResidentPages(self.spec, num_pages, *regions, *shape, dtype, device, weigh)
            return ResidentKVPages(held, num_pages)
        return SparseKVPages(self.spec, num_pages, *shape, dtype, device, weigh, self.index_width)

    def forward(
        self,
        hidden: torch.Tensor,
        layout: SequenceLayout,
        cache: KVCache | KVPages | ResidentKVCache | ResidentKVPages | None = None,
    ) -> tuple[torch.Tensor, AttentionSums | None]:
        """hidden [B, S, D] -> [B, S, D], and the layer's sums unless it is a dense layer."""
        if not self.is_sparse:
            assert not isinstance(cache, ResidentKVCache | ResidentKVPages)
            return super().forward(hidden, layout, cache)
        q, k, v = self._project(hidden, layout)
        if isinstance(cache, ResidentKVCache | ResidentKVPages):
            out = self._attend_resident(hidden, q, k, v, layout, cache)
            return self.o_proj(out.flatten(2)), AttentionSums(
                out.new_zeros((), dtype=torch.float32), _no_stats(out)
            )

        # The stages: dense attention first, which keeps the other parameters in the reductions.
        if self.step < self.dense_steps:
            q, k, v = layout.to_heads(q, k, v)
            k, v = layout.to_keys(k, v)
            out = layout.to_tokens(self._attend_densely(q, k, v, layout, cache))
            return self.o_proj(out.flatten(2)), AttentionSums(
                self._unused(hidden, layout), _no_stats(out)
            )

        # Pages: new keys and pooled entries are in place before anything is looked at.
        if isinstance(cache, SparseKVPages):
            assert layout.paging is not None
            cache.write(k, v, layout.paging.slots)
            if self.indexer is not None:
                cache.write_index(self._index_keys(hidden, layout), layout.paging.slots)
            if not layout.paging.fresh:
                out = self._attend_to_pages(hidden, q, layout, cache)
                return self.o_proj(out.flatten(2)), AttentionSums(
                    out.new_zeros((), dtype=torch.float32), _no_stats(out)
                )
            cache = None
        assert cache is None or isinstance(cache, KVCache)

        # Decoding: the pooled past is in the cache.
        if cache is not None and cache.length:
            out = self._attend_to_cache(hidden, q, k, v, layout, cache)
            return self.o_proj(out.flatten(2)), AttentionSums(
                out.new_zeros((), dtype=torch.float32), _no_stats(out)
            )

        # Training and prefill: all tokens at once, documents end to end.
        if cache is not None:
            if isinstance(cache, SparseKVCache) and self.indexer is not None:
                cache.place_index(self._index_keys(hidden, layout))
            cache.append(k, v)
        q, k, v = layout.to_heads(q, k, v)
        k, v = layout.to_keys(k, v)
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        attend = self._gated if self.merge == "gated" else self._one_softmax
        out, sums = attend(hidden, flat[0], flat[1], flat[2], layout)
        return self.o_proj(layout.to_tokens(out.view_as(q)).flatten(2)), sums

    def _unused(self, hidden: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """[] zero, through which every parameter that dense attention lacks has a gradient: a
        missing one would be missing from the reductions over ranks. Modules are called, so that
        ZeRO-3 gathers them.
        """
        learned = (self.offset, self.sink, self.entry_weights)
        values: list[torch.Tensor] = [p for p in learned if p is not None]
        values += [
            module(hidden[:1, :1]) for module in (self.trust, self.gates) if module is not None
        ]
        if self.indexer is not None:
            first = [x[:1, :1] for x in (hidden.detach(), layout.cos, layout.sin)]
            values += [self.indexer.queries(*first)[0], self.indexer.token_keys(*first)]
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

    def _index_keys(self, hidden: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """[B, S, w] of the tokens, for a cache."""
        assert self.indexer is not None
        return self.indexer.token_keys(hidden.detach(), layout.cos, layout.sin)

    def _choice(self, hidden: torch.Tensor, layout: SequenceLayout) -> Choice | None:
        """Of packed rows; None where no index is asked."""
        if self.index_owner is None:
            return None
        if not (self.chooses_by_index or self.training or layout.measure):
            return None
        if self.indexer is None:
            followed: Choice = layout.choices[self.index_owner]
            return followed
        hidden, selected = hidden.detach(), None
        if self.chooses_by_index or layout.measure:
            bounds = _bounds(layout)
            with torch.no_grad():
                index = self.indexer.of_rows(hidden, layout, bounds)
                selected = select_blocks(index.queries, index.keys, bounds, self.spec)
        choice = Choice(self.indexer, hidden, selected)
        layout.choices[self.layer_idx] = choice
        return choice

    def _choice_held(
        self,
        hidden: torch.Tensor,
        index_keys: torch.Tensor | None,
        position: torch.Tensor,
        layout: SequenceLayout,
    ) -> torch.Tensor | None:
        """[B, S, Hk, K] blocks for tokens that continue a cache, None where their mass chooses.
        index_keys: [B, N, w] of the rows so far; position: [B, S].
        """
        if not self.chooses_by_index:
            return None
        if self.indexer is None:
            assert self.index_owner is not None
            followed: Choice = layout.choices[self.index_owner]
            return followed.selected
        assert index_keys is not None
        hidden = hidden.detach()
        queries, _ = self.indexer.queries(hidden, layout.cos, layout.sin)
        selected = select_held(queries, index_keys, position, self.spec)
        layout.choices[self.layer_idx] = Choice(self.indexer, hidden, selected)
        return selected

    def _divergence(
        self,
        choice: Choice,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attended: AttentionOutput,
        bias: torch.Tensor | None,
        pool_logits: torch.Tensor | None,
        layout: SequenceLayout,
    ) -> torch.Tensor:
        """[] of the index from this layer's masses, summed over tokens; its gradient reaches the
        index alone.
        """
        bounds = _bounds(layout)
        index = choice.indexer.of_rows(choice.hidden, layout, bounds)
        teacher = Teacher(
            q.detach(),
            k.detach(),
            pool_entries(q, k, v, layout.cu_seqlens, self.spec, pool_logits),
            attended.selected,
            attended.lse.detach(),
            None if bias is None else bias.detach(),
        )
        return teach_index(index.queries, index.keys, teacher, bounds, self.spec, layout.token_mask)

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
        choice = self._choice(hidden, layout)
        selected = choice.selected if choice is not None and self.chooses_by_index else None
        kept = None
        if self.spec.resident_blocks is not None:
            entries = pool_entries(q, k, v, layout.cu_seqlens, self.spec, pool_logits)
            kept = select_resident(q, entries, _bounds(layout), self.spec, layout.measure)
            selected = kept.selected
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
            selected=selected,
        )
        return attended.out, self._sums(
            q, k, v, attended, bias, layout, pool_logits=pool_logits, choice=choice, kept=kept
        )

    def _attend_resident(
        self,
        hidden: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: SequenceLayout,
        cache: ResidentKVCache | ResidentKVPages,
    ) -> torch.Tensor:
        """Tokens [B, S, ...] with a bounded cache, the first ones of documents at once."""
        if self.step < self.dense_steps:
            raise ValueError(
                f"attention.resident_blocks {self.spec.resident_blocks} bounds the cache, and the "
                f"layers still attend densely (attention.dense_steps {self.dense_steps}): train "
                "further, or set attention.resident_blocks=null"
            )
        bias, sink = self._bias(hidden), self._sink_logits()
        if isinstance(cache, ResidentKVPages):
            cache.held.spec = self.spec  # of which top_k may have been changed
            if not _paging(layout).fresh:
                return cache.held.extend(q, k, v, _new_tokens(layout), bias, sink)
        elif cache.length:
            return cache.held.extend(q, k, v, bias, sink)

        # Padding behind a document is a document of its own: its queries choose nothing that stays.
        cu_seqlens, bounds = _own_documents(layout)
        queries, keys, values = (x.flatten(0, 1) for x in (q, k, v))
        logits = None if self.entry_weights is None else self._pool_logits(values)
        entries = pool_entries(queries, keys, values, cu_seqlens, self.spec, logits)
        kept = select_resident(queries, entries, bounds, self.spec)
        if isinstance(cache, ResidentKVPages):
            cache.begin(keys, values, kept.left[::2], bounds, _paging(layout))
        else:
            cache.held.fill(k, v, kept.left)
        out = sparse_attention(
            queries,
            keys,
            values,
            cu_seqlens,
            self.spec,
            bias=None if bias is None else bias.flatten(0, 1),
            sink=sink,
            pool_logits=logits,
            selected=kept.selected,
        ).out
        return out.view_as(q)

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
        layout: SequenceLayout,
        cache: KVCache,
    ) -> torch.Tensor:
        """New tokens [B, S, ...], one after the other, against the cache."""
        if not isinstance(cache, SparseKVCache):
            raise TypeError(
                f"{type(cache).__name__} has no pooled entries; take caches from "
                "Transformer.new_caches"
            )

        # Candidates are complete before the first of these tokens comes, so that an index can
        # choose for all of them at once.
        index_keys = None
        if self.indexer is not None:
            index_keys = cache.place_index(self._index_keys(hidden, layout))
        position = cache.length + torch.arange(q.shape[1], device=q.device)
        choice = self._choice_held(hidden, index_keys, position.expand(len(q), -1), layout)

        # A token may complete a block, which the next one then sees pooled: one at a time.
        outs = []
        for i in range(q.shape[1]):
            keys, values = cache.append(k[:, i : i + 1], v[:, i : i + 1])
            attend = functools.partial(
                decode, q[:, i], keys, values, cache.entries.entries, cache.length
            )
            if self.gates is None:
                bias = self._bias(hidden[:, i])
                chosen = None if choice is None else choice[:, i]
                outs.append(
                    attend(self.spec, bias=bias, sink=self._sink_logits(), selected=chosen)[0]
                )
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
        index_keys = None if self.indexer is None else cache.read_index(paging.pages)
        choice = self._choice_held(hidden, index_keys, (length - 1).clamp_min(0), layout)
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
            chosen = None if choice is None else choice.flatten(0, 1)
            out, _ = attend(
                self.spec, bias=self._bias(flat), sink=self._sink_logits(), selected=chosen
            )
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
        choice: Choice | None = None,
        kept: Kept | None = None,
    ) -> AttentionSums:
        regularised = any(self.coeffs) and self.training
        found = dict.fromkeys(STATS, q.new_zeros((), dtype=torch.float32))
        penalty = found["error"]
        divergence = None

        if layout.measure:
            found |= _measure(attended, layout.of_attending(layout.token_mask))

        # What the index has to learn of this layer, as a mean over those that it chooses for.
        if choice is not None and (self.training or layout.measure):
            divergence = self._divergence(
                choice, q, k, v, attended, bias, pool_logits, layout
            ).float()
            if layout.measure:
                counted = len(q) if layout.token_mask is None else layout.token_mask.sum()
                found |= {
                    "index_tokens": divergence.detach().new_ones(()) * counted,
                    "index_loss": divergence.detach(),
                }

        # A few rows, the same whatever the batch is packed like, are compared with dense attention.
        if audit and self.audit_rows > 0 and (layout.measure or regularised):
            rows = layout.audited_rows(self.layer_idx, self.audit_rows, len(k))

            # Without a regulariser nothing of it has to be kept for backward.
            sinks = self._own_sinks(layout)
            other = None if choice is None else choice.selected
            other = other if kept is None else kept.candidates
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
                    other,
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
                if choice is not None:
                    found |= {
                        "index_audited": audited.candidate_mass.sum(),
                        "index_recall": audited.chosen_mass.sum(),
                    }
                if kept is not None:
                    found |= {
                        "candidate_mass": audited.candidate_mass.sum(),
                        "resident_mass": audited.chosen_mass.sum(),
                    }
        if divergence is not None:
            penalty = penalty + self.index_coeff * divergence
        return AttentionSums(penalty, torch.stack([found[name].float() for name in STATS]))


class SparseKVCache(KVCache):
    """Keys, values and the pooled entries of the blocks that are complete; with an index also its
    keys [B, max_len, index_width].
    """

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
        index_width: int = 0,
    ):
        super().__init__(batch_size, max_len, num_kv_heads, head_dim, dtype, device)
        self.index_keys = torch.zeros(
            (batch_size, max_len, index_width), dtype=dtype, device=device
        )
        self.entries = EntryCache(
            spec, batch_size, max_len, num_kv_heads, head_dim, dtype, device, weigh
        )

    def place_index(self, keys: torch.Tensor) -> torch.Tensor:
        """Store [B, S, w] of the tokens that are appended next, and return all with them.

        Raises:
            ValueError: the cache is full.
        """
        end = self.length + keys.shape[1]
        if end > self.max_len:
            raise ValueError(f"{end} tokens do not fit the cache of {self.max_len}")
        self.index_keys[:, self.length : end] = keys
        return self.index_keys[:, :end]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.length
        found = super().append(keys, values)
        self.entries.update(*found, before)
        return found


class ResidentKVCache(LayerCache):
    """A bounded cache: the tokens of resident blocks, and the pooled entries of all."""

    def __init__(self, held: ResidentCache):
        self.held = held

    @property
    def max_len(self) -> int:  # type: ignore[override]
        return self.held.max_len

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.held.length


class ResidentKVPages(Pages):
    """A bounded cache of many documents: pages hold the entries of blocks alone, and tokens are in
    the regions of the documents.
    """

    def __init__(self, held: ResidentPages, num_pages: int):
        super().__init__(num_pages, held.spec.block_size)
        self.held = held

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.held.tensors()

    def clear(self, pages: list[int]) -> None:
        """Of entries: rooms are wiped when blocks get them."""
        for pooled in self.held.entries.tensors():
            pooled[pages] = 0

    def begin(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        left: list[Residence],
        bounds: list[int],
        paging: Paging,
    ) -> None:
        """Store the first tokens [T, Hk, d] of documents, each with padding behind it. left: of the
        documents; bounds: where documents and their padding begin, and T.
        """
        if paging.regions is None:
            return
        begins, ends = bounds[:-1:2], bounds[1::2]
        for region, begin, end, one in zip(
            paging.regions.tolist(), begins, ends, left, strict=True
        ):
            # the page of a complete block is that of its last token
            last = paging.slots[begin + self.page_size - 1 : end : self.page_size]
            self.held.fill(region, last // self.page_size, k[begin:end], v[begin:end], one)


class SparseKVPages(KVPages):
    """Keys, values and the pooled entries of the pages that are full; a page is a block. With an
    index also its keys [num_pages, block_size, index_width].
    """

    def __init__(
        self,
        spec: SparseAttentionSpec,
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        weigh: Weigh | None = None,
        index_width: int = 0,
    ):
        super().__init__(num_pages, spec.block_size, num_kv_heads, head_dim, dtype, device)
        self.entries = EntryPages(spec, num_pages, num_kv_heads, head_dim, dtype, device, weigh)
        self.index_keys = torch.zeros(
            (num_pages, spec.block_size, index_width), dtype=dtype, device=device
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        index = (self.index_keys,) if self.index_keys.shape[2] else ()
        return (*super().tensors(), *self.entries.entries, *index)

    def write_index(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """Store [B, S, w] at slots [B * S] int64 = page * block_size + place."""
        self.index_keys.flatten(0, 1)[slots] = keys.flatten(0, 1)

    def read_index(self, pages: torch.Tensor) -> torch.Tensor:
        """[B, P * block_size, w] of pages [B, P] int64."""
        return self.index_keys[pages].flatten(1, 2)

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        super().write(keys, values, slots)
        # A block is pooled when its last token arrives.
        self.entries.update(self.keys, self.values, slots.view(keys.shape[:2]))


def _merged(gates: torch.Tensor, branches: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Sum of branches [T, heads, head_dim] under gates [T, heads, 3]."""
    return sum(
        (gates[..., i, None] * branch for i, branch in enumerate(branches)),
        torch.zeros_like(branches[0]),
    )


def _bounds(layout: SequenceLayout) -> list[int]:
    """Where documents begin, and the number of tokens."""
    bounds: list[int] = layout.shared("bounds", lambda: layout.cu_seqlens.cpu()).tolist()
    return bounds


def _paging(layout: SequenceLayout) -> Paging:
    assert layout.paging is not None
    return layout.paging


def _own_documents(layout: SequenceLayout) -> tuple[torch.Tensor, list[int]]:
    """cu_seqlens and bounds of documents; where these have pages, each with its padding behind it
    as one more.
    """
    paging, bounds = layout.paging, _bounds(layout)
    if paging is None:
        return layout.cu_seqlens, bounds

    def apart() -> tuple[torch.Tensor, list[int]]:
        lengths = paging.lengths.tolist()
        both = zip(bounds, lengths, strict=False)
        found = [place for begin, number in both for place in (begin, begin + number)]
        found.append(bounds[-1])
        return torch.tensor(found, dtype=torch.int32, device=layout.cu_seqlens.device), found

    return layout.shared("documents and padding", apart)


def _new_tokens(layout: SequenceLayout) -> NewTokens:
    """Of a pass that continues pages, on the host."""
    paging = _paging(layout)

    def told() -> NewTokens:
        lengths: list[int] = paging.lengths.tolist()
        width = len(paging.slots) // len(lengths)
        numbers = [width] * len(lengths)
        if layout.token_mask is not None:
            numbers = layout.token_mask.view(len(lengths), width).sum(1).tolist()
        if paging.regions is None:
            return NewTokens([0] * len(lengths), paging.pages, lengths, [0] * len(lengths))
        return NewTokens(paging.regions.tolist(), paging.pages, lengths, numbers)

    return layout.shared("new tokens", told)


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
