"""Token movement: to the rank and expert order of their experts, and back.

Shape letters: T tokens, K slots per token, A assignments in use, P rows sent, R rows received, D hidden, E experts,
L experts a rank serves (its own, then those lent to it), C chunks of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.config import ModelConfig
from model.parallel import ParallelGroups
from model.placement import LayerPlacement
from ops.all_to_all import (
    PAYLOADS,
    Flight,
    Hop,
    Meter,
    Path,
    begin_rows,
    end_rows,
    exchange_counts,
    exchange_node_counts,
    node_path,
    return_payload,
)
from ops.permute import group_by_expert, permute, unpermute
from ops.router import RouterOutput


class ExpertRows(NamedTuple):
    """Work for one chunk of experts: the arguments of ops.grouped_mlp after the weights' own."""

    hidden: Tensor
    weights: Tensor
    slots: Tensor
    inverse: Tensor
    offsets: Tensor


Compute = Callable[[int, ExpertRows], Tensor]
"""(chunk, its rows) -> [rows, D], weighted by the gates and summed over each row's slots."""


class Dispatched(Protocol):
    """Tokens on their way to their experts."""

    def finish(self, compute: Compute) -> tuple[Tensor, Tensor]:
        """Let the experts compute, and bring the results home: [T, D], and how many assignments were computed here, []."""
        ...


class LocalDispatcher:
    """All experts live on this rank: nothing moves, and the experts read the tokens where they are."""

    def __init__(self, config: ModelConfig, groups: ParallelGroups | None = None,
                 placement: LayerPlacement | None = None):
        groups = groups or ParallelGroups.single()
        if groups.expert_size != 1:
            raise ValueError(f"dispatcher=local holds all experts on one rank, but expert_parallel_size is "
                             f"{groups.expert_size}; use dispatcher=all_to_all")
        self.chunk_sizes = [config.num_experts]
        self.meter = Meter()

    @staticmethod
    def problems(config: ModelConfig, expert_parallel_size: int) -> list[str]:
        if expert_parallel_size > 1:
            return [f"dispatcher=local cannot serve parallel.expert_parallel_size {expert_parallel_size}; "
                    "use dispatcher=all_to_all"]
        return []

    def start(self, hidden: Tensor, routing: RouterOutput, dropless: bool = False) -> Dispatched:
        """hidden [T, D] and where its tokens go."""
        return _Stayed(ExpertRows(hidden, routing.weights, routing.slots, routing.inverse, routing.offsets))


@dataclass(frozen=True)
class _Stayed:
    rows: ExpertRows

    def finish(self, compute: Compute) -> tuple[Tensor, Tensor]:
        return compute(0, self.rows), self.rows.offsets[-1].long()


class AllToAllDispatcher:
    """Experts are spread over the expert group: permute, exchange, compute, exchange, sum.

    Rows travel with their gates, so that a rank returns weighted rows and no rank keeps the experts' outputs for backward.
    With an expert group of one rank it is the local dispatcher.

    Args:
        placement: which rank serves which expert; None: consecutive blocks.
        num_chunks: the exchange is cut into so many by experts. While the rows of one chunk are computed, those of the
            others travel. Every expert still sees all its rows at once, so results do not change by a bit.
        payload: native, bf16, or fp8: how rows travel (ops/all_to_all/payload.py). fp8 is for the way to the experts; the
            way back and the gradients are bf16 then.
        buffer_factor: None: as many rows travel as there are assignments (dropless; one copy of the sizes to the host
            per layer). A number, in training: buffers of fixed size, that many times the even share T * K / ranks, and
            sizes that stay on the device, as CUDA graphs need. Every rank must bring as many tokens. What does not fit is
            dropped and counted (moe/dropped): nothing, with router.capacity_factor up to this number, or with a number as
            large as the ranks and one chunk.
    """

    def __init__(self, config: ModelConfig, groups: ParallelGroups | None = None,
                 placement: LayerPlacement | None = None, num_chunks: int = 1, payload: str = "native",
                 buffer_factor: float | None = None):
        groups = groups or ParallelGroups.single()
        self.group, self.size, self.nodes = groups.expert, groups.expert_size, groups.nodes
        self.payload, self.buffer_factor = payload, buffer_factor
        self.local = LocalDispatcher(config, groups) if self.size == 1 else None
        self.own = own = config.num_experts // self.size
        self.chunk_sizes = [config.num_experts]
        self.meter = Meter()
        self.copies: Tensor | None = None
        self.fixed_paths: tuple[list[int], list[Path]] | None = None  # made once: their index arrays come from the host
        if self.local is None:
            lent = len(placement.replicas[0]) if placement is not None else 0
            bounds = [own * i // num_chunks for i in range(num_chunks + 1)]
            self.chunk_sizes = [b - a for a, b in itertools.pairwise(bounds)] + ([lent] if lent else [])
            if placement is not None:
                self.copies, self.num_copies = copy_positions(placement)
                self.rank = groups.expert_rank

    @staticmethod
    def problems(config: ModelConfig, expert_parallel_size: int, num_chunks: int = 1, payload: str = "native",
                 buffer_factor: float | None = None) -> list[str]:
        found = []
        if config.num_experts % expert_parallel_size:
            found.append(f"model.num_experts {config.num_experts} is not divisible by parallel.expert_parallel_size "
                         f"{expert_parallel_size}")
        if payload not in PAYLOADS:
            found.append(f"dispatcher.payload is {payload!r}; choose {', '.join(PAYLOADS)}")
        own = config.num_experts // expert_parallel_size
        if config.num_experts and not 1 <= num_chunks <= own:
            found.append(f"dispatcher.num_chunks is {num_chunks}; a rank has {own} experts, so it must be from 1 to {own}")
        if buffer_factor is not None and buffer_factor <= 0:
            found.append(f"dispatcher.buffer_factor is {buffer_factor}; it must be positive, or null for exact sizes")
        if expert_parallel_size == 1 and (num_chunks, payload, buffer_factor) != (1, "native", None):
            found.append(f"dispatcher.num_chunks {num_chunks}, payload {payload} and buffer_factor {buffer_factor} are for "
                         "expert parallelism, but parallel.expert_parallel_size is 1; leave them out, or, where a "
                         "resumed run has them, add dispatcher=all_to_all")
        return found

    def start(self, hidden: Tensor, routing: RouterOutput, dropless: bool = False) -> Dispatched:
        """Send the rows of hidden [T, D] and their gates. dropless: exact sizes, whatever buffer_factor says, as outside of
        training, where a row must not depend on the others."""
        if self.local is not None:
            return self.local.start(hidden, routing)
        slots, inverse, offsets = routing.slots, routing.inverse, routing.offsets
        if self.copies is not None:
            slots, inverse, offsets = group_by_expert(self._positions(routing), self.size * sum(self.chunk_sizes))
        counts = offsets.diff().long().view(self.size, -1)  # [ranks, L]
        fixed = self.buffer_factor is not None and not dropless
        plan = self._fixed_plan(counts, slots.numel()) if fixed else self._exact_plan(counts)
        slots, inverse = _move(slots, inverse, plan.places, plan.num_rows)
        rows = permute(hidden, slots, inverse)
        gates = permute(routing.weights.reshape(-1, 1), slots, inverse.reshape(-1, 1))
        sizes = [sum(path[0].send) for path in plan.paths]
        flights = [(begin_rows(r, path, payload=self.payload, meter=self.meter), begin_rows(g, path, meter=self.meter))
                   for r, g, path in zip(rows.split(sizes), gates.split(sizes), plan.paths, strict=True)]
        return _Sent(self, flights, plan, slots, inverse)

    def _positions(self, routing: RouterOutput) -> Tensor:
        """[T, K]: rank * L + place of the copy each assignment goes to, -1 for none. Copies take turns."""
        assert self.copies is not None
        if self.copies.device != routing.expert_ids.device:
            self.copies, self.num_copies = (t.to(routing.expert_ids.device) for t in (self.copies, self.num_copies))
        ids = routing.expert_ids.long().clamp_min(0)
        turn = (routing.inverse - routing.offsets[ids] + self.rank) % self.num_copies[ids]
        return torch.where(routing.expert_ids < 0, -1, self.copies[ids, turn])

    def _exact_plan(self, counts: Tensor) -> _Plan:
        """Sizes as they are: they visit the host once."""
        with self.meter.waiting(counts.device):  # the layer's first meeting: a late rank keeps the others here
            received = exchange_counts(counts, self.group)
        sends, receives = self._by_chunk(counts), self._by_chunk(received)  # [ranks, C]
        tables = [sends.flatten(), receives.flatten()]
        if self.nodes is not None:
            with self.meter.waiting(counts.device):
                tables.append(exchange_node_counts(sends, self.nodes).flatten())
        host = torch.cat(tables).tolist()  # the one host copy
        num_chunks, size = len(self.chunk_sizes), self.size
        cells = size * num_chunks
        paths = [self._path(host[c:cells:num_chunks], host[cells + c:2 * cells:num_chunks], host[2 * cells + c::num_chunks],
                            counts.device) for c in range(num_chunks)]
        num_rows = sum(host[:cells])
        places = None
        if num_chunks > 1:
            starts = _exclusive_sum(sends.T.flatten()).view(num_chunks, size).T
            places = _places(sends.flatten(), starts.flatten(), num_rows)
        return _Plan(paths, received, places, num_rows)

    def _fixed_plan(self, counts: Tensor, num_slots: int) -> _Plan:
        """Buffers of one size for all pairs of ranks, per chunk; what goes beyond stays behind."""
        assert self.buffer_factor is not None
        size, own = self.size, self.own
        limits = [math.ceil(self.buffer_factor * num_slots / size * n / own) + n for n in self.chunk_sizes]
        limits = [min(limit, num_slots) for limit in limits]
        parts = [torch.cat((c.new_zeros(size, 1), c.cumsum(1).clamp(max=limit)), dim=1).diff(dim=1)
                 for c, limit in zip(counts.split(self.chunk_sizes, dim=1), limits, strict=True)]
        with self.meter.waiting(counts.device):
            received = exchange_counts(torch.cat(parts, dim=1), self.group)
        if self.fixed_paths is None or self.fixed_paths[0] != limits:
            paths = [self._path([n] * size, [n] * size, [n] * size, counts.device) for n in limits]
            self.fixed_paths = (limits, paths)
        rank = torch.arange(size, device=counts.device)
        starts = torch.stack([sum(limits[:c]) * size + rank * n for c, n in enumerate(limits)], dim=1)
        kept = torch.stack([torch.full_like(rank, n) for n in limits], dim=1)
        places = _places(self._by_chunk(counts).flatten(), starts.flatten(), num_slots, kept.flatten())
        return _Plan(self.fixed_paths[1], received, places, size * sum(limits), limits)

    def _by_chunk(self, counts: Tensor) -> Tensor:
        """[ranks, L] -> [ranks, C]."""
        return torch.stack([part.sum(1) for part in counts.split(self.chunk_sizes, dim=1)], dim=1)

    def _path(self, send: list[int], receive: list[int], node_counts: list[int], device: torch.device) -> Path:
        if self.nodes is None:
            return (Hop(self.group, send, receive),)
        table = [node_counts[i:i + self.nodes.num_nodes] for i in range(0, self.size, self.nodes.num_nodes)]
        return node_path(send, receive, table, self.nodes, device)


@dataclass(frozen=True)
class _Plan:
    """paths: of every chunk. received: [ranks, L] rows that arrive here from each rank for each expert. places: where each
    assignment in expert order stands among the rows that are sent ([n] int64, -1: nowhere); None: as it is. limits: rows of
    the buffer of each pair of ranks, by chunk; None: exact sizes."""

    paths: list[Path]
    received: Tensor
    places: Tensor | None
    num_rows: int
    limits: list[int] | None = None


@dataclass(frozen=True)
class _Sent:
    dispatcher: AllToAllDispatcher
    flights: list[tuple[Flight, Flight]]
    plan: _Plan
    slots: Tensor
    inverse: Tensor

    def finish(self, compute: Compute) -> tuple[Tensor, Tensor]:
        home = []
        payload, meter = self.dispatcher.payload, self.dispatcher.meter
        for chunk, received in enumerate(self.plan.received.split(self.dispatcher.chunk_sizes, dim=1)):
            flight, gate_flight = self.flights[chunk]
            hidden, gates = end_rows(flight), end_rows(gate_flight)
            per_source = None if self.plan.limits is None else self.plan.limits[chunk]
            out = compute(chunk, by_expert(hidden, gates, received, per_source))
            home.append(begin_rows(out, self.plan.paths[chunk], homeward=True, meter=meter,
                                   payload=return_payload(payload)))
        rows = torch.cat([end_rows(flight) for flight in home]) if len(home) > 1 else end_rows(home[0])
        return unpermute(rows, self.slots, self.inverse), self.plan.received.sum()


def by_expert(hidden: Tensor, gates: Tensor, received: Tensor, per_source: int | None) -> ExpertRows:
    """Rows that arrived by (source rank, expert) as work for the experts. Order within an expert: by source.

    hidden [R, D], gates [R, 1], received [ranks, L]: rows by source and expert. per_source: rows in the buffer of each
    source, padding behind what it sent; None: no padding.
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

    -> [num_rows] int64; -1 for rows behind the last block, in a block with a negative start, and from limits[b] on.
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


def _move(slots: Tensor, inverse: Tensor, places: Tensor | None, num_rows: int) -> tuple[Tensor, Tensor]:
    """slots [P'] and inverse [T, K] of rows that were moved to `places`, num_rows of them."""
    if places is None:
        return slots[:num_rows], inverse
    moved = slots.new_full((num_rows + 1,), -1)  # the last one collects what has no place
    moved.scatter_(0, torch.where(places < 0, num_rows, places), slots[:len(places)])
    if len(places) == 0:
        return moved[:num_rows], inverse
    return moved[:num_rows], torch.where(inverse < 0, -1, places[inverse.clamp_min(0).long()]).int()


def copy_positions(placement: LayerPlacement) -> tuple[Tensor, Tensor]:
    """Where the copies of each expert stand, rank * L + place: [E, most copies] (the owner's first); and how many, [E]."""
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
    return torch.tensor([p + p[:1] * (most - len(p)) for p in places]), torch.tensor([len(p) for p in places])


def lent_experts(placement: LayerPlacement, rank: int) -> list[int]:
    """The experts lent to a rank, in the order in which their weights arrive: by owner."""
    return sorted(placement.replicas[rank], key=lambda expert: (placement.owner(expert), expert))
