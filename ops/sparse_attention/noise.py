"""Counter-based randomness: a draw is a hash of (seed, token, head, block), so it can be made again
anywhere.

32-bit mixing function "lowbias32" (C. Wellons, Prospecting for Hash Functions, 2018); the kernels
compute the same bits. Values are uint32 held in int64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ops.sparse_attention.spec import SelectionNoise

NO_NOISE = SelectionNoise()

_MASK = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def token_hash(seed: int, token_ids: Tensor) -> Tensor:
    """[T] int64 ids -> [T] int64, 32 random bits per token."""
    ids = token_ids.long()
    start = mix(mix(torch.full_like(ids, (seed ^ 0x9E3779B9) & _MASK)) ^ ((seed >> 32) & _MASK))
    return mix(mix(start ^ (ids & _MASK)) ^ ((ids >> 32) & _MASK))


def uniform(hashed: Tensor, counter: Tensor | int) -> Tensor:
    """fp32 in (0, 1): draw number `counter` of a token, broadcast; 23 bits, so that the half added
    is never rounded.
    """
    bits = mix((hashed + counter) & _MASK)
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def normal(hashed: Tensor, counter: Tensor | int) -> Tensor:
    """fp32 of a standard normal distribution, by its inverse."""
    return torch.erfinv(2 * uniform(hashed, counter) - 1) * math.sqrt(2)


def gumbel(hashed: Tensor, counter: Tensor | int) -> Tensor:
    return -torch.log(-torch.log(uniform(hashed, counter)))


def selection_counter(block_in_document: Tensor, kv_head: Tensor, num_kv_heads: int) -> Tensor:
    """Counter of the Gumbel draw of a block: 1 + block * heads + head; counter 0 is never used by
    it.
    """
    return 1 + block_in_document * num_kv_heads + kv_head


def drawing_heads(noise: SelectionNoise, num_kv_heads: int) -> tuple[int, int]:
    """First of the call's key/value heads, and how many the layer has, as the draws count them: a
    head draws the same whichever heads are computed beside it.

    Raises:
        ValueError: the layer has no such heads.
    """
    first, total = noise.first_kv_head, noise.num_kv_heads or num_kv_heads
    if not 0 <= first <= total - num_kv_heads:
        raise ValueError(
            f"noise.first_kv_head {first} and {num_kv_heads} heads of the call do not lie within "
            f"the {total} of noise.num_kv_heads"
        )
    return first, total


def draw_top_k(
    hashed: Tensor, num_kv_heads: int, top_k: int, noise: SelectionNoise | None
) -> Tensor | None:
    """[Hk, T] int32: blocks to select for each query, uniform in [min_top_k, top_k]; None: top_k
    everywhere.
    """
    if noise is None or noise.min_top_k is None:
        return None
    low = min(noise.min_top_k, top_k)
    first, _ = drawing_heads(noise, num_kv_heads)
    head = first + torch.arange(num_kv_heads, device=hashed.device).unsqueeze(1)
    return (low + (uniform(hashed, -1 - head) * (top_k - low + 1)).long()).int()
