"""Capacity: what happens to the assignments of an expert that is full. Plain torch, no host
synchronisation.

Shape letters: T tokens, E experts, K slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ops.router.reference import RouterOutput, score
from ops.router.spec import RouteSpec

ROUNDS = 4
"""Times an assignment without a place asks the next expert with room before it is dropped."""


class Spilled(NamedTuple):
    """Assignments that fit the experts' capacity."""

    expert_ids: Tensor
    """[T, K] int32, -1 where unused or dropped."""
    moved: Tensor
    """[T] bool, tokens with an assignment that moved or was dropped."""
    overflow: Tensor
    """[2] int64, assignments that moved, and that were dropped."""


def spill(
    routing: RouterOutput, logits: Tensor, spec: RouteSpec, bias: Tensor | None, capacity: Tensor
) -> Spilled:
    """Hold every expert to its capacity [E] int64.

    An expert keeps those with the highest gates (lower token first among equals). Each of the
    others moves to the expert with the highest key, among those that have room and that its token
    does not visit; after ROUNDS tries it is dropped (a shared expert serves its token all the
    same).
    """
    num_tokens, num_slots = routing.expert_ids.shape
    num_experts = spec.num_experts
    ids = routing.expert_ids.long()
    if num_tokens == 0:
        return Spilled(routing.expert_ids, ids.new_zeros(0, dtype=torch.bool), ids.new_zeros(2))

    # The first to be placed are those that an expert keeps; what it keeps, it keeps for good.
    keys = score(logits.float().nan_to_num(), spec.score_function)
    keys = (keys if bias is None else keys + bias)[:, :num_experts]
    priority = torch.where(ids >= 0, routing.weights.detach(), -1.0)
    placed = _first_by_priority(ids, priority, capacity) & (ids >= 0)
    homeless = (ids >= 0) & ~placed
    moved, num_moved = homeless.any(1), homeless.sum()

    # Slot by slot, so that a token's second slot sees where its first one went. Loads are counted
    # anew each time: two slots cannot fill the same room.
    for _ in range(ROUNDS):
        for slot in range(num_slots):
            taken = _visited(ids, placed, num_experts)
            room = (capacity - _loads(ids, placed, num_experts)).clamp_min(0)
            open_keys = keys.masked_fill(taken | (room == 0), -torch.inf)
            best = open_keys.max(1)
            asks = homeless[:, slot] & best.values.isfinite()
            wish = torch.where(asks, best.indices, -1).unsqueeze(1)
            accepted = _first_by_priority(wish, priority[:, slot : slot + 1], room)[:, 0] & asks
            ids[:, slot] = torch.where(accepted, best.indices, ids[:, slot])
            placed[:, slot] |= accepted
            homeless[:, slot] &= ~accepted

    dropped = homeless.sum()
    overflow = torch.stack((num_moved - dropped, dropped))
    return Spilled(torch.where(placed, ids, -1).int(), moved, overflow)


def most_used(routing: RouterOutput, number: int) -> Tensor:
    """[E] bool: the `number` experts with the largest sums of gates over the tokens, the lower id
    first among equals.

    Sums are fp64 of one place a token, so their order is the only thing that rounds.
    """
    ids, num_experts = routing.expert_ids.long(), routing.counts.shape[1]
    table = torch.zeros(len(ids), num_experts + 1, dtype=torch.float64, device=ids.device)
    gates = torch.where(ids >= 0, routing.weights.detach().double(), 0.0)
    table.scatter_(1, torch.where(ids >= 0, ids, num_experts), gates)
    best = table[:, :num_experts].sum(0).sort(descending=True, stable=True).indices[:number]
    return torch.zeros(num_experts, dtype=torch.bool, device=ids.device).index_fill(0, best, True)


def confine(
    routing: RouterOutput, logits: Tensor, spec: RouteSpec, bias: Tensor | None, number: int
) -> Spilled:
    """Let the `number` most used experts of a batch serve alone: an assignment to another one moves
    to the expert with the highest key among them that its token does not visit, and is dropped
    where there is none. A token's experts then hang on the tokens beside it.

    bias: [C], or [T, C] where tokens have budgets of their own.
    """
    room = torch.where(most_used(routing, number), routing.expert_ids.numel(), 0)
    return spill(routing, logits, spec, bias, room)


def round_to_tiles(
    routing: RouterOutput, logits: Tensor, spec: RouteSpec, bias: Tensor | None, tile: int
) -> Spilled:
    """Make every expert's assignments a multiple of `tile`, so that no tile of a grouped GEMM is
    padded (token rounding, arXiv 2512.14080).

    Counts are rounded to the nearest multiple. What an expert has too many of spills, lowest gates
    first, to experts that lack some; where that does not fill the last tile of one, the tile is
    dropped. No count changes by more than a tile.
    """
    counts = routing.counts.sum(0)
    first = spill(routing, logits, spec, bias, (2 * counts + tile) // (2 * tile) * tile)
    ids = first.expert_ids.long()
    if len(ids) == 0:
        return first
    whole = _loads(ids, ids >= 0, spec.num_experts) // tile * tile
    # moved ones go first
    weights = torch.where(first.expert_ids == routing.expert_ids, routing.weights.detach(), 0.0)
    kept = _first_by_priority(ids, torch.where(ids >= 0, weights, -1.0), whole) & (ids >= 0)
    lost = (ids >= 0) & ~kept
    # counted as moved so far
    came = (lost & (first.expert_ids != routing.expert_ids)).sum()
    overflow = first.overflow + torch.stack((-came, lost.sum()))
    return Spilled(torch.where(kept, ids, -1).int(), first.moved | lost.any(1), overflow)


def _loads(ids: Tensor, placed: Tensor, num_experts: int) -> Tensor:
    """[E] int64: placed assignments."""
    return _count(torch.where(placed, ids, num_experts).flatten(), num_experts + 1)[:num_experts]


def _visited(ids: Tensor, placed: Tensor, num_experts: int) -> Tensor:
    """[T, E] bool: experts a token visits."""
    table = torch.zeros(len(ids), num_experts + 1, dtype=torch.bool, device=ids.device)
    return table.scatter_(1, torch.where(placed, ids, num_experts), True)[:, :num_experts]


def _first_by_priority(ids: Tensor, priority: Tensor, room: Tensor) -> Tensor:
    """[T, K] bool: among the assignments of its expert, one is in the first room[expert] by
    (priority desc, token asc).
    """
    flat = torch.where(ids < 0, len(room), ids).flatten()
    by_priority = priority.flatten().sort(descending=True, stable=True).indices
    order = by_priority[flat[by_priority].sort(stable=True).indices]
    counts = _count(flat, len(room) + 1)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(flat).scatter_(
        0, order, torch.arange(len(flat), device=flat.device) - starts[flat[order]]
    )
    limits = torch.cat((room, room.new_zeros(1)))
    return (rank < limits[flat]).view(ids.shape)


def _count(values: Tensor, size: int) -> Tensor:
    """[size] int64: how often each of 0 .. size-1 occurs (bincount would ask the device for the
    largest value).
    """
    return torch.zeros(size, dtype=torch.int64, device=values.device).scatter_add_(
        0, values, torch.ones_like(values)
    )
