"""Where a bounded cache keeps what it has: entries of every block in pages, and tokens in a region
of each document, whose size does not hang on the document's length.

Shape letters as in resident.py; P pages of a row, S new tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.sparse_attention.cache import Weigh, pooled
from ops.sparse_attention.chunked import real_dtype
from ops.sparse_attention.entries import CoarseEntries, StoredEntries
from ops.sparse_attention.paged import decode_pages
from ops.sparse_attention.resident import (
    Residence,
    best_blocks,
    candidates_of,
    cross_boundary,
    kept_blocks,
    new_residence,
    rank_past,
)
from ops.sparse_attention.spec import SparseAttentionSpec


class NewTokens(NamedTuple):
    """Whose the new tokens [N, S, ...] are: of each row the last ones, behind padding."""

    regions: list[int]
    """Of every row."""
    pages: Tensor
    """[N, P] int64, those of the entries, in the order of the row's blocks."""
    lengths: list[int]
    """Tokens of every row with the new ones."""
    numbers: list[int]
    """New tokens of every row; 0: it is idle, and has no region."""


class Turn(NamedTuple):
    """At most w new tokens of each of R rows, those of a row all of one block. A row that has fewer
    repeats its last one.
    """

    regions: list[int]
    first: list[int]
    """Position of the first of them in each document."""
    counts: list[int]
    """How many they are."""
    pages: Tensor
    """[R, P] int64, as far as they see."""
    begun: Tensor
    """[R, 1] int64, position of the first column of new tokens; padding is before the document."""
    position: Tensor
    """[R, w] int64 in their documents."""
    real: Tensor
    """[R, w] bool, False for what is repeated."""


class ResidentPages:
    """Keys and values of one layer while generating, of the resident blocks alone. A document has
    pages of entries, and a region: `num_slots` rooms for each key/value head, each of a block.

    A room is wiped when a block gets it, and a region is as new when a document begins there:
    nothing of a former holder is read.

    Args:
        num_pages: pages of entries; num_regions: documents at a time; max_blocks: of a document.

    Attributes:
        spec: its sizes stay as they are, top_k may change.
        keys, values: [num_regions * num_slots, block_size, Hk, d].
        entries: of num_pages blocks, valid for complete ones.
        state: of the documents, [num_regions, Hk, max_blocks].
        places: [num_regions, Hk, max_blocks] int64, rooms of blocks, -1 for those without.
    """

    def __init__(
        self,
        spec: SparseAttentionSpec,
        num_pages: int,
        num_regions: int,
        max_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        weigh: Weigh | None = None,
    ):
        self.spec, self.weigh = spec, weigh
        self.num_slots = min(spec.resident_slots, max_blocks)
        shape = (num_regions * self.num_slots, spec.block_size, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.entries = StoredEntries(spec, num_pages, num_kv_heads, head_dim, dtype, device)
        by_block = (num_regions, num_kv_heads, max_blocks)
        self.state = new_residence(by_block, device)
        self.places = torch.full(by_block, -1, dtype=torch.int64, device=device)
        self.head = torch.arange(num_kv_heads, device=device)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held: keys, values, entries, and what says which blocks stay, and where."""
        return (self.keys, self.values, *self.entries.tensors(), *self.state, self.places)

    @torch.no_grad()
    def fill(self, region: int, pages: Tensor, k: Tensor, v: Tensor, left: Residence) -> None:
        """The first tokens of a document in a region; blocks that it will not see are not kept.

        Args:
            pages: [complete blocks] int64, for their entries. k, v: [S, Hk, d], S at least 1. left:
                what select_resident gave, [Hk, blocks].
        """
        size, number = self.spec.block_size, left.mass.shape[-1]
        self.state.resident[region] = F.pad(left.resident, (0, self.places.shape[-1] - number))
        self.state.mass[region] = F.pad(left.mass, (0, self.places.shape[-1] - number))

        own = torch.full((), number - 1, device=k.device)
        kept = kept_blocks(self.state.resident[region], own, self.spec)
        rooms = region * self.num_slots + kept.long().cumsum(1) - 1
        self.places[region] = torch.where(kept, rooms, -1)
        head, block = kept.nonzero(as_tuple=True)
        room = self.places[region, head, block]
        whole = len(k) // size
        for held, new in ((self.keys, k), (self.values, v)):
            blocks = F.pad(new, (0, 0, 0, 0, 0, number * size - len(new))).unflatten(0, (-1, size))
            held[room, :, head] = blocks[block, :, head]
        if whole:
            first = (x[: whole * size].unflatten(0, (whole, size)) for x in (k, v))
            self._pool(pages[:whole], *first)

    def _pool(self, pages: Tensor, k: Tensor, v: Tensor) -> None:
        """Entries of complete blocks [n, block_size, Hk, d] into pages [n]."""
        keys, values = (x.unflatten(1, (-1, self.spec.coarse_block_size)) for x in (k, v))
        found = pooled(keys, values, self.weigh)
        self.entries.write(pages, CoarseEntries(*(x.transpose(1, 2) for x in found)))

    def _enter(self, regions: list[int], blocks: list[int]) -> None:
        """Before the first token of a block in each region: evict what it may not see, and give it
        an empty room.
        """
        for at, block in zip(regions, blocks, strict=True):
            if block and block % self.spec.interval_blocks == 0:
                past = Residence(*(x[at] for x in self.state))
                found = cross_boundary(past, block, self.spec)
                for held, new in zip(self.state, found, strict=True):
                    held[at] = new

        device = self.places.device
        region, own = (torch.tensor(x, device=device) for x in (regions, blocks))
        kept = kept_blocks(self.state.resident[region], own.view(-1, 1, 1), self.spec)
        places = torch.where(kept, self.places[region], -1)
        shape = (*places.shape[:2], self.num_slots + 1)
        used = torch.zeros(shape, dtype=torch.bool, device=device)
        used.scatter_(2, torch.where(places < 0, self.num_slots, places % self.num_slots), True)
        # the lowest room that is free, of which there is one by the number of rooms
        room = region.unsqueeze(1) * self.num_slots + used[..., :-1].int().argmin(-1)
        self.places[region] = places.scatter(
            2, own.view(-1, 1, 1).expand(-1, places.shape[1], 1), room.unsqueeze(2)
        )
        for held in (self.keys, self.values):
            held[room, :, self.head] = 0

    @torch.no_grad()
    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        new: NewTokens,
        bias: Tensor | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Store new tokens behind those of their documents, and attend with them.

        Args:
            q: [N, S, H, d]; k, v: [N, S, Hk, d]; bias: [N, S, H]; sink: [H].

        Returns:
            [N, S, H, d], zeros for padding and idle rows.
        """
        out, done = torch.zeros_like(q), [0] * len(q)
        width = q.shape[1]
        # Tokens of one block of every row at a time: they have the same past, and one pool.
        while rows := [row for row, number in enumerate(new.numbers) if done[row] < number]:
            turn = self._turn(new, rows, done, width)
            row_of = torch.tensor(rows, device=q.device).unsqueeze(1)
            at = row_of, turn.position - turn.begun
            self._store(turn, k[at], v[at])
            found = self._attend(turn, q[at], None if bias is None else bias[at], sink)
            real = turn.real.flatten().nonzero().squeeze(1)
            places = (x.expand_as(turn.position).flatten()[real] for x in at)
            out[tuple(places)] = found[real]
            for i, number in zip(rows, turn.counts, strict=True):
                done[i] += number
        return out

    def _turn(self, new: NewTokens, rows: list[int], done: list[int], width: int) -> Turn:
        size, device = self.spec.block_size, self.places.device
        begun = [new.lengths[row] - width for row in rows]
        first = [new.lengths[row] - new.numbers[row] + done[row] for row in rows]
        counts = [
            min(size - at % size, new.numbers[row] - done[row])
            for row, at in zip(rows, first, strict=True)
        ]
        number_of, begins, before = (
            torch.tensor(x, device=device).unsqueeze(1) for x in (counts, first, begun)
        )
        step = torch.arange(max(counts), device=device)
        num_pages = max(first) // size + 1
        return Turn(
            [new.regions[row] for row in rows],
            first,
            counts,
            new.pages[torch.tensor(rows, device=device), :num_pages],
            before,
            begins + torch.minimum(step, number_of - 1),
            step < number_of,
        )

    def _store(self, turn: Turn, k: Tensor, v: Tensor) -> None:
        """k, v: [R, w, Hk, d]."""
        size, device = self.spec.block_size, k.device
        begin = [i for i, first in enumerate(turn.first) if first % size == 0]
        if begin:
            blocks = [turn.first[i] // size for i in begin]
            self._enter([turn.regions[i] for i in begin], blocks)

        own = turn.position[:, 0] // size
        region = torch.tensor(turn.regions, device=device)
        room = self.places[region, :, own]
        for held, new in ((self.keys, k), (self.values, v)):
            held[room.unsqueeze(1), (turn.position % size).unsqueeze(2), self.head] = new

        ends = zip(turn.first, turn.counts, strict=True)
        full = [i for i, (first, number) in enumerate(ends) if (first + number) % size == 0]
        if full:
            whole = torch.tensor(full, device=device)
            room = room[whole]
            of_block = (x[room, :, self.head].transpose(1, 2) for x in (self.keys, self.values))
            self._pool(turn.pages[whole, own[whole]], *of_block)

    def _attend(self, turn: Turn, q: Tensor, bias: Tensor | None, sink: Tensor | None) -> Tensor:
        """[R * w, H, d] of the queries [R, w, H, d] of tokens that are stored, whose masses then
        count.
        """
        spec, width, real = self.spec, q.shape[1], real_dtype(q.dtype)
        kv_heads, num_pages = len(self.head), turn.pages.shape[1]
        region = torch.tensor(turn.regions, device=q.device)
        own = turn.position[:, :1].unsqueeze(2) // spec.block_size  # [R, 1, 1]
        places = self.places[region, :, :num_pages]

        # What decode_pages takes are the entries as they are held, or what rounded ones stand for.
        entries, pages = self.entries.values, turn.pages
        held = self.entries.read(turn.pages, real)
        if self.entries.exponents:
            entries = CoarseEntries(*(x.flatten(0, 1) for x in held))
            pages = torch.arange(pages.numel(), device=q.device).view(pages.shape)

        if num_pages > 1:
            queries = q.to(real).unflatten(2, (kv_heads, -1)).transpose(1, 2)
            past = CoarseEntries(*(x.transpose(1, 2).flatten(2, 3).unsqueeze(2) for x in held))
            there = torch.arange(num_pages, device=q.device) < own
            by_entry = there.repeat_interleave(spec.entries_per_block, 2)[:, :, None, None]
            values, mass = rank_past(queries, past, spec, by_entry)
            among = candidates_of(self.state.resident[region, :, :num_pages], own, spec)
            selected = best_blocks(values, among.unsqueeze(2).expand_as(values), spec)
            counted = mass.masked_fill(~turn.real[:, None, :, None], 0.0).sum(2)
            self.state.mass[region, :, :num_pages] += counted
        else:
            shape = (len(q), kv_heads, width, spec.top_k)
            selected = torch.full(shape, -1, dtype=torch.int64, device=q.device)

        # What a mask hides is multiplied with 0: it has to be the row's own, and finite.
        own_place = places.gather(2, own.expand(-1, kv_heads, 1))
        places = torch.where(places < 0, own_place, places)
        out, _ = decode_pages(
            q.flatten(0, 1),
            self.keys,
            self.values,
            entries,
            pages.repeat_interleave(width, 0),
            (turn.position + 1).flatten(),
            spec,
            bias=None if bias is None else bias.flatten(0, 1),
            sink=sink,
            selected=selected.transpose(1, 2).flatten(0, 1),
            places=places.repeat_interleave(width, 0),
        )
        return out


class ResidentCache:
    """Of one layer while generating: N rows of equal length, each with a region and pages of its
    own.

    Attributes:
        length: tokens of every row so far.
    """

    def __init__(
        self,
        spec: SparseAttentionSpec,
        num_rows: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        weigh: Weigh | None = None,
    ):
        self.max_len, self.length = max_len, 0
        blocks = -(-max_len // spec.block_size)
        shape = (num_rows * blocks, num_rows, blocks, num_kv_heads, head_dim)
        self.pool = ResidentPages(spec, *shape, dtype, device, weigh)
        self.pages = torch.arange(num_rows * blocks, device=device).view(num_rows, -1)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return self.pool.tensors()

    def _grow(self, number: int) -> None:
        if self.length + number > self.max_len:
            text = f"{self.length + number} tokens do not fit the cache of {self.max_len}"
            raise ValueError(text)
        self.length += number

    def fill(self, k: Tensor, v: Tensor, left: list[Residence]) -> None:
        """Store the first tokens [N, S, Hk, d] of all rows, of which `left` is what select_resident
        gave.

        Raises:
            ValueError: the cache is full.
        """
        self._grow(k.shape[1])
        for row, one in enumerate(left):
            self.pool.fill(row, self.pages[row], k[row], v[row], one)

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """[N, S, H, d] of the next tokens of every row; arguments as ResidentPages.extend takes
        them.

        Raises:
            ValueError: the cache is full.
        """
        self._grow(q.shape[1])
        rows = len(q)
        lengths, numbers = [self.length] * rows, [q.shape[1]] * rows
        new = NewTokens(list(range(rows)), self.pages, lengths, numbers)
        return self.pool.extend(q, k, v, new, bias, sink)
