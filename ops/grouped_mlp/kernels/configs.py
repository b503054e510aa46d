"""Tile sizes of the kernels, pinned: what is compiled ahead of time (ops/compile/ahead_of_time.py)
is what ships.

None spills registers on sm_80, sm_90 and sm_100 with bf16 and fp16. On an H200 they were the
fastest of twelve each for the sizes of bench/tune.py
(bench/results/20261127-235200-nvidia-h200.json), but for act_grad, whose 256 columns are 12% faster
and spill; other devices have not been timed. fp32 is for checks: its products are exact, so they
run without tensor cores, in small tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ops.grouped_mlp.fp8 import TILE

FEW_ROWS = 256
"""Rows of an average expert below which tiles have 64 rows: of 128, a quarter or more would be
empty. Tiles of 64 already wait for the weights to arrive, so that smaller ones would save nothing;
they are also the smallest for wgmma.
"""


class Config(NamedTuple):
    """rows x columns: the tile of the output. step: of the inner loop. registers: the most of a
    thread. splits: see backward.act_grad_columns. group: row tiles whose columns stand together,
    see common.ordered_tile. tma: load matrices, and rows in their order, by the tensor memory
    accelerator, where their alignment allows it.
    """

    rows: int
    columns: int
    step: int
    num_warps: int
    num_stages: int
    registers: int = 255
    splits: int = 1
    group: int = 8
    tma: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """maxnreg: where it is 255, ptxas would spill a few to let more programs share a
        multiprocessor.
        """
        return {
            "TMA": self.tma,
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "STEP": self.step,
            "GROUP": self.group,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.registers,
        }


_EXACT = Config(32, 32, 16, 4, 1)
_STEP_BYTES = 128
"""Of a row in a step of a product of 16-bit or 8-bit values."""


def _step(dtype: torch.dtype) -> int:
    return _STEP_BYTES // dtype.itemsize


def _most_columns(dtype: torch.dtype) -> int:
    """Of a tile of 128 rows. Sums of 8-bit products take two accumulators (common.py)."""
    return 128 if dtype.itemsize == 1 else 256


def _large(architecture: int) -> bool:
    """Whether a multiprocessor has the 227 KB of shared memory of sm_90 and sm_100; sm_120 has 99,
    as sm_89.
    """
    return 90 <= architecture < 120


def tile_rows(num_rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """Of all kernels over rows, which share one tile map. num_rows: an upper bound, what the host
    knows.
    """
    if dtype == torch.float32:
        return _EXACT.rows
    return 64 if num_rows < FEW_ROWS * num_experts else 128


def up_config(rows: int, dtype: torch.dtype, architecture: int) -> Config:
    """columns of gate and as many of up."""
    if dtype == torch.float32:
        return _EXACT
    if _large(architecture):
        columns = _most_columns(dtype) // 2
        return Config(rows, columns, _step(dtype), rows // 16, 4, group=16, tma=True)
    return Config(rows, 64, _step(dtype), rows // 16, 4)


def row_config(rows: int, depth: int, dtype: torch.dtype, architecture: int) -> Config:
    """down and row_grad. Short sums end often: two programs to a multiprocessor, one computes while
    the other stores.
    """
    if dtype == torch.float32:
        return _EXACT
    if not _large(architecture):
        return Config(rows, 128, _step(dtype), rows // 16, 4)
    if depth >= 1024:
        columns = _most_columns(dtype)
        return Config(rows, columns, _step(dtype), rows // 16, 4, group=16, tma=True)
    return Config(rows, 128, _step(dtype), 4, 3, tma=True)


def eight_bit_config(config: Config) -> Config:
    """The same with matrices of 8 bits: read by pointers, and with half the columns of a large
    tile, where converting what was read would spill.
    """
    return config._replace(tma=False, columns=min(config.columns, max(64, config.columns // 2)))


def act_grad_config(rows: int, dtype: torch.dtype, architecture: int) -> Config:
    """The most work at the end of a tile."""
    if dtype == torch.float32:
        return _EXACT
    if architecture == 90:
        return Config(rows, 128, _step(dtype), rows // 16, 4, tma=True)
    splits = 2 if dtype.itemsize == 1 else 1
    return Config(rows, 128, _step(dtype), rows // 16, 4, splits=splits)


def expert_config(gathers_left: bool, dtype: torch.dtype, architecture: int) -> Config:
    """down_grad, which gathers its left rows, and gate_up_grad, which gathers its right ones; step:
    rows of an expert. Two stages more, as the addresses of what is gathered are loaded first.
    """
    if dtype == torch.float32:
        return _EXACT
    if not _large(architecture):
        return Config(128, 128, 64, 8, 5)
    return Config(128, 256, 64, 8, 5) if gathers_left else Config(128, 128, 64, 4, 4, tma=True)


ROUNDED_COLUMNS = 64
"""Of a tile of rows that one program rounds."""


def tiles_config(architecture: int) -> Config:
    """The experts' gradients from 8-bit tiles of 128 rows: a step's product and the sum are two
    accumulators, as in the others of 8 bits.
    """
    return Config(128, 128, TILE, 8, 4 if _large(architecture) else 3, tma=_large(architecture))


def combine_config(hidden_size: int) -> tuple[int, int]:
    """(columns of a program, warps)."""
    return min(1024, 1 << (hidden_size - 1).bit_length()), 4
