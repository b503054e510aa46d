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


def rows_to_see(
    bounds: Sequence[int], spec: IndexSpec, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """(base, window start) of every token as Gather has them. The host knows the documents, so this
    copies to the device: once a call, and backward passes are handed what is made here.
    """
    base = document_starts(bounds, device)
    if not spec.pools_keys:
        return base, None
    # the tokens after the last complete block are attended to besides
    token = torch.arange(len(base), device=device, dtype=torch.int32)
    return base, token + 1 - (token - base + 1) % spec.block_size


def gather_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    base: Tensor,
    window_start: Tensor | None,
    spec: IndexSpec,
) -> Gather:
    """q: [T, H, d]; k, v: [T, Hk, d]; chosen: [C, T, K] int32 blocks of documents, those that are
    there first, then -1; it may be filled in later. base, window_start: as rows_to_see has them.
    """
    return Gather(
        q.contiguous(),
        k.to(q.dtype).contiguous(),
        v.to(q.dtype).contiguous(),
        chosen,
        base,
        spec.block_size,
        window_start=window_start,
    )
