"""Logits -> experts, gates, statistics and permutation, in one pass."""

from typing import TYPE_CHECKING

from ops.lazy import lazily
from ops.router.spec import MAX_SLOTS, NUM_REASONS, Reason, RouteSpec

if TYPE_CHECKING:
    from ops.router.interface import route, select_backend
    from ops.router.overflow import Spilled, confine, most_used, round_to_tiles, spill
    from ops.router.reference import RouterOutput, reference_route

__all__ = [
    "MAX_SLOTS",
    "NUM_REASONS",
    "Reason",
    "RouteSpec",
    "RouterOutput",
    "Spilled",
    "confine",
    "most_used",
    "reference_route",
    "round_to_tiles",
    "route",
    "select_backend",
    "spill",
]

__getattr__ = lazily(
    __name__,
    {
        "RouterOutput": "reference",
        "Spilled": "overflow",
        "confine": "overflow",
        "most_used": "overflow",
        "reference_route": "reference",
        "round_to_tiles": "overflow",
        "route": "interface",
        "select_backend": "interface",
        "spill": "overflow",
    },
)
