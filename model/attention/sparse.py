"""Sparse attention in the model: select, compress, correct (ops/sparse_attention), its ablations and its training stages."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from model.attention.base import STATS, AttentionSums, KVCache, SequenceLayout
from model.attention.dense import DenseAttention
from model.config import ModelConfig
from model.flops import sparse_layers
from ops.sparse_attention import AttentionOutput, SelectionNoise, SparseAttentionSpec, decode, sparse_attention
from ops.sparse_attention.audit import audit_rows, sample_rows
from ops.sparse_attention.cache import EntryCache
from ops.sparse_attention.noise import token_hash
from ops.sparse_attention.ranking import union_counts

UNION_TILE = 16
"""Queries of a tile of the union factor: what a kernel's tile of 128 rows holds at eight heads a group."""
SPEC_FIELDS = frozenset(SparseAttentionSpec.__dataclass_fields__)


class SparseAttention(DenseAttention):
    """Causal attention whose cost per token is nearly constant: window, selected blocks, pooled rest, one softmax.

    Args:
        block_size to min_sparse_length: see SparseAttentionSpec.
        merge: "lse" is one softmax; "gated" adds three softmaxes (coarse entries, selected blocks, window) weighted by
            sigmoid gates of the hidden state (NSA, arXiv 2502.11089).
        offset: learn a bias per head on the logits of coarse entries. trust: learn log sigmoid(w_h x + b_h) on top,
            with b_h = 4 at the start. sink: learn a logit per head that has no value.
        dense_layers: layers that stay dense, from 0, negative from the end. interval: one layer in so many is sparse.
        dense_steps: optimisation steps before which all layers are dense; noise_steps: steps after these in which selection
            is noisy in training: Gumbel noise that falls from `temperature` to 0, and from min_top_k to top_k blocks.
        mass_kl_coeff, coherence_coeff, alignment_coeff: regularisers (ops/sparse_attention/audit.py) on audited rows.
        audit_rows: share of tokens that are compared with dense attention when measuring, and at every step if there are
            regularisers; 0 switches the audit off.
    """

    def __init__(self, config: ModelConfig, layer_idx: int = 0, block_size: int = 64, top_k: int = 16,
                 window_size: int = 512, num_sink_blocks: int = 1, coarse_block_size: int = 32, order: int = 2,
                 max_variance: float = 4.0,
                 score: Literal["prob", "max", "error_gain"] = "prob", tail: Literal["coarse", "drop"] = "coarse",
                 top_p: float | None = None, min_sparse_length: int = 0, num_levels: int = 1, fanout: int = 8,
                 num_expanded: int = 4, merge: Literal["lse", "gated"] = "lse", offset: bool = False, trust: bool = False,
                 sink: bool = False, dense_layers: tuple[int, ...] = (), interval: int = 1, dense_steps: int = 0,
                 noise_steps: int = 0, temperature: float = 1.0, min_top_k: int | None = None, mass_kl_coeff: float = 0.0,
                 coherence_coeff: float = 0.0, alignment_coeff: float = 0.0, audit_rows: float = 0.002):
        super().__init__(config, layer_idx)
        given = locals()
        self.spec = SparseAttentionSpec(**{name: given[name] for name in SPEC_FIELDS if name in given})
        self.layer_idx, self.merge = layer_idx, merge
        self.is_sparse = layer_idx in sparse_layers(config.num_layers, given)
        self.dense_steps, self.noise_steps = dense_steps, noise_steps
        self.temperature, self.min_top_k = temperature, min_top_k
        self.coeffs = (mass_kl_coeff, coherence_coeff, alignment_coeff)
        self.audit_rows = audit_rows
        self.step = dense_steps + noise_steps  # without a trainer: the last stage
        heads = self.num_heads
        # vectors, except for what multiplies the hidden state: initialize_parameters leaves vectors as they are
        self.offset = nn.Parameter(torch.zeros(heads)) if offset and self.is_sparse else None
        self.trust = nn.Linear(config.hidden_size, heads) if trust and self.is_sparse else None
        self.sink = nn.Parameter(torch.zeros(heads)) if sink and self.is_sparse else None
        self.gates = nn.Linear(config.hidden_size, 3 * heads) if merge == "gated" and self.is_sparse else None
        with torch.no_grad():
            if self.trust is not None:
                self.trust.bias.fill_(4.0)
            if self.gates is not None:
                self.gates.bias.zero_()

    @staticmethod
    def problems(config: ModelConfig, **arguments: Any) -> list[str]:
        """Contradictions of the arguments, and of the arguments with the model."""
        try:
            spec = SparseAttentionSpec(**{name: value for name, value in arguments.items() if name in SPEC_FIELDS})
        except ValueError as error:
            return [f"attention.{problem}" for problem in str(error).splitlines()]
        found = [f"attention.{name} is {arguments[name]}; it must not be negative"
                 for name in ("dense_steps", "noise_steps", "temperature", "mass_kl_coeff", "coherence_coeff",
                              "alignment_coeff") if arguments.get(name, 0) < 0]
        interval, layers = arguments.get("interval", 1), arguments.get("dense_layers", ())
        if interval < 1:
            return [*found, f"attention.interval is {interval}; it must be at least 1"]
        found += [f"attention.dense_layers names layer {i}, but the model has {config.num_layers} layers"
                  for i in layers if not -config.num_layers <= i < config.num_layers]
        if not found and not sparse_layers(config.num_layers, arguments):
            found.append(f"attention.interval {interval} and attention.dense_layers {list(layers)} leave no sparse layer of "
                         f"{config.num_layers}; use attention=dense")
        fraction, coeffs = arguments.get("audit_rows", 0.002), [arguments.get(n, 0) for n in _COEFFS]
        if not 0 <= fraction <= 1:
            found.append(f"attention.audit_rows is {fraction}; it is a share of tokens, between 0 and 1")
        elif fraction == 0 and any(coeffs):
            found.append("attention.audit_rows is 0, but the regularisers work on audited rows; raise it, or set "
                         f"{', '.join(_COEFFS)} to 0")
        if arguments.get("merge") == "gated":
            if spec.num_levels == 2:
                found.append("attention.num_levels=2 keeps super-blocks in the one softmax, which merge=gated does not have")
            if any(coeffs):
                found.append(f"attention.merge=gated has no dense attention to approach; set {', '.join(_COEFFS)} to 0")
            found += [f"attention.{name} corrects the one softmax, which merge=gated does not have; switch it off"
                      for name in ("offset", "trust", "sink") if arguments.get(name)]
        if spec.tail == "drop" and arguments.get("merge") != "gated":
            found += [f"attention.{name} acts on coarse entries, which tail=drop does not have; switch it off"
                      for name in ("offset", "trust") if arguments.get(name)]
        noisy = arguments.get("noise_steps", 0) > 0
        low = arguments.get("min_top_k")
        if low is not None and not 0 <= low <= spec.top_k:
            found.append(f"attention.min_top_k is {low}; it must be between 0 and attention.top_k {spec.top_k}, or null")
        elif low is not None and not noisy:
            found.append(f"attention.min_top_k {low} acts during the noisy steps, but attention.noise_steps is 0")
        return found

    def new_cache(self, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        if not self.is_sparse:
            return super().new_cache(batch_size, max_len, dtype, device)
        return SparseKVCache(self.spec, batch_size, max_len, self.num_kv_heads, self.head_dim, dtype, device)

    def forward(self, hidden: torch.Tensor, layout: SequenceLayout, cache: KVCache | None = None
                ) -> tuple[torch.Tensor, AttentionSums | None]:
        """hidden [B, S, D] -> [B, S, D], and the layer's sums unless it is a dense layer."""
        if not self.is_sparse:
            return super().forward(hidden, layout, cache)
        q, k, v = self._project(hidden, layout)
        if self.step < self.dense_steps:
            out = self._attend_densely(q, k, v, layout, cache)
            return self.o_proj(out.flatten(2)), AttentionSums(self._unused(hidden), _no_stats(out))
        if cache is not None and cache.length:
            out = self._attend_to_cache(hidden, q, k, v, cache)
            return self.o_proj(out.flatten(2)), AttentionSums(out.new_zeros((), dtype=torch.float32), _no_stats(out))
        if cache is not None:
            cache.append(k, v)
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        attend = self._gated if self.merge == "gated" else self._one_softmax
        out, sums = attend(hidden.flatten(0, 1), flat[0], flat[1], flat[2], layout)
        return self.o_proj(out.view(*q.shape[:2], -1)), sums

    def _unused(self, hidden: torch.Tensor) -> torch.Tensor:
        """[] zero, through which every parameter that dense attention lacks has a gradient: a missing one would be
        missing from the reductions over ranks. Modules are called, so that ZeRO-3 gathers them."""
        values = [p for p in (self.offset, self.sink) if p is not None]
        values += [module(hidden[:1, :1]) for module in (self.trust, self.gates) if module is not None]
        return sum((0.0 * value.float().sum() for value in values), hidden.new_zeros((), dtype=torch.float32))

    def _sink_logits(self) -> torch.Tensor | None:
        return None if self.sink is None else self.sink.float()

    def _noise(self) -> SelectionNoise | None:
        done = self.step - self.dense_steps
        if not self.training or done >= self.noise_steps:
            return None
        return SelectionNoise(self.layer_idx, self.temperature * (1 - done / self.noise_steps), self.min_top_k)

    def _bias(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[T, heads] fp32: learned offset and trust of the coarse entries."""
        bias = None
        if self.trust is not None:
            bias = F.logsigmoid(self.trust(hidden).float())
        if self.offset is not None:
            bias = self.offset.float().expand(len(hidden), -1) if bias is None else bias + self.offset.float()
        return bias

    def _one_softmax(self, hidden: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                     layout: SequenceLayout) -> tuple[torch.Tensor, AttentionSums]:
        bias = self._bias(hidden)
        attended = sparse_attention(q, k, v, layout.cu_seqlens, self.spec, bias=bias, sink=self._sink_logits(),
                                    noise=self._noise(), token_ids=layout.token_ids)
        return attended.out, self._sums(q, k, v, attended, bias, layout)

    def _gated(self, hidden: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               layout: SequenceLayout) -> tuple[torch.Tensor, AttentionSums]:
        """Three softmaxes: every complete past block's entries; own, first and selected blocks; the window."""
        coarse, selected, window = _branches(self.spec)
        attend = functools.partial(sparse_attention, q, k, v, layout.cu_seqlens)
        chosen = attend(selected, noise=self._noise(), token_ids=layout.token_ids, coarse=False)
        branches = attend(coarse, exact=False).out, chosen.out, attend(window, coarse=False).out
        sums = self._sums(q, k, v, chosen, None, layout, audit=False)
        return self._merged(hidden, branches), sums

    def _merged(self, hidden: torch.Tensor, branches: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Sum of branches [T, heads, head_dim] under gates of hidden [T, D]."""
        assert self.gates is not None
        gates = torch.sigmoid(self.gates(hidden)).view(len(hidden), self.num_heads, 3, 1)
        return sum((gates[:, :, i] * branch for i, branch in enumerate(branches)), torch.zeros_like(branches[0]))

    def _attend_to_cache(self, hidden: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                         cache: KVCache) -> torch.Tensor:
        """New tokens [B, S, ...], one after the other, against the cache."""
        if not isinstance(cache, SparseKVCache):
            raise TypeError(f"{type(cache).__name__} has no pooled entries; take caches from Transformer.new_caches")
        outs = []
        for i in range(q.shape[1]):
            keys, values = cache.append(k[:, i:i + 1], v[:, i:i + 1])
            attend = functools.partial(decode, q[:, i], keys, values, cache.entries.entries, cache.length)
            if self.gates is None:
                outs.append(attend(self.spec, bias=self._bias(hidden[:, i]), sink=self._sink_logits())[0])
                continue
            coarse, selected, window = _branches(self.spec)
            branches = attend(coarse, exact=False)[0], attend(selected, coarse=False)[0], attend(window, coarse=False)[0]
            outs.append(self._merged(hidden[:, i], branches))
        return torch.stack(outs, 1)

    def _sums(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attended: AttentionOutput, bias: torch.Tensor | None,
              layout: SequenceLayout, audit: bool = True) -> AttentionSums:
        regularised = any(self.coeffs) and self.training
        found = dict.fromkeys(STATS, q.new_zeros((), dtype=torch.float32))
        penalty = found["error"]
        if layout.measure:
            found |= _measure(attended, layout.token_mask)
        if audit and self.audit_rows > 0 and (layout.measure or regularised):
            ids = torch.arange(len(q), device=q.device) if layout.token_ids is None else layout.token_ids
            rows = sample_rows(token_hash(self.layer_idx, ids), self.audit_rows)
            if layout.token_mask is not None:
                rows = rows[layout.token_mask[rows]]
            with torch.set_grad_enabled(regularised and torch.is_grad_enabled()):
                audited = audit_rows(q, k, v, layout.cu_seqlens, self.spec, attended, rows, bias,
                                     self._sink_logits())
            if regularised:  # a sampled row stands for 1 / audit_rows tokens
                values = (audited.mass_kl, audited.coherence, audited.alignment)
                penalty = sum((c * x.mean(-1).sum() for c, x in zip(self.coeffs, values, strict=True)), penalty)
                penalty = penalty / self.audit_rows
            if layout.measure:
                slack = 1e-4 if q.dtype in (torch.float32, torch.float64) else 3e-2  # rounding of the outputs
                found |= {"audited": audited.error.new_tensor(audited.error.numel()),
                          "error": audited.error.clamp_max(1).sum(),
                          "error_squared": audited.error.clamp_max(1).square().sum(),
                          "certificate": audited.certificate.clamp_max(1).sum(),
                          "covered": (audited.error <= audited.certificate + slack).sum(),
                          "bound_violations": (audited.error > audited.bound + audited.rounding).sum(),
                          "mass_kl": audited.mass_kl.detach().sum(), "coherence": audited.coherence.detach().sum()}
        return AttentionSums(penalty, torch.stack([found[name].float() for name in STATS]))


_COEFFS = ("mass_kl_coeff", "coherence_coeff", "alignment_coeff")


class SparseKVCache(KVCache):
    """Keys, values and the pooled entries of the blocks that are complete."""

    def __init__(self, spec: SparseAttentionSpec, batch_size: int, max_len: int, num_kv_heads: int, head_dim: int,
                 dtype: torch.dtype, device: torch.device):
        super().__init__(batch_size, max_len, num_kv_heads, head_dim, dtype, device)
        self.entries = EntryCache(spec, batch_size, max_len, num_kv_heads, head_dim, dtype, device)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.length
        found = super().append(keys, values)
        self.entries.update(*found, before)
        return found


def _no_stats(like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros(len(STATS), dtype=torch.float32)


@torch.no_grad()
def _measure(attended: AttentionOutput, token_mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    real = attended.tail_mass.new_ones(len(attended.tail_mass)) if token_mask is None else token_mask.float()
    heads = attended.tail_mass.shape[1]
    per_query = (attended.selected >= 0).sum(-1).float() * real
    union_blocks, tile_blocks = union_counts(attended.selected, UNION_TILE)
    return {"queries": real.sum() * heads, "tail_mass": (attended.tail_mass * real.unsqueeze(1)).sum(),
            "selected_mass": (attended.selected_mass * real.unsqueeze(1)).sum(),
            "selected_blocks": per_query.mean(0).sum() * heads, "union_blocks": union_blocks,
            "tile_blocks": tile_blocks}


@functools.cache
def _branches(spec: SparseAttentionSpec) -> tuple[SparseAttentionSpec, SparseAttentionSpec, SparseAttentionSpec]:
    """Specs of merge=gated: coarse entries, selected blocks (with own and first ones), window."""
    return (replace(spec, tail="coarse"), replace(spec, window_size=0),
            replace(spec, top_k=0, num_sink_blocks=0, top_p=None))
