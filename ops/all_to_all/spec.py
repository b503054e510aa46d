"""What a call of the op may be asked for. Imports no torch."""

from __future__ import annotations

PAYLOADS = ("native", "bf16", "fp8")
"""How rows travel: as they are, rounded to bf16, or in 8 bits with a scale per block of values."""


def return_payload(payload: str) -> str:
    """How results and gradients of such rows travel: never in 8 bits."""
    return "native" if payload == "native" else "bf16"
