"""Rounding to 8-bit floats for the experts' products, and what such a product is.

A vector along the sum of a product is rounded to e4m3 (4 bits of precision, largest value 448) with
a scale of its own, a power of two: so the scaled value is exact in any wider dtype, an fp32 product
of scaled values is the product of the 8-bit values times both scales, and a machine without 8-bit
products computes the same numbers as one with them, but for the order of its sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3 (arXiv 2209.05433)."""
TILE = 128
"""Rows of an expert that share a scale in each column, where a product sums over rows."""
_SHIFT = 4
_KEPT = (0x8000 | 0x7F << _SHIFT) - 0x10000
"""Sign, and exponent with mantissa, of e4m3 where bf16 has its own; as int16."""
_BIASES = 2.0 ** (127 - 7)
"""What the exponents of bf16 and e4m3 are apart."""


def round_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """[..., n] -> e4m3 of the same shape, and scales [...] fp32, so that values are near e4m3 *
    scale.

    The scale is the smallest power of two under which no value of the row is above 448, or half of
    it; a row of zeros has 1. Ties go to the even neighbour. A row with a value that is not finite
    has the scale NaN, as e4m3 has no infinity that could be seen later.
    """
    least, most = values.detach().aminmax(dim=-1, keepdim=True)
    largest = torch.maximum(-least, most).float()
    # largest / 448 = m 2^e with m from 0.5 to 1, so that dividing by 2^e leaves at most 448.
    exponent = torch.frexp(largest / LARGEST).exponent.clamp(min=-126)
    scales = torch.ldexp(torch.ones_like(largest), exponent)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    # Exact in bf16 as well, whose range is that of fp32; fp16 may not hold the scale.
    wide = values.float() if values.dtype == torch.float16 else values
    return (wide / scales.to(wide.dtype)).to(FP8), scales.squeeze(-1)


def rounded_rows(values: Tensor) -> Tensor:
    """What round_rows leaves of them, in their own dtype, which holds it exactly."""
    if not values.numel():
        return values
    low, scales = round_rows(values)
    return (low.float() * scales.unsqueeze(-1)).to(values.dtype)


def rounded_columns(matrix: Tensor) -> Tensor:
    """[..., m, n], each column rounded as one vector: for products that sum over m."""
    return rounded_rows(matrix.transpose(-1, -2)).transpose(-1, -2)


def rounded_tiles(rows: Tensor) -> Tensor:
    """[n, m], the n rows of one expert: each column rounded in tiles of 128 rows, of which the last
    ends with them.

    For products that sum over rows, as the gradient of a weight does. One scale for all rows of an
    expert would lie in the hands of its largest token; tiles of 128 are those of DeepSeek-V3 (arXiv
    2412.19437, section 3.3.2).
    """
    if not rows.numel():
        return rows
    num_tiles = -(-len(rows) // TILE)
    # Zeros that fill the last tile up round to zeros and move no scale.
    filled = torch.nn.functional.pad(rows, (0, 0, 0, num_tiles * TILE - len(rows)))
    return rounded_columns(filled.unflatten(0, (num_tiles, TILE))).flatten(0, 1)[: len(rows)]


def widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of 8 bits, int8 or finite e4m3, as numbers of a float dtype, all of which hold them
    exactly.

    torch converts e4m3 on a CPU value by value, which takes four times as long as the product of a
    few rows; as the exponent and mantissa of bf16 its bits are the number over 2^120.
    """
    if weight.dtype != FP8 or weight.device.type != "cpu" or not weight.numel():
        return weight.to(dtype)
    bits = weight.view(torch.int8).to(torch.int16)
    bits = bits.bitwise_left_shift_(_SHIFT).bitwise_and_(_KEPT)
    return bits.view(torch.bfloat16).mul_(_BIASES).to(dtype)
