"""Tile sizes of the kernels, pinned: what is compiled ahead of time (ops/compile/ahead_of_time.py)
is what ships.

Rows of a tile are queries x heads of a group, the heads padded to a power of two. Sizes are the
largest that spill no registers on sm_80, sm_90 and sm_100 with bf16 and fp16; no GPU has timed them
yet. fp32 is for checks: its products are exact, so they run without tensor cores, in small tiles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

TMA = False
"""Whether attend, query_grad and key_grad load tiles of keys and values by the tensor memory
accelerator, where there is one and the tensors fit it (triton_backend). Off until a GPU has timed
both: bench/sparse_attention.py does.
"""


@contextlib.contextmanager
def loading_by_tma(on: bool) -> Iterator[None]:
    """Set TMA for a while."""
    global TMA
    before, TMA = TMA, on
    try:
        yield
    finally:
        TMA = before


class Config(NamedTuple):
    """queries x heads: rows of a tile. columns: keys or coarse entries of one step of the inner
    loop. tma: see TMA.
    """

    queries: int
    heads: int
    columns: int
    num_warps: int
    num_stages: int
    tma: bool = False

    @property
    def options(self) -> dict[str, int]:
        """maxnreg: all registers, else ptxas spills a few to let more programs share a
        multiprocessor.
        """
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": 255}


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _config(
    rows: int,
    columns: int,
    num_warps: int,
    num_stages: int,
    group: int,
    block_size: int,
    most_queries: int = 32,
) -> Config:
    """Queries divide the block size; a query tile has at most 32, as a set of its queries is one
    word of 32 bits.

    Tiles that cannot fill the rows take four warps.
    """
    heads = next_power_of_two(group)
    queries = max(1, min(most_queries, block_size, rows // heads))
    warps = num_warps if queries * heads >= rows else 4
    return Config(queries, heads, columns, warps, num_stages, TMA)


def attend_config(
    head_dim: int, group: int, block_size: int, dtype: torch.dtype, architecture: int
) -> Config:
    """Forward; on sm_80 the operands of the matrix products take registers."""
    if dtype == torch.float32:
        return _config(32, min(16, block_size), 8, 1, group, block_size)
    if head_dim > 128:
        return _config(32, min(32, block_size), 8, 2, group, block_size)
    if architecture < 90:
        return _config(64, min(32, block_size), 8, 2, group, block_size)
    return _config(128, min(64, block_size), 8, 2, group, block_size)


def query_grad_config(
    head_dim: int, group: int, block_size: int, dtype: torch.dtype, architecture: int
) -> Config:
    if dtype == torch.float32:
        return _config(32, min(16, block_size), 8, 1, group, block_size)
    rows = 32 if head_dim > 128 else 128 if head_dim <= 64 and architecture >= 90 else 64
    return _config(rows, min(32, block_size), 8, 2, group, block_size)


def entry_grad_config(head_dim: int, group: int, block_size: int, dtype: torch.dtype) -> Config:
    """Three accumulators as wide as the head; queries divide those of query_grad_config."""
    if dtype == torch.float32:
        return _config(32, 16, 8, 1, group, block_size)
    return _config(64 if head_dim == 128 else 32, 32, 8, 1, group, block_size)


def key_grad_config(head_dim: int, group: int, block_size: int, dtype: torch.dtype) -> Config:
    """Its queries come from a list, in any number that fits."""
    size = 32 if head_dim > 128 or dtype == torch.float32 else 64
    return _config(size, min(size, block_size), 8, 1, group, block_size, 64)


def rank_config(
    head_dim: int, group: int, block_size: int, entries_per_block: int, dtype: torch.dtype
) -> Config:
    """columns: whole blocks of entries."""
    wide = head_dim > 128 or dtype == torch.float32
    return _config(
        64 if wide else 128, max(16 if wide else 32, entries_per_block), 8, 2, group, block_size
    )


def pool_channels(head_dim: int, tokens: int) -> int:
    """Channels of a program that makes entries of so many tokens, or their gradients: 32 numbers of
    each tensor a thread of four warps.
    """
    return min(head_dim, max(1, 2048 // tokens))


def decode_config(head_dim: int, group: int, block_size: int, dtype: torch.dtype) -> Config:
    """One query; a matrix product needs 16 rows."""
    return Config(
        1, max(16, next_power_of_two(group)), min(64 if head_dim <= 128 else 32, block_size), 4, 2
    )
