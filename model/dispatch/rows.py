"""Where rows lie: orders by expert, places of copies, exchanges of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from model.dispatch.base import ExpertRows
from model.placement.record import LayerPlacement


def by_expert(
    hidden: Tensor, gates: Tensor, received: Tensor, per_source: int | None
) -> ExpertRows:
    """Rows that arrived by (source rank, expert) as work for the experts. Order within an expert:
    by source.

    hidden [R, D], gates [R, 1], received [ranks, L]: rows by source and expert. per_source: rows in
    the buffer of each source, padding behind what it sent; None: no padding.
    """
    offsets = torch.nn.functional.pad(received.sum(0).cumsum(0), (1, 0)).int()
    row = torch.arange(len(hidden), device=hidden.device, dtype=torch.int32)
    starts = _exclusive_sum(received.T.flatten()).view(received.T.shape).T
    if per_source is not None:
        received = torch.cat((received, per_source - received.sum(1, keepdim=True)), dim=1)
        starts = torch.cat((starts, torch.full_like(starts[:, :1], -1)), dim=1)
    places = _places(received.flatten(), starts.flatten(), len(hidden))
    slots, inverse = _move(row, row.view(-1, 1), places, len(hidden))
    return ExpertRows(hidden, gates, slots, inverse, offsets)


def _places(blocks: Tensor, starts: Tensor, num_rows: int, limits: Tensor | None = None) -> Tensor:
    """Rows stand block after block, blocks [n] of them: row i of block b goes to starts[b] + i.

    -> [num_rows] int64; -1 for rows behind the last block, in a block with a negative start, and
    from limits[b] on.
    """
    ends = blocks.cumsum(0)
    row = torch.arange(num_rows, device=blocks.device)
    block = torch.searchsorted(ends, row, right=True)
    lost = block == len(blocks)
    block = block.clamp(max=len(blocks) - 1)
    within, start = row - (ends - blocks)[block], starts[block]
    lost |= start < 0
    if limits is not None:
        lost |= within >= limits[block]
    return torch.where(lost, -1, start + within)


def _exclusive_sum(sizes: Tensor) -> Tensor:
    return sizes.cumsum(0) - sizes


def _move(
    slots: Tensor, inverse: Tensor, places: Tensor | None, num_rows: int
) -> tuple[Tensor, Tensor]:
    """slots [P'] and inverse [T, K] of rows that were moved to `places`, num_rows of them."""
    if places is None:
        return slots[:num_rows], inverse
    # the last one collects what has no place
    moved = slots.new_full((num_rows + 1,), -1)
    moved.scatter_(0, torch.where(places < 0, num_rows, places), slots[: len(places)])
    if len(places) == 0:
        return moved[:num_rows], inverse
    return moved[:num_rows], torch.where(inverse < 0, -1, places[inverse.clamp_min(0).long()]).int()


def copy_positions(placement: LayerPlacement) -> tuple[Tensor, Tensor]:
    """Where the copies of each expert stand, rank * L + place: [E, most copies] (the owner's
    first); and how many, [E].
    """
    num_ranks, num_experts = len(placement.replicas), len(placement.experts)
    own = num_experts // num_ranks
    per_rank = own + len(placement.replicas[0])
    places: list[list[int]] = [[] for _ in range(num_experts)]
    for position, expert in enumerate(placement.experts):
        places[expert].append(position // own * per_rank + position % own)
    for rank in range(num_ranks):
        for i, expert in enumerate(lent_experts(placement, rank)):
            places[expert].append(rank * per_rank + own + i)
    most = max(map(len, places))
    return torch.tensor([p + p[:1] * (most - len(p)) for p in places]), torch.tensor(
        [len(p) for p in places]
    )


def lent_experts(placement: LayerPlacement, rank: int) -> list[int]:
    """The experts lent to a rank, in the order in which their weights arrive: by owner."""
    return sorted(placement.replicas[rank], key=lambda expert: (placement.owner(expert), expert))
