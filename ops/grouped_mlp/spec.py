"""What the grouped MLP can be asked for. Imports no torch."""

from __future__ import annotations

from typing import Literal

Activation = Literal["swiglu", "clamped_swiglu"]
"""swiglu: silu(gate) * up (arXiv 2002.05202). clamped_swiglu: gate * sigmoid(ALPHA * gate) * (up +
1) with the gate at most LIMIT and up within LIMIT of 0 (gpt-oss, arXiv 2508.10925).
"""
LIMIT = 7.0
ALPHA = 1.702
