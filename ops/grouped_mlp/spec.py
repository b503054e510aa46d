"""What the grouped MLP can be asked for. Imports no torch."""

from __future__ import annotations

from typing import Literal

Activation = Literal["swiglu", "clamped_swiglu"]
"""swiglu: silu(gate) * up (arXiv 2002.05202). clamped_swiglu: gate * sigmoid(ALPHA * gate) * (up +
1) with the gate at most LIMIT and up within LIMIT of 0 (gpt-oss, arXiv 2508.10925).
"""
LIMIT = 7.0
ALPHA = 1.702
Precision = Literal["native", "fp8"]
"""Of the products. native: the dtype of the tensors. fp8: both sides of the products forward and of
those back to the tokens are rounded to e4m3 (ops/grouped_mlp/fp8.py), sums are fp32, and the
gradients of weights are products in the dtype of the tensors.
"""
Stored = Literal["int8", "fp8"]
"""What weights of 8 bits are, for inference (ops/grouped_mlp/eight_bit.py)."""
