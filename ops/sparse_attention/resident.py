"""A bounded cache: which blocks' tokens stay, by a rule that is the same in training and decoding.

Entries of all complete blocks are kept; tokens of the first blocks, of the window, of the blocks
that began since the last boundary, and of a pool of `resident_blocks`. At every boundary of
`resident_interval` tokens of a document the pool is filled anew, from what is there: the blocks
that earlier queries gave most of their estimated mass. What is not resident is no candidate, and
stays in the softmax through its entries. Plain torch, on any device.

Shape letters: T tokens, H heads, Hk key/value heads, G = H / Hk, d head dimension, N rows, M blocks
of a document, r entries of a block, K selected blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ops.sparse_attention.cache import Weigh, pooled
from ops.sparse_attention.chunked import real_dtype
from ops.sparse_attention.entries import CoarseEntries
from ops.sparse_attention.paged import decode_pages
from ops.sparse_attention.ranking import block_of_key, rank_keys, rank_values
from ops.sparse_attention.spec import SMALLEST, SparseAttentionSpec


class Residence(NamedTuple):
    """Of a document after its last token, for the queries that follow."""

    resident: Tensor
    """[..., Hk, M] bool: blocks of the pool, as the last boundary left it."""
    mass: Tensor
    """[..., Hk, M] fp32: what queries gave the blocks, those of older intervals counting less."""


def new_residence(shape: Sequence[int], device: torch.device) -> Residence:
    """Of an empty document; shape: [..., Hk, M]."""
    return Residence(
        torch.zeros(tuple(shape), dtype=torch.bool, device=device),
        torch.zeros(tuple(shape), dtype=torch.float32, device=device),
    )


def cross_boundary(past: Residence, boundary: int, spec: SparseAttentionSpec) -> Residence:
    """The pool for queries from block `boundary` on, a multiple of an interval's blocks: of the
    blocks that it held and of those that began since the boundary before, the resident_blocks with
    the largest mass, equal ones from the lower number on.
    """
    assert spec.resident_blocks is not None
    block = torch.arange(past.mass.shape[-1], device=past.mass.device)
    began = (block >= boundary - spec.interval_blocks) & (block < boundary)
    held = (past.resident | began) & (block >= spec.num_sink_blocks)
    # the logarithm orders as the mass does, and its smallest values have no ties with nothing
    keys = rank_keys(past.mass.clamp_min(SMALLEST).log(), block.expand_as(past.mass))
    keys = keys.masked_fill(~held, -1)
    best = block_of_key(keys.topk(min(spec.resident_blocks, keys.shape[-1]), -1).values)
    taken = held.new_zeros((*held.shape[:-1], held.shape[-1] + 1))
    taken.scatter_(-1, torch.where(best < 0, held.shape[-1], best), True)
    return Residence(taken[..., :-1], past.mass * spec.resident_decay)


def candidates_of(resident: Tensor, own: int, spec: SparseAttentionSpec) -> Tensor:
    """[..., Hk, M] bool: what queries of block `own` may choose. resident: the pool there."""
    block = torch.arange(resident.shape[-1], device=resident.device)
    local = max(0, own - spec.num_local_blocks + 1)
    since = own // spec.interval_blocks * spec.interval_blocks
    among = (block >= min(spec.num_sink_blocks, local)) & (block < local)
    return (resident | (block >= since)) & among


def _ranked(
    q: Tensor, entries: CoarseEntries, own: int, spec: SparseAttentionSpec
) -> tuple[Tensor, Tensor]:
    """Rank value and estimated mass [..., M] of the complete past blocks of queries in block `own`.
    q: [..., G, d]; entries: [..., own * r, d] each.
    """
    scale = q.shape[-1] ** -0.5
    mean, _, var = entries
    z = torch.matmul(q, mean.transpose(-1, -2)) * scale + math.log(spec.coarse_block_size)
    kappa = None
    if spec.order == 2:
        kappa = torch.matmul(q.square() * (0.5 * scale**2), var.transpose(-1, -2))
        kappa = kappa.clamp_(max=spec.max_variance)
        z = z + kappa
    return rank_values(z, kappa, z.softmax(-1), spec)


def _best(values: Tensor, candidates: Tensor, spec: SparseAttentionSpec) -> Tensor:
    """[..., top_k] int64, rising, then -1."""
    block = torch.arange(values.shape[-1], device=values.device)
    keys = rank_keys(values, block.expand_as(values)).masked_fill(~candidates, -1)
    chosen = block_of_key(keys.topk(min(spec.top_k, keys.shape[-1]), -1).values)
    far = torch.iinfo(torch.int64).max
    rising = torch.where(chosen < 0, far, chosen).sort(-1).values
    missing = rising.new_full((*rising.shape[:-1], spec.top_k - rising.shape[-1]), far)
    rising = torch.cat((rising, missing), -1)
    return torch.where(rising == far, -1, rising)


class Kept(NamedTuple):
    """What select_resident finds."""

    selected: Tensor
    """[Hk, T, top_k] int32 as sparse_attention takes it."""
    candidates: Tensor | None
    """[Hk, T, n] int32 block ids, -1 for none: all that a query could have selected."""
    left: list[Residence]
    """Of every document, as it is behind its last token."""


@torch.no_grad()
def select_resident(
    q: Tensor,
    entries: CoarseEntries,
    bounds: Sequence[int],
    spec: SparseAttentionSpec,
    lists: bool = False,
) -> Kept:
    """The blocks that queries select among the resident ones of packed documents.

    Args:
        q: [T, H, d]; entries: [Hk, M * r, d] each, of all documents' blocks (interface.
            pool_entries). bounds: where documents begin, and T. lists: find the candidates, too.
    """
    real, kv_heads, r = real_dtype(q.dtype), entries.key_mean.shape[0], spec.entries_per_block
    longest = max((e - b for b, e in itertools.pairwise(bounds)), default=0)
    most = min(spec.resident_slots, -(-longest // spec.block_size)) if lists else 0
    selected = q.new_full((kv_heads, len(q), spec.top_k), -1, dtype=torch.int32)
    could = q.new_full((kv_heads, len(q), most), -1, dtype=torch.int32)
    left, first_block = [], 0
    for begin, end in itertools.pairwise(bounds):
        number = -(-(end - begin) // spec.block_size)
        state = new_residence((kv_heads, number), q.device)
        # A block at a time: its queries have the same past, and one pool.
        for own in range(number):
            if own and own % spec.interval_blocks == 0:
                state = cross_boundary(state, own, spec)
            if own == 0:
                continue
            start = begin + own * spec.block_size
            rows = slice(start, min(start + spec.block_size, end))
            queries = q[rows].to(real).unflatten(1, (kv_heads, -1)).transpose(0, 1)
            at = slice(first_block * r, (first_block + own) * r)
            past = CoarseEntries(*(x[:, None, at].to(real) for x in entries))
            values, mass = _ranked(queries, past, own, spec)
            among = candidates_of(state.resident, own, spec)[:, :own]
            chosen = _best(values, among.unsqueeze(1).expand_as(values), spec)
            selected[:, rows] = torch.where(chosen < 0, -1, chosen + first_block).int()
            if lists:
                ids = torch.where(among, torch.arange(own, device=q.device), number)
                ids = ids.sort(-1).values[:, :most]
                ids = torch.where(ids == number, -1, ids + first_block)
                could[:, rows, : ids.shape[-1]] = ids.unsqueeze(1).int()
            state.mass[:, :own] += mass.sum(1)
        left.append(state)
        first_block += number
    return Kept(selected, could if lists else None, left)


class ResidentCache:
    """Keys and values of one layer while generating, of the resident blocks alone: N rows of equal
    length, and a pool of slots for each row and key/value head.

    Attributes:
        keys, values: [N * slots, block_size, Hk, d].
        entries: [N * max_blocks, Hk, r, d] each, block b of row n at n * max_blocks + b.
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
        self.spec, self.weigh = spec, weigh
        self.num_rows, self.max_len, self.length = num_rows, max_len, 0
        self.max_blocks = -(-max_len // spec.block_size)
        self.num_slots = min(spec.resident_slots, self.max_blocks)
        shape = (num_rows * self.num_slots, spec.block_size, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        by_page = (
            num_rows * self.max_blocks,
            num_kv_heads,
            spec.entries_per_block,
            head_dim,
        )
        self.entries = CoarseEntries(
            *(torch.zeros(by_page, dtype=dtype, device=device) for _ in CoarseEntries._fields)
        )
        by_block = (num_rows, num_kv_heads, self.max_blocks)
        self.state = new_residence(by_block, device)
        # Where the tokens of a block are, -1 where they are not.
        self.places = torch.full(by_block, -1, dtype=torch.int64, device=device)
        self.pages = torch.arange(num_rows * self.max_blocks, device=device).view(num_rows, -1)

    def tensors(self) -> tuple[Tensor, ...]:
        """What holds keys, values and entries."""
        return (self.keys, self.values, *self.entries)

    def _kept(self, own: int) -> Tensor:
        """[N, Hk, max_blocks] bool: blocks whose tokens queries from block `own` on may see."""
        block = torch.arange(self.max_blocks, device=self.places.device)
        since = own // self.spec.interval_blocks * self.spec.interval_blocks
        near = own - self.spec.num_local_blocks + 1
        forced = (block < self.spec.num_sink_blocks) | (block >= min(near, since))
        return (self.state.resident | forced) & (block <= own)

    def _make_room(self, own: int) -> None:
        """Before the first token of block `own`: evict what it may not see, and give it a slot."""
        if own and own % self.spec.interval_blocks == 0:
            self.state = cross_boundary(self.state, own, self.spec)
        self.places = torch.where(self._kept(own), self.places, -1)
        used = torch.zeros(
            (*self.places.shape[:2], self.num_slots + 1),
            dtype=torch.bool,
            device=self.places.device,
        )
        slots = self.places % self.num_slots
        used.scatter_(2, torch.where(self.places < 0, self.num_slots, slots), True)
        # the lowest slot that is free, of which there is one by the number of slots
        free = used[..., :-1].int().argmin(-1)
        row = torch.arange(self.num_rows, device=free.device).unsqueeze(1)
        self.places[:, :, own] = row * self.num_slots + free

    def _check_room(self, number: int) -> None:
        if self.length + number > self.max_len:
            text = f"{self.length + number} tokens do not fit the cache of {self.max_len}"
            raise ValueError(text)

    @torch.no_grad()
    def fill(self, k: Tensor, v: Tensor, left: list[Residence]) -> None:
        """Store the first tokens [N, S, Hk, d] of all rows, of which `left` is what select_resident
        gave. Blocks that they will not see are not kept.

        Raises:
            ValueError: the cache is full.
        """
        self._check_room(k.shape[1])
        self.length = k.shape[1]
        size = self.spec.block_size
        for row, one in enumerate(left):
            number = one.mass.shape[-1]
            self.state.resident[row, :, :number] = one.resident
            self.state.mass[row, :, :number] = one.mass
        kept = self._kept((self.length - 1) // size)
        first = self.num_slots * torch.arange(self.num_rows, device=k.device).view(-1, 1, 1)
        self.places = torch.where(kept, first + kept.long().cumsum(2) - 1, -1)
        for block, begin in enumerate(range(0, self.length, size)):
            end = min(begin + size, self.length)
            of, head = kept[:, :, block].nonzero(as_tuple=True)
            slot = self.places[of, head, block]
            for held, new in ((self.keys, k), (self.values, v)):
                held[slot, : end - begin, head] = new[of, begin:end, head]
            if end - begin == size:
                self._pool(block, k[:, begin:end], v[:, begin:end])

    def _pool(self, block: int, k: Tensor, v: Tensor) -> None:
        """Of the tokens [N, block_size, Hk, d] of a complete block."""
        keys, values = (x.unflatten(1, (-1, self.spec.coarse_block_size)) for x in (k, v))
        for held, new in zip(self.entries, pooled(keys, values, self.weigh), strict=True):
            held[self.pages[:, block]] = new.transpose(1, 2).to(held.dtype)

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> None:
        """Store one token [N, Hk, d] of every row.

        Raises:
            ValueError: the cache is full.
        """
        self._check_room(1)
        own, place = divmod(self.length, self.spec.block_size)
        if place == 0:
            self._make_room(own)
        slot = self.places[:, :, own]
        head = torch.arange(k.shape[1], device=k.device)
        self.keys[slot, place, head] = k
        self.values[slot, place, head] = v
        self.length += 1
        if place == self.spec.block_size - 1:
            whole = (x[slot, :, head].transpose(1, 2) for x in (self.keys, self.values))
            self._pool(own, *whole)

    @torch.no_grad()
    def attend(
        self, q: Tensor, bias: Tensor | None = None, sink: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(out [N, H, d], lse [N, H]) of the queries [N, H, d] of the last tokens, whose masses
        then count. bias: [N, H]; sink: [H].
        """
        spec, own = self.spec, (self.length - 1) // self.spec.block_size
        kv_heads, real = self.places.shape[1], real_dtype(q.dtype)
        selected = None
        if own:
            rows = q.to(real).unflatten(1, (kv_heads, -1))
            past = CoarseEntries(
                *(
                    x[self.pages[:, :own]].to(real).transpose(1, 2).flatten(2, 3)
                    for x in self.entries
                )
            )
            values, mass = _ranked(rows, past, own, spec)
            among = candidates_of(self.state.resident, own, spec)[..., :own]
            selected = _best(values, among, spec)
            self.state.mass[..., :own] += mass
        else:
            shape = (len(q), kv_heads, spec.top_k)
            selected = torch.full(shape, -1, dtype=torch.int64, device=q.device)
        length = torch.full((len(q),), self.length, dtype=torch.int64, device=q.device)
        return decode_pages(
            q,
            self.keys,
            self.values,
            self.entries,
            self.pages,
            length,
            spec,
            bias=bias,
            sink=sink,
            selected=selected,
            places=self.places,
        )
