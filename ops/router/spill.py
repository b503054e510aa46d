"""Capacity: what happens to the assignments of an expert that is full. Plain torch, no host synchronisation.

Shape letters: T tokens, E experts, K slots.
"""

from __future__ import annotations

import torch

from ops.router.reference import RouterOutput, score
from ops.router.spec import RouteSpec

ROUNDS = 4
"""Times an assignment without a place asks the next expert with room before it is dropped."""


def spill(routing: RouterOutput, logits: torch.Tensor, spec: RouteSpec, bias: torch.Tensor | None,
          capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hold every expert to `capacity` assignments.

    An expert keeps those with the highest gates (lower token first among equals). Each of the others moves to the expert
    with the highest key, among those that have room and that its token does not visit; after ROUNDS tries it is dropped.

    Returns:
        expert_ids [T, K] int32 with -1 where dropped, and [T] bool, tokens with an assignment that moved or was dropped.
    """
    num_tokens, num_slots = routing.expert_ids.shape
    num_experts = spec.num_experts
    ids = routing.expert_ids.long()
    if num_tokens == 0:
        return routing.expert_ids, torch.zeros(0, dtype=torch.bool, device=ids.device)
    keys = score(logits.float().nan_to_num(), spec.score_function)
    keys = (keys if bias is None else keys + bias)[:, :num_experts]
    priority = torch.where(ids >= 0, routing.weights.detach(), -1.0)
    placed = _first_by_priority(ids, priority, torch.full((num_experts,), capacity, device=ids.device)) & (ids >= 0)
    homeless = (ids >= 0) & ~placed
    moved = homeless.any(1)
    for _ in range(ROUNDS):
        for slot in range(num_slots):
            taken = _visited(ids, placed, num_experts)
            load = _count(torch.where(placed, ids, num_experts).flatten(), num_experts + 1)[:num_experts]
            room = (capacity - load).clamp_min(0)
            open_keys = keys.masked_fill(taken | (room == 0), -torch.inf)
            best = open_keys.max(1)
            asks = homeless[:, slot] & best.values.isfinite()
            wish = torch.where(asks, best.indices, -1).unsqueeze(1)
            accepted = _first_by_priority(wish, priority[:, slot:slot + 1], room)[:, 0] & asks
            ids[:, slot] = torch.where(accepted, best.indices, ids[:, slot])
            placed[:, slot] |= accepted
            homeless[:, slot] &= ~accepted
    return torch.where(placed, ids, -1).int(), moved


def _visited(ids: torch.Tensor, placed: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[T, E] bool: experts a token visits."""
    table = torch.zeros(len(ids), num_experts + 1, dtype=torch.bool, device=ids.device)
    return table.scatter_(1, torch.where(placed, ids, num_experts), True)[:, :num_experts]


def _first_by_priority(ids: torch.Tensor, priority: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """[T, K] bool: among the assignments of its expert, one is in the first room[expert] by (priority desc, token asc)."""
    flat = torch.where(ids < 0, len(room), ids).flatten()
    by_priority = priority.flatten().sort(descending=True, stable=True).indices
    order = by_priority[flat[by_priority].sort(stable=True).indices]
    counts = _count(flat, len(room) + 1)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(flat).scatter_(0, order, torch.arange(len(flat), device=flat.device) - starts[flat[order]])
    limits = torch.cat((room, room.new_zeros(1)))
    return (rank < limits[flat]).view(ids.shape)


def _count(values: torch.Tensor, size: int) -> torch.Tensor:
    """[size] int64: how often each of 0 .. size-1 occurs (bincount would ask the device for the largest value)."""
    return torch.zeros(size, dtype=torch.int64, device=values.device).scatter_add_(0, values, torch.ones_like(values))
