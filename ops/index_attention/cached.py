"""The op in decoding: new tokens of several rows against what a cache holds of their documents."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.index_attention.spec import IndexSpec
from ops.index_attention.tile import (
    attend,
    block_scores,
    blocks_mask,
    choose,
    real_dtype,
    tokens_mask,
)


@torch.no_grad()
def attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_queries: Tensor,
    index_keys: Tensor,
    index_weights: Tensor | None,
    position: Tensor,
    spec: IndexSpec,
) -> Tensor:
    """What indexed_attention gives for these tokens, up to rounding. No gradient.

    Args:
        q: [b, S, H, d]; k, v: [b, N, Hk, d], the rows' own tokens among them, and after their last
            one anything finite. index_queries: [b, S, I, w]; index_keys: [b, N, w], with rule=qsa
            [b, N // block_size, w]; index_weights: [b, S, I] with rule=dsa.
        position: [b, S] int64 of the new tokens in their documents.

    Returns:
        [b, S, H, d] in the dtype of q.
    """
    real, groups = real_dtype(q.dtype), q.shape[2] // k.shape[2]
    scores = block_scores(
        index_queries.to(real),
        index_keys.to(real),
        None if index_weights is None else index_weights.to(real),
        position,
        spec,
    )
    blocks = blocks_mask(choose(scores, position, spec), scores.shape[-1])
    seen = tokens_mask(blocks, position, k.shape[1], spec)
    out = attend(q.to(real).unflatten(2, (-1, groups)), k.to(real), v.to(real), seen).out
    return out.flatten(2, 3).to(q.dtype)
