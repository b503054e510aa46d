"""Token movement: to the rank and expert order of their experts, and back.

Shape letters: T tokens, K slots per token, A assignments in use, P rows sent, R rows received, D
hidden, E experts, L experts a rank serves (its own, then those lent to it), C chunks of them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.dispatch.base import Compute, Dispatched
from model.dispatch.config import AllToAllConfig
from model.dispatch.local import LocalDispatcher
from model.dispatch.rows import _exclusive_sum, _move, _places, by_expert, copy_positions
from model.parallel.groups import ParallelGroups
from model.placement.record import LayerPlacement
from ops.all_to_all import (
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


class AllToAllDispatcher:
    """Experts are spread over the expert group: permute, exchange, compute, exchange, sum.

    Rows travel with their gates, so that a rank returns weighted rows and no rank keeps the
    experts' outputs for backward. With an expert group of one rank it is the local dispatcher.

    Args:
        settings: what may be asked of it; None: the defaults.
        placement: which rank serves which expert; None: consecutive blocks.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: AllToAllConfig | None = None,
        groups: ParallelGroups | None = None,
        placement: LayerPlacement | None = None,
    ):
        settings = settings or AllToAllConfig()
        groups = groups or ParallelGroups.single()
        self.group = groups.expert
        self.size = groups.expert_size
        self.nodes = groups.nodes
        self.payload = settings.payload
        self.buffer_factor = settings.buffer_factor
        self.local = LocalDispatcher(config, groups) if self.size == 1 else None
        self.own = own = config.num_experts // self.size
        self.chunk_sizes = [config.num_experts]
        self.meter = Meter()
        self.copies: Tensor | None = None
        # made once: their index arrays come from the host
        self.fixed_paths: tuple[list[int], list[Path]] | None = None
        if self.local is None:
            lent = len(placement.replicas[0]) if placement is not None else 0
            num_chunks = settings.num_chunks
            bounds = [own * i // num_chunks for i in range(num_chunks + 1)]
            self.chunk_sizes = [b - a for a, b in itertools.pairwise(bounds)]
            # Lent experts are a chunk of their own: they come after a rank's own ones.
            if lent:
                self.chunk_sizes.append(lent)
            if placement is not None:
                self.copies, self.num_copies = copy_positions(placement)
                self.rank = groups.expert_rank

    def start(self, hidden: Tensor, routing: RouterOutput, dropless: bool = False) -> Dispatched:
        """Send the rows of hidden [T, D] and their gates. dropless: exact sizes, whatever
        buffer_factor says, as outside of training, where a row must not depend on the others.
        """
        if self.local is not None:
            return self.local.start(hidden, routing)

        # Rows stand by expert; with copies, by the rank and place of the copy that serves them.
        slots, inverse, offsets = routing.slots, routing.inverse, routing.offsets
        if self.copies is not None:
            positions = self._positions(routing)
            slots, inverse, offsets = group_by_expert(positions, self.size * sum(self.chunk_sizes))

        counts = offsets.diff().long().view(self.size, -1)  # [ranks, L]
        fixed = self.buffer_factor is not None and not dropless
        plan = self._fixed_plan(counts, slots.numel()) if fixed else self._exact_plan(counts)

        # The order in which they leave: by chunk, so that a chunk is one run of rows.
        slots, inverse = _move(slots, inverse, plan.places, plan.num_rows)
        rows = permute(hidden, slots, inverse)
        gates = permute(routing.weights.reshape(-1, 1), slots, inverse.reshape(-1, 1))

        # All chunks start before the first is waited for: the experts work while the next is on its
        # way.
        sizes = [sum(path[0].send) for path in plan.paths]
        flights = [
            (
                begin_rows(r, path, payload=self.payload, meter=self.meter),
                begin_rows(g, path, meter=self.meter),
            )
            for r, g, path in zip(rows.split(sizes), gates.split(sizes), plan.paths, strict=True)
        ]
        return _Sent(self, flights, plan, slots, inverse)

    def _positions(self, routing: RouterOutput) -> Tensor:
        """[T, K]: rank * L + place of the copy each assignment goes to, -1 for none. Copies take
        turns.
        """
        assert self.copies is not None
        if self.copies.device != routing.expert_ids.device:
            self.copies, self.num_copies = (
                t.to(routing.expert_ids.device) for t in (self.copies, self.num_copies)
            )
        ids = routing.expert_ids.long().clamp_min(0)
        turn = (routing.inverse - routing.offsets[ids] + self.rank) % self.num_copies[ids]
        return torch.where(routing.expert_ids < 0, -1, self.copies[ids, turn])

    def _exact_plan(self, counts: Tensor) -> _Plan:
        """Sizes as they are: they visit the host once."""
        # the layer's first meeting: a late rank keeps the others here
        with self.meter.waiting(counts.device):
            received = exchange_counts(counts, self.group)

        sends, receives = self._by_chunk(counts), self._by_chunk(received)  # [ranks, C]
        tables = [sends.flatten(), receives.flatten()]
        if self.nodes is not None:
            with self.meter.waiting(counts.device):
                tables.append(exchange_node_counts(sends, self.nodes).flatten())
        host = torch.cat(tables).tolist()  # the one host copy

        # Each table is [ranks, C] by rows on the host, one after the other; a chunk's sizes are a
        # column.
        num_chunks, size = len(self.chunk_sizes), self.size
        cells = size * num_chunks
        paths = [
            self._path(
                host[c:cells:num_chunks],
                host[cells + c : 2 * cells : num_chunks],
                host[2 * cells + c :: num_chunks],
                counts.device,
            )
            for c in range(num_chunks)
        ]

        # Rows stand by rank and then chunk, but travel by chunk and then rank.
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

        # The even share of a chunk by the factor, and a row more for each expert, so that small
        # batches fit; no more than there are slots.
        limits = [
            math.ceil(self.buffer_factor * num_slots / size * n / own) + n for n in self.chunk_sizes
        ]
        limits = [min(limit, num_slots) for limit in limits]

        # What goes beyond a pair's buffer is cut from its last experts; the peers must hear the
        # counts that are left.
        parts = [
            torch.cat((c.new_zeros(size, 1), c.cumsum(1).clamp(max=limit)), dim=1).diff(dim=1)
            for c, limit in zip(counts.split(self.chunk_sizes, dim=1), limits, strict=True)
        ]
        with self.meter.waiting(counts.device):
            received = exchange_counts(torch.cat(parts, dim=1), self.group)

        # Equal sizes on every rank: the paths need no exchange and last until the batch changes.
        if self.fixed_paths is None or self.fixed_paths[0] != limits:
            paths = [self._path([n] * size, [n] * size, [n] * size, counts.device) for n in limits]
            self.fixed_paths = (limits, paths)

        # Buffers stand by chunk and then rank, each of its limit.
        rank = torch.arange(size, device=counts.device)
        starts = torch.stack(
            [sum(limits[:c]) * size + rank * n for c, n in enumerate(limits)], dim=1
        )
        kept = torch.stack([torch.full_like(rank, n) for n in limits], dim=1)
        places = _places(
            self._by_chunk(counts).flatten(), starts.flatten(), num_slots, kept.flatten()
        )
        return _Plan(self.fixed_paths[1], received, places, size * sum(limits), limits)

    def _by_chunk(self, counts: Tensor) -> Tensor:
        """[ranks, L] -> [ranks, C]."""
        return torch.stack([part.sum(1) for part in counts.split(self.chunk_sizes, dim=1)], dim=1)

    def _path(
        self, send: list[int], receive: list[int], node_counts: list[int], device: torch.device
    ) -> Path:
        if self.nodes is None:
            return (Hop(self.group, send, receive),)
        table = [
            node_counts[i : i + self.nodes.num_nodes]
            for i in range(0, self.size, self.nodes.num_nodes)
        ]
        return node_path(send, receive, table, self.nodes, device)


@dataclass(frozen=True)
class _Plan:
    """Where the rows of a micro-batch travel."""

    paths: list[Path]
    """One for each chunk."""
    received: Tensor
    """[ranks, L] rows that arrive here from each rank for each expert."""
    places: Tensor | None
    """[n] int64, where each assignment in expert order stands among the rows that are sent, -1 for
    nowhere. None: as it is.
    """
    num_rows: int
    limits: list[int] | None = None
    """Rows of the buffer of each pair of ranks, by chunk. None: exact sizes."""


@dataclass(frozen=True)
class _Sent:
    """Rows on their way to their experts."""

    dispatcher: AllToAllDispatcher
    flights: list[tuple[Flight, Flight]]
    """The rows and the gates of every chunk."""
    plan: _Plan
    slots: Tensor
    """[P] int32, the slot of each row in the order they left in, -1 for none."""
    inverse: Tensor
    """[T, K] int32, where a slot's row stands in that order, -1 for nowhere."""

    def finish(self, compute: Compute) -> tuple[Tensor, Tensor]:
        home = []
        payload, meter = self.dispatcher.payload, self.dispatcher.meter
        for chunk, received in enumerate(
            self.plan.received.split(self.dispatcher.chunk_sizes, dim=1)
        ):
            flight, gate_flight = self.flights[chunk]
            hidden, gates = end_rows(flight), end_rows(gate_flight)
            per_source = None if self.plan.limits is None else self.plan.limits[chunk]
            out = compute(chunk, by_expert(hidden, gates, received, per_source))

            # It leaves at once, while the next chunk is computed.
            home.append(
                begin_rows(
                    out,
                    self.plan.paths[chunk],
                    homeward=True,
                    meter=meter,
                    payload=return_payload(payload),
                )
            )
        arrived = [end_rows(flight) for flight in home]
        rows = torch.cat(arrived) if len(arrived) > 1 else arrived[0]
        return unpermute(rows, self.slots, self.inverse), self.plan.received.sum()
