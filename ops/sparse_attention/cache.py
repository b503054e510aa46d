"""Pooled entries of a growing sequence: a block is pooled once, when its last token arrives."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.sparse_attention.entries import CoarseEntries, pool_groups, weigh_groups
from ops.sparse_attention.interface import HEAD_DIMS
from ops.sparse_attention.spec import SparseAttentionSpec

Weigh = Callable[[Tensor], Tensor]
"""From values [..., Hk, d] to pool_logits [..., Hk, 2, d]."""


def pooled(
    keys: Tensor, values: Tensor, weigh: Weigh | None, backend: str | None = None
) -> CoarseEntries:
    """Entries [A, B, Hk, d] over the third dimension of keys and values [A, B, C, Hk, d].

    backend: "triton", which gives the dtype of the keys and what training has on a GPU, or "torch",
        which gives fp32 (fp64); None: the kernels where they are built for it.
    """
    logits = None if weigh is None else weigh(values)
    if (backend or _backend_of(keys)) == "triton":
        from ops.sparse_attention import triton_backend

        return triton_backend.pool_groups(keys, values, logits)
    real = torch.promote_types(keys.dtype, torch.float32)
    k, v = keys.to(real), values.to(real)
    means = pool_groups(k, v)
    if logits is None:
        return means
    # rounded first, as in training, where a back-end's pool comes before the weights
    rounded = CoarseEntries(*(x.to(keys.dtype).to(real) for x in means))
    return weigh_groups(k, v, logits, rounded)


def _backend_of(keys: Tensor) -> str:
    size, dim = keys.shape[2], keys.shape[4]
    built = dim in HEAD_DIMS and size & (size - 1) == 0 and keys.dtype != torch.float64
    return "triton" if keys.device.type == "cuda" and built else "torch"


class EntryCache:
    """`entries`: tensors [N, Hk, max_blocks * r, d] for N sequences of equal length, valid for
    complete blocks. weigh: gives the weights of learned entries; None: equal ones.
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
        weigh: Weigh | None = None,
    ):
        self.spec, self.weigh = spec, weigh
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
        new_keys, new_values = (x[:, begin:end].unflatten(1, (-1, size)) for x in (keys, values))
        found = pooled(new_keys, new_values, self.weigh)
        for entries, new in zip(self.entries, found, strict=True):
            entries[:, :, at] = new.transpose(1, 2).to(entries.dtype)


class EntryPages:
    """Pooled entries of a pool of pages, each a block: `entries` are tensors [pages, Hk, r, d],
    valid for pages whose last token has been written. weigh: as EntryCache.
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
    ):
        self.spec, self.weigh = spec, weigh
        shape = (num_pages, num_kv_heads, spec.entries_per_block, head_dim)
        self.entries = CoarseEntries(
            *(torch.zeros(shape, dtype=dtype, device=device) for _ in CoarseEntries._fields)
        )

    @torch.no_grad()
    def update(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """keys, values: [pages, block_size, Hk, d], the whole pool; slots: [B, S] int64 places
        page * block_size + i that have just been written, of neighbouring tokens in each row.

        Nothing here waits for a device to say how many blocks are complete: what is pooled of those
        that are not goes to page 0, which is scratch.
        """
        size = self.spec.block_size
        # Of so many neighbours one at most is the last token of a block.
        full = torch.where(slots % size == size - 1, slots // size, 0)
        full = F.pad(full, (0, -full.shape[1] % size)).unflatten(1, (-1, size)).amax(-1).flatten()
        size = self.spec.coarse_block_size
        new_keys, new_values = (x[full].unflatten(1, (-1, size)) for x in (keys, values))
        found = pooled(new_keys, new_values, self.weigh)
        for entries, new in zip(self.entries, found, strict=True):
            entries[full] = new.transpose(1, 2).to(entries.dtype)
