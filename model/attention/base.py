"""What every attention sees: where documents begin, positions inside them, and the cache when generating."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


@dataclass(frozen=True)
class SequenceLayout:
    """How a batch of packed rows splits into documents; built once per forward and shared by all layers.

    cos, sin: [B, S, head_dim / 2] fp32 rotary tables of positions within each document.
    cu_seqlens: [documents + 1] int32 on the device, cumulative lengths over the flattened B*S tokens.
    max_seqlen: longest document of the batch (host integer).
    mask: [B, 1, S, S] bool, True where attention is allowed; None when every row is one document (plain causal)
        or when the device has a variable-length kernel that reads cu_seqlens.
    token_ids: [B * S] int64 names of the tokens, which random selection hangs on; None: positions in the batch.
    token_mask: [B * S] bool, False for padding; None: nothing is padded.
    measure: sparse layers fill AttentionSums.stats.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    mask: torch.Tensor | None
    token_ids: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None
    measure: bool = False


class AttentionSums(NamedTuple):
    """What a sparse layer reports of a micro-batch; sums over its unpadded tokens, so that any split adds up.

    penalty_sum: [] fp32, its regularisers per token, weighted by their coefficients; carries gradient.
    stats: [len(STATS)] fp32, see STATS; zeros where nothing was measured.
    """

    penalty_sum: torch.Tensor
    stats: torch.Tensor


STATS = ("queries", "tail_mass", "selected_mass", "selected_blocks", "union_blocks", "tile_blocks", "audited", "error",
         "error_squared", "certificate", "covered", "bound_violations", "mass_kl", "coherence")
"""queries: tokens x heads measured; tail_mass, selected_mass: summed over them. selected_blocks: over tokens, mean of the
key/value heads, times heads. union_blocks: distinct selected blocks of tiles of 16 queries; tile_blocks: selected blocks
per query, averaged over a tile. audited: rows x heads compared with dense attention; the rest is summed over these:
relative error (at most 1) and its square, sub-Gaussian certificate (at most 1), rows whose error it covers, rows whose
error exceeds Theorem 1's bound (never), and the two quantities behind the regularisers."""


class KVCache:
    """Keys and values of one layer while generating: [B, max_len, kv_heads, head_dim], filled up to `length`."""

    def __init__(self, batch_size: int, max_len: int, num_kv_heads: int, head_dim: int,
                 dtype: torch.dtype, device: torch.device):
        shape = (batch_size, max_len, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, S, kv_heads, head_dim] after what is there and return all keys and values so far.

        Raises:
            ValueError: the cache is full.
        """
        end = self.length + keys.shape[1]
        if end > self.keys.shape[1]:
            raise ValueError(f"{end} tokens do not fit the cache of {self.keys.shape[1]}")
        self.keys[:, self.length:end] = keys
        self.values[:, self.length:end] = values
        self.length = end
        return self.keys[:, :end], self.values[:, :end]


class Attention(Protocol):
    """hidden [B, S, hidden_size] -> [B, S, hidden_size], and sums where the layer is sparse; with a cache, S new tokens
    attend to all cached ones."""

    def __call__(self, hidden: torch.Tensor, layout: SequenceLayout, cache: KVCache | None = None
                 ) -> tuple[torch.Tensor, AttentionSums | None]: ...

    def new_cache(self, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device) -> KVCache: ...


def has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def document_mask(positions: torch.Tensor) -> torch.Tensor:
    """[B, S] positions that restart at 0 in each document -> [B, 1, S, S] bool: same document and not in the future."""
    documents = (positions == 0).cumsum(1)
    same_document = documents.unsqueeze(2) == documents.unsqueeze(1)
    order = torch.arange(positions.shape[1], device=positions.device)
    return (same_document & (order.unsqueeze(1) >= order.unsqueeze(0))).unsqueeze(1)
