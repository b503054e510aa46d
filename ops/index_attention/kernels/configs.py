"""Tile sizes of the kernels, pinned, as ops/gather_attention/kernels/configs.py has its own. They
spill no registers on sm_80, sm_90 and sm_100; no GPU has timed them.
"""

from __future__ import annotations

import torch

from ops.gather_attention.kernels.configs import Config
from ops.sparse_attention.kernels.configs import next_power_of_two

CHUNK = 2048
"""Values that one step of the selection takes."""
ROW = 512
"""Blocks that one step of the divergence takes."""
MASSES_STEPS = 8
"""Steps of a program of the masses, for which its queries stay."""


def padded(width: int) -> int:
    """Columns of a product, which needs 16 at least and a power of two."""
    return max(16, next_power_of_two(width))


def scores_config(width: int, dtype: torch.dtype) -> Config:
    """Its rows are queries, its columns keys."""
    if dtype == torch.float32:
        return Config(32, 32, 4, 1)
    return Config(64, 128, 8, 2) if padded(width) <= 128 else Config(64, 64, 4, 2)


def masses_config(head_dim: int, entries_per_block: int, dtype: torch.dtype) -> Config:
    """Its rows are queries by the heads of a group, its columns entries of whole blocks."""
    exact = dtype == torch.float32
    wide = head_dim > 128 or exact
    columns = max(16 if wide else 32, entries_per_block)
    most = (1024 if exact else 4096 if wide else 8192) // columns
    warps = 16 if exact and columns > 64 else 8
    return Config(max(16, min(64 if wide else 128, most)), columns, warps, 1 if exact else 2)


def held_config(width: int, heads: int, dtype: torch.dtype, by_head: bool) -> Config:
    """Its rows are heads of one query, all of them where each has a choice; its columns keys."""
    rows = max(16, next_power_of_two(heads))
    if dtype == torch.float32:
        return Config(rows if by_head else 16, 32, 4, 1)
    return Config(rows if by_head else min(64, rows), 128 if padded(width) <= 128 else 64, 4, 2)


def query_grad_config(width: int, heads: int, dtype: torch.dtype) -> Config:
    """Its rows are heads of one query, its columns the keys that it chose."""
    if dtype == torch.float32:
        return Config(16, 16, 4, 1)
    rows = min(32, max(16, next_power_of_two(heads)))
    return Config(rows, 64 if padded(width) <= 128 else 32, 4, 2)


def key_grad_config(width: int, dtype: torch.dtype) -> Config:
    """Its rows are queries, its columns keys."""
    if dtype == torch.float32:
        return Config(16, 16, 8, 1)
    return Config(32, 64, 4, 2) if padded(width) <= 128 else Config(64, 32, 8, 2)
