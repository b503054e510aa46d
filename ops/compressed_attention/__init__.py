"""Attention to a window and to pooled entries of what is before it (CSA, HCA), in one softmax."""

from typing import TYPE_CHECKING

from ops.compressed_attention.spec import CompressedSpec
from ops.lazy import lazily

if TYPE_CHECKING:
    from ops.compressed_attention.interface import (
        CompressedOutput,
        audit_entries,
        compressed_attention,
    )
    from ops.compressed_attention.pool import Windows, closed_windows, gated_pool, pooled
    from ops.compressed_attention.tile import attend_held, choose_held

__all__ = [
    "CompressedOutput",
    "CompressedSpec",
    "Windows",
    "attend_held",
    "audit_entries",
    "choose_held",
    "closed_windows",
    "compressed_attention",
    "gated_pool",
    "pooled",
]

__getattr__ = lazily(
    __name__,
    {
        "CompressedOutput": "interface",
        "Windows": "pool",
        "attend_held": "tile",
        "audit_entries": "interface",
        "choose_held": "tile",
        "closed_windows": "pool",
        "compressed_attention": "interface",
        "gated_pool": "pool",
        "pooled": "pool",
    },
)
