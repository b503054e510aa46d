"""Attention of every query to rows of its own choosing, by kernels that gather them."""

from typing import TYPE_CHECKING

from ops.lazy import lazily

if TYPE_CHECKING:
    from ops.gather_attention.interface import BACKENDS, pick_backend
    from ops.gather_attention.lookup import attend_rows
    from ops.gather_attention.problem import Gather, Lookup, Source
    from ops.gather_attention.reference import reference_gather, reference_lookup

__all__ = [
    "BACKENDS",
    "Gather",
    "Lookup",
    "Source",
    "attend_rows",
    "pick_backend",
    "reference_gather",
    "reference_lookup",
]

__getattr__ = lazily(
    __name__,
    {
        "BACKENDS": "interface",
        "Gather": "problem",
        "Lookup": "problem",
        "Source": "problem",
        "attend_rows": "lookup",
        "pick_backend": "interface",
        "reference_gather": "reference",
        "reference_lookup": "reference",
    },
)
