"""Tile sizes of the kernels, pinned, as ops/sparse_attention/kernels/configs.py has its own. They
spill no registers on sm_80, sm_90 and sm_100; no GPU has timed them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ops.sparse_attention.kernels.configs import next_power_of_two


class Config(NamedTuple):
    rows: int
    """Of the products: heads of one query, or of several where keys are the tile."""
    columns: int
    """Rows of keys of one step, or of a tile of keys; at most 32 there, the bits of a word."""
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """maxnreg: all registers, else ptxas spills a few to let more programs run beside each
        other.
        """
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": 255}


def _heads(group: int) -> int:
    """Heads of a product, which needs 16 rows; more than 32 go in several programs."""
    return min(32, max(16, next_power_of_two(group)))


def attend_config(head_dim: int, group: int, dtype: torch.dtype) -> Config:
    if dtype == torch.float32:
        return Config(16, 16, 8, 1)
    if head_dim > 256:
        return Config(_heads(group), 32, 8, 2)
    return Config(_heads(group), 64 if head_dim <= 128 else 32, 4, 2)


def masses_config(head_dim: int, group: int, dtype: torch.dtype) -> Config:
    """As the forward pass, but queries are read again in every step: one stage of wide heads."""
    config = attend_config(head_dim, group, dtype)
    return config._replace(num_stages=1) if head_dim > 256 else config


def query_grad_config(head_dim: int, group: int, dtype: torch.dtype) -> Config:
    if dtype == torch.float32:
        return Config(16, 16, 8, 1)
    return Config(_heads(group), 32, 8 if head_dim > 256 else 4, 2)


def key_grad_config(head_dim: int, dtype: torch.dtype) -> Config:
    """Its rows are heads of queries from a list, in any number that fits."""
    if dtype == torch.float32:
        return Config(16, 16, 8, 1)
    if head_dim > 256:
        return Config(32, 16, 8, 1)
    return Config(64 if head_dim <= 128 else 32, 32, 8, 1)
