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
