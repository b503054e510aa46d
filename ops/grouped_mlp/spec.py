"""What the grouped MLP can be asked for. Imports no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

Activation = Literal["swiglu", "clamped_swiglu", "limited_swiglu"]
"""swiglu: silu(gate) * up (arXiv 2002.05202). The others clamp first, see Clamp: clamped_swiglu is
gpt-oss's (arXiv 2508.10925), limited_swiglu DeepSeek-V4's.
"""


class Clamp(NamedTuple):
    """gate * sigmoid(alpha * gate) * (up + shift) with the gate at most `limit` and up within
    `limit` of 0.
    """

    alpha: float
    limit: float
    shift: float


CLAMPS: dict[str, Clamp] = {
    "clamped_swiglu": Clamp(1.702, 7.0, 1.0),
    "limited_swiglu": Clamp(1.0, 10.0, 0.0),
}
Precision = Literal["native", "fp8", "fp8_all"]
"""Of the products. native: the dtype of the tensors. fp8: both sides of the products forward and of
those back to the tokens are rounded to e4m3 (ops/grouped_mlp/fp8.py), sums are fp32, and the
gradients of weights are products in the dtype of the tensors. fp8_all: those are rounded as well,
over tiles of an expert's rows.
"""
Stored = Literal["int8", "fp8"]
"""What weights of 8 bits are, for inference (ops/grouped_mlp/eight_bit.py)."""
