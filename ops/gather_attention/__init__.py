"""Attention of every query to rows of its own choosing, by kernels that gather them."""

from typing import TYPE_CHECKING

from ops.lazy import lazily

if TYPE_CHECKING:
    from ops.gather_attention.interface import BACKENDS, pick_backend
    from ops.gather_attention.problem import Gather
    from ops.gather_attention.reference import reference_gather

__all__ = ["BACKENDS", "Gather", "pick_backend", "reference_gather"]

__getattr__ = lazily(
    __name__,
    {
        "BACKENDS": "interface",
        "Gather": "problem",
        "pick_backend": "interface",
        "reference_gather": "reference",
    },
)
