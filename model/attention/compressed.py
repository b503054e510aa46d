"""Attention to a window and to pooled entries of everything before it, as DeepSeek-V4 has it: CSA,
whose entries an index chooses, and HCA, which sees all of its few (ops/compressed_attention).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.attention.base import STATS, AttentionSums, SequenceLayout
from model.attention.cache import LivePages
from model.attention.compressed_cache import CompressedCache, CompressedPages, Held, Widths
from model.attention.config.compressed import CompressedAttentionConfig
from model.config import ModelConfig
from model.cost.entries import EntryLayer
from model.layers import RMSNorm, apply_trailing_rotary, rotary_tables
from ops.compressed_attention import (
    CompressedSpec,
    Windows,
    attend_held,
    audit_entries,
    choose_held,
    closed_windows,
    compressed_attention,
    gated_pool,
    pooled,
)
from ops.index_attention import Index


class GroupedLinear(nn.Linear):
    """A block-diagonal projection: `groups` runs of features, each to out_features / groups.

    weight: [out_features, in_features / groups].
    """

    def __init__(self, in_features: int, out_features: int, groups: int):
        super().__init__(in_features // groups, out_features, bias=False)
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        weight = self.weight.view(self.groups, -1, self.weight.shape[1])
        runs = x.unflatten(-1, (self.groups, -1))
        return torch.einsum("...gi,goi->...go", runs, weight).flatten(-2)


class Turns(NamedTuple):
    """How a layer turns positions: cosines and sines of any."""

    size: int
    theta: float
    scaling: object

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S] int64 -> two fp32 tensors [B, S, size / 2]."""
        return rotary_tables(positions, self.size, self.theta, self.scaling)  # type: ignore[arg-type]


class Compressor(nn.Module):
    """Entries of windows of so many tokens: gated means of projections, normalised, turned by the
    position of their window's first token. Windows of one token have nothing to weigh.

    Windows overlap where the layer says so: an entry is then a mean of its own window and the one
    before, of which each token gives other channels.

    Args:
        width: channels of an entry.
        slot_bias: whether gates have a bias for a token's place in the window.
    """

    def __init__(
        self, config: ModelConfig, width: int, layer: EntryLayer, slot_bias: bool, turns: Turns
    ):
        super().__init__()
        self.width, self.ratio, self.overlap, self.turns = width, layer.ratio, layer.overlaps, turns
        self.row = width * (1 + self.overlap)
        self.kv_proj = nn.Linear(config.hidden_size, self.row, bias=False)
        self.gate_proj: nn.Linear | None = None
        self.slot_bias: nn.Parameter | None = None
        if layer.is_gated:
            self.gate_proj = nn.Linear(config.hidden_size, self.row, bias=False)
        if layer.is_gated and slot_bias:
            # a vector, which materialize leaves as it is
            self.slot_bias = nn.Parameter(torch.zeros(self.ratio * self.row))
        self.norm = RMSNorm(width, config.norm_eps)

    @property
    def row_width(self) -> int:
        """Values of a token that its entry is pooled from."""
        return self.row * (1 + (self.gate_proj is not None))

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, row_width]: contents and gates of tokens, what a cache holds of those
        whose window is open.
        """
        content: torch.Tensor = self.kv_proj(hidden)
        if self.gate_proj is None:
            return content
        return torch.cat((content, self.gate_proj(hidden)), -1)

    def forward(
        self, rows: torch.Tensor, windows: Windows, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of packed documents: rows [B, S, row_width], positions [B, S] -> entries [M, width], and
        what they were before they were turned.
        """
        flat = rows.flatten(0, 1)
        if self.gate_proj is None:
            entries = flat[windows.starts]
        else:
            content, gates = flat.split(self.row, -1)
            entries = gated_pool(content, gates, self._biases(content), windows, self.overlap)
        own = positions.flatten()[windows.starts][None]
        turned, normed = self._finished(entries.unsqueeze(0), own)
        return turned[0], normed[0]

    def of_windows(
        self, rows: torch.Tensor, before: torch.Tensor, number: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of windows at hand: rows [B, n, ratio, row_width], those of the windows before them, and
        the windows' numbers [B, n] in their documents -> [B, n, width] twice, as forward does.
        """
        if self.gate_proj is None:
            return self._finished(rows[:, :, 0], number * self.ratio)
        content, gates = rows.split(self.row, -1)
        earlier = before.split(self.row, -1) if self.overlap else None
        entries = pooled(content, gates, self._biases(content), earlier, number > 0)
        return self._finished(entries.to(rows.dtype), number * self.ratio)

    def _biases(self, like: torch.Tensor) -> torch.Tensor:
        """[ratio, row], added to gates."""
        if self.slot_bias is None:
            return like.new_zeros((self.ratio, self.row))
        return self.slot_bias.view(self.ratio, self.row)

    def _finished(
        self, entries: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, n, width], normalised, and before that turned by positions [B, n]."""
        normed = self.norm(entries)
        turned = apply_trailing_rotary(normed.unsqueeze(2), *self.turns(positions)).squeeze(2)
        return turned, normed


class EntryIndexer(nn.Module):
    """What an index makes of hidden states and of the queries' latents: queries and their weights
    and, in a layer that makes entries, a key for each of these: an entry of its own, or a
    projection of the layer's, normalised and turned by the same position.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: CompressedAttentionConfig,
        layer: EntryLayer,
        turns: Turns,
    ):
        super().__init__()
        self.heads, self.width = settings.index_heads, settings.index_head_dim
        self.turns = turns
        self.q_proj = nn.Linear(settings.q_lora_rank, self.heads * self.width, bias=False)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.compressor: Compressor | None = None
        self.key_proj: nn.Linear | None = None
        if layer.makes_entries and settings.index_keys == "pooled":
            self.compressor = Compressor(config, self.width, layer, settings.slot_bias, turns)
        elif layer.makes_entries:
            self.key_proj = nn.Linear(config.attention_head_dim, self.width, bias=False)
            self.key_norm = RMSNorm(self.width, config.norm_eps)

    def queries(
        self, hidden: torch.Tensor, latent: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, D] and [B, S, q_lora_rank] -> queries [B, S, I, w], turned, weights [B, S, I]."""
        queries = self.q_proj(latent).unflatten(-1, (self.heads, self.width))
        return apply_trailing_rotary(queries, cos, sin), self.weights_proj(hidden)

    def projected_keys(self, entries: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[B, n, c] before they were turned, at positions [B, n] -> [B, n, w]. No gradient reaches
        the entries.
        """
        assert self.key_proj is not None
        keys = self.key_norm(self.key_proj(entries.detach())).unsqueeze(2)
        return apply_trailing_rotary(keys, *self.turns(positions)).squeeze(2)


class Entries(NamedTuple):
    """What a layer has pooled, for itself and for later layers that read it."""

    entries: torch.Tensor
    """[M, c] of packed rows, or of a cache [B, E, c]."""
    index_keys: torch.Tensor | None
    """[M, w] or [B, E, w]; None where nobody asks."""
    rows: torch.Tensor | None = None
    """[B, E] int64, where both are in pools [n, ...]; None: they are as above."""


class Choice(NamedTuple):
    """What an index has made of the tokens, for itself and for the layers that follow it, which
    teach it as well.
    """

    queries: torch.Tensor
    """[B, S, I, w]."""
    weights: torch.Tensor
    """[B, S, I]."""
    chosen: torch.Tensor | None = None
    """As compressed_attention or attend_held takes it; None before there is a choice."""


class CompressedAttention(nn.Module):
    """Causal attention of many query heads to one head whose keys are its values: a sliding window
    of tokens, the entries of everything before, and a sink, in one softmax.

    Positions turn the last rope_head_dim channels, of queries, keys and so of values; the output is
    turned back by its own position, so that what a key gives depends on the distance to it. Before
    step `dense_steps` every entry is seen, and the index learns from all of them; from then on it
    chooses, and learns from what it chose (model/attention/indexed.py).

    Args:
        settings: what it does; layer_idx: its place in the model, which says its kind.
    """

    def __init__(
        self, config: ModelConfig, settings: CompressedAttentionConfig, layer_idx: int = 0
    ):
        super().__init__()
        layers = settings.layers(config)
        self.layer = layer = layers[layer_idx]
        self.spec = settings.spec(layer)
        # Layers that read another one's entries hold none of their own.
        self.cached = self.spec if layer.makes_entries else CompressedSpec(self.spec.window)
        self.is_read = sum(other.maker == layer_idx for other in layers) > 1
        self.layer_idx, self.is_sparse = layer_idx, layer.chooser is not None
        self.num_heads, self.head_dim = config.num_heads, config.attention_head_dim
        self.audit_rows = settings.audit_rows
        # Layers that choose as one teach their index as a mean.
        self.coeff = settings.index_coeff / max(1, layer.num_chosen_for)
        self.dense_steps = settings.dense_steps
        self.step = self.dense_steps  # without a trainer: the index chooses
        self.eps = config.norm_eps
        self.turns = Turns(settings.rope_head_dim, config.rope_theta, None)
        if layer.ratio:
            theta = settings.compressed_rope_theta or config.rope_theta
            self.turns = Turns(settings.rope_head_dim, theta, config.rope_scaling)

        hidden, rank, heads = config.hidden_size, settings.q_lora_rank, config.num_heads
        self.q_a_proj = nn.Linear(hidden, rank, bias=False)
        self.q_a_norm = RMSNorm(rank, self.eps)
        self.q_b_proj = nn.Linear(rank, heads * self.head_dim, bias=False)
        self.kv_proj = nn.Linear(hidden, self.head_dim, bias=False)
        self.kv_norm = RMSNorm(self.head_dim, self.eps)
        groups, between = settings.output_groups, settings.output_groups * settings.o_lora_rank
        # Stacked blocks are not one matrix to Muon, so the name is not that of a projection.
        self.output_groups = GroupedLinear(heads * self.head_dim, between, groups)
        self.o_proj = nn.Linear(between, hidden, bias=False)
        # a vector, which materialize leaves as it is
        self.sinks = nn.Parameter(torch.zeros(heads))
        self.compressor: Compressor | None = None
        self.indexer: EntryIndexer | None = None
        if layer.makes_entries:
            self.compressor = Compressor(
                config, self.head_dim, layer, settings.slot_bias, self.turns
            )
        if layer.chooses:
            self.indexer = EntryIndexer(config, settings, layer, self.turns)

    @property
    def chooses(self) -> bool:
        """Whether an index chooses for the layer, which has learned for as long as it was to."""
        return self.is_sparse and self.step >= self.dense_steps

    @property
    def _widths(self) -> Widths:
        row = 0 if self.compressor is None else self.compressor.row_width
        if self.indexer is None or self.compressor is None:
            return Widths(self.head_dim, row, 0)
        pool = self.indexer.compressor
        row += 0 if pool is None else pool.row_width
        return Widths(self.head_dim, row, self.indexer.width)

    def new_cache(
        self, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> CompressedCache:
        return CompressedCache(batch_size, max_len, self.cached, self._widths, dtype, device)

    @property
    def live_window(self) -> int:
        """Tokens before a new one whose own keys and rows are read; entries stand for those before:
        the others of its window, and those of the pooled window that is open and the one before.
        """
        return max(self.cached.window - 1, 2 * self.cached.ratio - 1)

    def new_pages(
        self,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        live: LivePages | None = None,
    ) -> CompressedPages:
        widths = self._widths
        return CompressedPages(num_pages, page_size, self.cached, widths, dtype, device, live)

    def forward(
        self,
        hidden: torch.Tensor,
        layout: SequenceLayout,
        cache: CompressedCache | CompressedPages | None = None,
    ) -> tuple[torch.Tensor, AttentionSums | None]:
        """hidden [B, S, D] -> [B, S, D], and the layer's sums if it has an index."""
        assert layout.positions is not None
        cos, sin = self._tables(layout)
        latent = self.q_a_norm(self.q_a_proj(hidden))
        q = self.q_b_proj(latent).unflatten(-1, (self.num_heads, self.head_dim))
        q = F.rms_norm(q.float(), (self.head_dim,), None, self.eps).to(q.dtype)
        q = apply_trailing_rotary(q, cos, sin)
        kv = apply_trailing_rotary(self.kv_norm(self.kv_proj(hidden)).unsqueeze(2), cos, sin)
        kv = kv.squeeze(2)

        # What entries and index keys are made of; the index sees hidden states without a gradient.
        rows: list[torch.Tensor] = []
        if self.compressor is not None:
            rows.append(self.compressor.rows(hidden))
        hidden, latent = hidden.detach(), latent.detach()
        if self.indexer is not None and self.indexer.compressor is not None:
            rows.append(self.indexer.compressor.rows(hidden))

        teach = self.is_sparse and cache is None and (self.training or layout.measure)
        choice: Choice | None = None
        if self.indexer is not None and (teach or self.chooses):
            choice = Choice(*self.indexer.queries(hidden, latent, cos, sin))
        elif self.is_sparse and (teach or self.chooses):
            assert self.layer.chooser is not None
            choice = layout.choices[self.layer.chooser]
        held = None if cache is None else self._held(cache, kv, rows, layout)
        sums: AttentionSums | None = None
        if held is not None:
            out = self._attend_held(q, held, choice, layout)
        else:
            out, sums = self._attend_packed(q, kv, rows, choice, layout, teach, cache)
        out = apply_trailing_rotary(out, cos, -sin)
        if self.is_sparse and sums is None:
            sums = _nothing(out)
        projected: torch.Tensor = self.o_proj(self.output_groups(out.flatten(2)))
        return projected, sums

    def _tables(self, layout: SequenceLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the tokens here, the same for all layers of a kind."""
        positions = layout.positions
        assert positions is not None

        def both() -> torch.Tensor:
            return torch.stack(self.turns(positions))

        cos, sin = layout.shared(f"turns {self.turns}", both)
        return cos, sin

    def _attend_held(
        self, q: torch.Tensor, held: Held, choice: Choice | None, layout: SequenceLayout
    ) -> torch.Tensor:
        """New tokens [B, S, H, c] against what a cache holds, or the cache of the layer whose
        entries are read.
        """
        made: Entries | None = None
        if held.entries is not None:
            made = self._made(Entries(held.entries, held.index_keys, held.rows), layout)
        elif self.layer.maker is not None:
            made = layout.entries[self.layer.maker]
        chosen = None
        if choice is not None and self.indexer is not None:
            assert made is not None and made.index_keys is not None
            chosen = choose_held(
                *(choice.queries, made.index_keys, choice.weights, held.position, self.spec),
                made.rows,
            )
            self._chose(choice._replace(chosen=chosen), layout)
        elif choice is not None:
            chosen = choice.chosen
        return attend_held(
            *(q, held.kv, held.kv_position, None if made is None else made.entries),
            *(chosen, self.sinks, held.position, self.spec),
            None if made is None else made.rows,
        )

    def _made(self, made: Entries, layout: SequenceLayout) -> Entries:
        """Entries of this layer, left for those that read them."""
        if self.is_read:
            layout.entries[self.layer_idx] = made
        return made

    def _chose(self, choice: Choice, layout: SequenceLayout) -> None:
        """The choice of this layer, left for those that follow it."""
        if self.layer.num_chosen_for > 1:
            layout.choices[self.layer_idx] = choice

    def _pooled(
        self,
        rows: list[torch.Tensor],
        with_keys: bool,
        bounds: list[int],
        layout: SequenceLayout,
        cache: CompressedCache | CompressedPages | None,
    ) -> Entries:
        """Of packed rows, whose entries and index keys go into a cache."""
        assert self.compressor is not None and layout.positions is not None
        windows = closed_windows(bounds, self.spec.ratio, rows[0].device)
        entries, before_turned = self.compressor(rows[0], windows, layout.positions)
        keys = None
        if self.indexer is not None and with_keys:
            if self.indexer.compressor is not None:
                keys = self.indexer.compressor(rows[1], windows, layout.positions)[0]
            else:
                at = layout.positions.flatten()[windows.starts][None]
                keys = self.indexer.projected_keys(before_turned[None], at)[0]
        if isinstance(cache, CompressedPages):
            assert layout.paging is not None
            last = layout.paging.slots[windows.starts + self.spec.ratio - 1]
            cache.write_entries(entries, keys, last)
        elif cache is not None:
            cache.begin(entries, keys)
        return self._made(Entries(entries, keys), layout)

    def _attend_packed(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        rows: list[torch.Tensor],
        choice: Choice | None,
        layout: SequenceLayout,
        teach: bool,
        cache: CompressedCache | CompressedPages | None,
    ) -> tuple[torch.Tensor, AttentionSums | None]:
        """All tokens at once, documents end to end: [B, S, H, c]. What they close goes into a
        cache.
        """
        bounds = layout.shared("bounds", lambda: layout.cu_seqlens.cpu()).tolist()
        made: Entries | None = None
        if self.compressor is not None:
            with_keys = choice is not None or cache is not None
            made = self._pooled(rows, with_keys, bounds, layout, cache)
        elif self.layer.maker is not None:
            made = layout.entries[self.layer.maker]
        entries = None if made is None else made.entries
        flat_q, flat_kv = q.flatten(0, 1), kv.flatten(0, 1)

        # Who follows has the choice, and needs the index to teach it alone.
        parts, chosen = None, None
        if choice is not None and self.indexer is None and self.chooses:
            chosen = choice.chosen
        if choice is not None and (teach or chosen is None):
            assert made is not None and made.index_keys is not None
            queries, weights = choice.queries.flatten(0, 1), choice.weights.flatten(0, 1)
            parts = Index(queries, made.index_keys, weights)
        found = compressed_attention(
            *(flat_q, flat_kv, entries, parts, self.sinks, bounds, self.spec),
            dense=not self.chooses,
            teach=teach,
            token_mask=layout.token_mask,
            chosen=chosen,
        )
        if choice is not None and self.indexer is not None:
            self._chose(choice._replace(chosen=found.chosen), layout)
        out = found.out.view_as(q)
        if not teach:
            return out, None
        sums = _nothing(out)
        sums = AttentionSums(self.coeff * found.divergence.float(), sums.stats)
        if layout.measure:
            assert entries is not None and parts is not None
            counted = len(flat_q) if layout.token_mask is None else layout.token_mask.sum()
            stats = {
                "index_tokens": found.divergence.detach().new_ones(()) * counted,
                "index_loss": found.divergence.detach(),
            }
            if self.audit_rows > 0:
                audited = layout.audited_rows(self.layer_idx, self.audit_rows, len(flat_q))
                recall = audit_entries(
                    *(flat_q, flat_kv, entries, parts, self.sinks, bounds, self.spec),
                    audited.tolist(),
                    chosen,
                )
                stats |= {
                    "index_audited": recall.new_tensor(len(recall)),
                    "index_recall": recall.sum(),
                }
            zero = sums.stats.new_zeros(())
            measured = torch.stack([stats.get(name, zero).to(zero) for name in STATS])
            sums = AttentionSums(sums.penalty_sum, measured)
        return out, sums

    @torch.no_grad()
    def _held(
        self,
        cache: CompressedCache | CompressedPages,
        kv: torch.Tensor,
        rows: list[torch.Tensor],
        layout: SequenceLayout,
    ) -> Held | None:
        """Put new tokens into a cache; what they see of it. None: they are all there is."""
        together = torch.cat(rows, -1) if rows else kv[..., :0]
        if isinstance(cache, CompressedPages):
            assert layout.paging is not None
            cache.write(kv, together, layout.paging.slots)
            if layout.paging.fresh:
                return None
            return cache.held(layout.paging, kv.shape[1], self._entries_of)
        if not isinstance(cache, CompressedCache):
            raise TypeError(
                f"{type(cache).__name__} has no entries; take caches from Transformer.new_caches"
            )
        return cache.append(kv, together, self._entries_of)

    def _entries_of(
        self, rows: torch.Tensor, before: torch.Tensor, number: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Entries and index keys of windows at hand, see Compressor.of_windows."""
        assert self.compressor is not None
        sizes = [self.compressor.row_width]
        sizes.append(rows.shape[-1] - sizes[0])
        own, earlier = rows.split(sizes, -1), before.split(sizes, -1)
        entries, before_turned = self.compressor.of_windows(own[0], earlier[0], number)
        if self.indexer is None:
            return entries, None
        if self.indexer.compressor is None:
            at = number * self.spec.ratio
            return entries, self.indexer.projected_keys(before_turned, at)
        return entries, self.indexer.compressor.of_windows(own[1], earlier[1], number)[0]


def _nothing(like: torch.Tensor) -> AttentionSums:
    zeros = like.new_zeros(len(STATS), dtype=torch.float32)
    return AttentionSums(zeros.new_zeros(()), zeros)
