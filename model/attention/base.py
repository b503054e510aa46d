"""What every attention sees: where documents begin, positions inside them, and the cache when generating."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class SequenceLayout:
    """How a batch of packed rows splits into documents; built once per forward and shared by all layers.

    cos, sin: [B, S, head_dim / 2] fp32 rotary tables of positions within each document.
    cu_seqlens: [documents + 1] int32 on the device, cumulative lengths over the flattened B*S tokens.
    max_seqlen: longest document of the batch (host integer).
    mask: [B, 1, S, S] bool, True where attention is allowed; None when every row is one document (plain causal)
        or when the device has a variable-length kernel that reads cu_seqlens.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    mask: torch.Tensor | None


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
    """hidden [B, S, hidden_size] -> [B, S, hidden_size]; with a cache, S new tokens attend to all cached ones."""

    def __call__(self, hidden: torch.Tensor, layout: SequenceLayout, cache: KVCache | None = None) -> torch.Tensor: ...


def has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def document_mask(positions: torch.Tensor) -> torch.Tensor:
    """[B, S] positions that restart at 0 in each document -> [B, 1, S, S] bool: same document and not in the future."""
    documents = (positions == 0).cumsum(1)
    same_document = documents.unsqueeze(2) == documents.unsqueeze(1)
    order = torch.arange(positions.shape[1], device=positions.device)
    return (same_document & (order.unsqueeze(1) >= order.unsqueeze(0))).unsqueeze(1)
