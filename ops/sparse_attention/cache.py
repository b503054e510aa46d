"""Pooled entries of a growing sequence: a block is pooled once, when its last token arrives."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.sparse_attention.entries import CoarseEntries, pool_groups
from ops.sparse_attention.spec import SparseAttentionSpec


class EntryCache:
    """`entries`: tensors [N, Hk, max_blocks * r, d] for N sequences of equal length, valid for
    complete blocks.
    """

    def __init__(
        self,
        spec: SparseAttentionSpec,
        num_rows: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.spec = spec
        shape = (
            num_rows,
            num_kv_heads,
            max_len // spec.block_size * spec.entries_per_block,
            head_dim,
        )
        self.entries = CoarseEntries(
            *(torch.zeros(shape, dtype=dtype, device=device) for _ in CoarseEntries._fields)
        )

    @torch.no_grad()
    def update(self, keys: Tensor, values: Tensor, before: int) -> None:
        """keys, values: [N, length, Hk, d], everything so far; the first `before` tokens had been
        seen.
        """
        size, block_size = self.spec.coarse_block_size, self.spec.block_size
        begin, end = before // block_size * block_size, keys.shape[1] // block_size * block_size
        if begin == end:
            return
        at = slice(begin // size, end // size)
        real = torch.promote_types(keys.dtype, torch.float32)
        pooled = pool_groups(
            *(x[:, begin:end].to(real).unflatten(1, (-1, size)) for x in (keys, values))
        )
        for entries, found in zip(self.entries, pooled, strict=True):
            entries[:, :, at] = found.transpose(1, 2).to(entries.dtype)


class EntryPages:
    """Pooled entries of a pool of pages, each a block: `entries` are tensors [pages, Hk, r, d],
    valid for pages whose last token has been written.
    """

    def __init__(
        self,
        spec: SparseAttentionSpec,
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.spec = spec
        shape = (num_pages, num_kv_heads, spec.entries_per_block, head_dim)
        self.entries = CoarseEntries(
            *(torch.zeros(shape, dtype=dtype, device=device) for _ in CoarseEntries._fields)
        )

    @torch.no_grad()
    def update(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """keys, values: [pages, block_size, Hk, d], the whole pool; slots: [n] int64 places
        page * block_size + i that have just been written.
        """
        size = self.spec.block_size
        full = slots[slots % size == size - 1] // size
        if not len(full):
            return
        real = torch.promote_types(keys.dtype, torch.float32)
        pooled = pool_groups(
            *(
                x[full].to(real).unflatten(1, (-1, self.spec.coarse_block_size))
                for x in (keys, values)
            )
        )
        for entries, found in zip(self.entries, pooled, strict=True):
            entries[full] = found.transpose(1, 2).to(entries.dtype)
