"""Logits -> experts, gates, statistics and permutation, in one pass."""

from ops.router.interface import route, select_backend
from ops.router.reference import RouterOutput, reference_route
from ops.router.spec import MAX_SLOTS, NUM_REASONS, Reason, RouteSpec
from ops.router.spill import Spilled, round_to_tiles, spill

__all__ = ["MAX_SLOTS", "NUM_REASONS", "Reason", "RouteSpec", "RouterOutput", "Spilled", "reference_route", "round_to_tiles",
           "route", "select_backend", "spill"]
