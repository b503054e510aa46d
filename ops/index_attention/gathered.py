"""The op as the kernels of ops/gather_attention are asked for it: spans are blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ops.gather_attention import Gather
from ops.index_attention.spec import IndexSpec


def document_starts(bounds: Sequence[int], device: torch.device) -> Tensor:
    """[T] int32, the first token of every token's document. bounds: where documents begin, and
    T.
    """
    ends = torch.tensor(bounds, dtype=torch.int32)
    return ends[:-1].repeat_interleave(ends.diff().long()).to(device)


def gather_of(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, bounds: Sequence[int], spec: IndexSpec
) -> Gather:
    """q: [T, H, d]; k, v: [T, Hk, d]; chosen: [C, T, K] int32 blocks of documents, those that are
    there first, then -1; it may be filled in later.
    """
    base, window_start = document_starts(bounds, q.device), None
    if spec.pools_keys:
        # the tokens after the last complete block are attended to besides
        token = torch.arange(len(q), device=q.device, dtype=torch.int32)
        window_start = token + 1 - (token - base + 1) % spec.block_size
    return Gather(
        q.contiguous(),
        k.to(q.dtype).contiguous(),
        v.to(q.dtype).contiguous(),
        chosen,
        base,
        spec.block_size,
        window_start=window_start,
    )
