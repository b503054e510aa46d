"""The op on a CPU in plain torch: matrix products over chunks of queries, closed-form backward,
memory O(T).

Window, first blocks and coarse entries are contiguous for a chunk of queries, so they are dense
products under masks. So are the candidates of queries that have few of them. Other selected blocks
are walked key-side: the queries that chose a block are gathered, one product serves them all, and
their running softmax is updated, which moves block_size / G times less memory than gathering blocks
for every query.

Rows of queries are [Hk, T, G, d] here, fp32 (fp64 for fp64 inputs) whatever the dtype of the
inputs.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ops.sparse_attention.blocks import BlockTable, block_table
from ops.sparse_attention.entries import (
    CoarseEntries,
    merge_keys,
    pool_groups,
    weigh_groups,
    weigh_groups_backward,
)
from ops.sparse_attention.noise import drawing_heads, gumbel, selection_counter
from ops.sparse_attention.problem import DecodeProblem, Problem
from ops.sparse_attention.ranking import choose_blocks, rank_keys, rank_values, shares
from ops.sparse_attention.spec import SelectionNoise, SparseAttentionSpec

_NEVER = float("-inf")
_ELEMENTS = 2**21
"""Logits of one chunk: 8 MiB in fp32, near the size of a core's share of the last-level cache."""
_MAX_QUERIES = 256
_NEAR = 512
"""Candidate tokens up to which a masked product over all of them beats walking the selected
blocks.
"""
_GATHERED = 64
"""Queries that are gathered for a selected block at a time."""
_WEIGHED = 2**18
"""Numbers of keys whose entries are weighed at a time: weights and what they multiply have a dozen
tensors of that size.
"""


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool(k: Tensor, v: Tensor, table: BlockTable, spec: SparseAttentionSpec) -> CoarseEntries:
    """k, v: [T, Hk, d] -> entries of every complete block; zeros elsewhere."""
    complete, r = complete_blocks(table, spec), spec.entries_per_block
    spans = token_spans(table.start[complete], spec.block_size)

    def place(x: Tensor) -> Tensor:
        entries = k.new_zeros(k.shape[1], len(table.start), r, k.shape[2])
        entries[:, complete] = x.unflatten(1, (-1, r)).to(k.dtype)
        return entries.flatten(1, 2)

    return CoarseEntries(*(place(x) for x in pool_spans(k, v, spans, spec.coarse_block_size)))


def weigh(
    k: Tensor, v: Tensor, pool_logits: Tensor, table: BlockTable, spec: SparseAttentionSpec
) -> CoarseEntries:
    """See interface.Backend.weigh."""
    return weigh_pooled(pool(k, v, table, spec), k, v, pool_logits, table, spec)


def weigh_pooled(
    base: CoarseEntries,
    k: Tensor,
    v: Tensor,
    pool_logits: Tensor,
    table: BlockTable,
    spec: SparseAttentionSpec,
) -> CoarseEntries:
    """The entries `base` under equal weights, of which those of complete blocks are overwritten by
    those under learned ones.
    """
    r = spec.entries_per_block
    held = [x.unflatten(1, (-1, r)) for x in base]
    for blocks in _weighed_runs(k, table, spec):
        _, keys, values, logits = _of_blocks(blocks, k, v, pool_logits, table, spec)
        means = CoarseEntries(*(x[:, blocks].flatten(1, 2).to(keys.dtype) for x in held))
        for x, new in zip(held, weigh_groups(keys, values, logits, means), strict=True):
            x[:, blocks] = new.unflatten(1, (-1, r)).to(x.dtype)
    return base


def weigh_backward(
    k: Tensor,
    v: Tensor,
    pool_logits: Tensor,
    table: BlockTable,
    spec: SparseAttentionSpec,
    grads: CoarseEntries,
) -> tuple[Tensor, Tensor, Tensor]:
    """See interface.Backend.weigh_backward."""
    dk, dv, dlogits = (torch.zeros_like(x) for x in (k, v, pool_logits))
    given = [x.unflatten(1, (-1, spec.entries_per_block)) for x in grads]
    for blocks in _weighed_runs(k, table, spec):
        spans, keys, values, logits = _of_blocks(blocks, k, v, pool_logits, table, spec)
        of_blocks = CoarseEntries(*(x[:, blocks].flatten(1, 2).to(keys.dtype) for x in given))
        new = weigh_groups_backward(keys, values, logits, of_blocks)
        for x, part in zip((dk, dv, dlogits), new, strict=True):
            x[spans] = part.flatten(1, 2).transpose(0, 1).to(x.dtype)
    return dk, dv, dlogits


def _weighed_runs(k: Tensor, table: BlockTable, spec: SparseAttentionSpec) -> Iterator[Tensor]:
    """Complete blocks, as many at a time as _WEIGHED says."""
    number = max(1, _WEIGHED // (spec.block_size * k.shape[1] * k.shape[2]))
    yield from complete_blocks(table, spec).split(number)


def _of_blocks(
    blocks: Tensor,
    k: Tensor,
    v: Tensor,
    pool_logits: Tensor,
    table: BlockTable,
    spec: SparseAttentionSpec,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens of the blocks, their keys, values [Hk, n, C, d] and logits [Hk, n, C, 2, d])."""
    spans = token_spans(table.start[blocks], spec.block_size)
    keys, values, logits = (
        x[spans].to(real_dtype(k.dtype)).transpose(0, 1).unflatten(1, (-1, spec.coarse_block_size))
        for x in (k, v, pool_logits)
    )
    return spans, keys, values, logits


def pool_spans(k: Tensor, v: Tensor, spans: Tensor, size: int) -> CoarseEntries:
    """Means and variance over every `size` consecutive ones of the tokens `spans` [n]: [Hk, n /
    size, d] each.
    """
    real = real_dtype(k.dtype)
    keys, values = (x[spans].to(real).transpose(0, 1).unflatten(1, (-1, size)) for x in (k, v))
    return pool_groups(keys, values)


def pool_spans_backward(
    k: Tensor, spans: Tensor, size: int, mean: Tensor, grads: CoarseEntries, dk: Tensor, dv: Tensor
) -> None:
    """Add to dk, dv [Hk, T, d] what reaches the tokens `spans` through their pooled entries; mean:
    [Hk, n / size, d].
    """

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(size, 1)

    centred = k[spans].to(dk.dtype).transpose(0, 1) - spread(mean.to(dk.dtype))
    dk[:, spans] += (spread(grads.key_mean) + 2 * centred * spread(grads.key_var)) / size
    dv[:, spans] += spread(grads.value_mean) / size


def complete_blocks(table: BlockTable, spec: SparseAttentionSpec) -> Tensor:
    return (table.end - table.start == spec.block_size).nonzero()[:, 0]


def token_spans(start: Tensor, length: int) -> Tensor:
    """[n] first tokens -> [n * length] tokens."""
    return (start.long().unsqueeze(1) + torch.arange(length, device=start.device)).flatten()


class SuperBlocks(NamedTuple):
    """What rank_lse="super" reads in the place of the entries (README, One pass): super-blocks as
    blocks of one entry each.
    """

    entries: CoarseEntries
    """[Hk, S, d] means and variances of keys; of values nothing is read, keys stand for them."""
    table: BlockTable
    spec: SparseAttentionSpec
    """With the super-block as its block and entry."""


def super_blocks(
    entries: CoarseEntries, table: BlockTable, spec: SparseAttentionSpec
) -> SuperBlocks | None:
    """Those of the call; None with rank_lse="exact". Of incomplete ones they are finite and unused.
    Nothing here waits for the device.

    entries: [Hk, M * r, d].
    """
    if spec.rank_lse == "exact":
        return None
    span = spec.super_block_size
    above = replace(spec, block_size=span, coarse_block_size=span)
    num_tokens, num_entries = len(table.block_of), entries.key_mean.shape[1]
    supers = block_table(table.cu_seqlens, num_tokens, above)

    # Super-blocks begin where blocks do, and the blocks of one follow each other.
    number = spec.fanout * spec.entries_per_block
    first = table.block_of[supers.start.long().clamp_max(num_tokens - 1)].long()
    at = first.unsqueeze(1) * spec.entries_per_block + torch.arange(number, device=first.device)
    at = at.clamp_max(num_entries - 1).flatten()
    merged = merge_keys(entries.key_mean[:, at], entries.key_var[:, at], number)
    mean, var = (x.to(entries.key_mean.dtype) for x in merged)
    return SuperBlocks(CoarseEntries(mean, mean, var), supers, above)


class Chunk(NamedTuple):
    """A run of queries and what contiguous products must cover for them; ranges are half open."""

    begin: int
    """The first query."""
    end: int
    """The end of the queries."""
    stop: int
    """The token behind the last query's, where the window's tokens end."""
    window: int
    """The first token of any query's window."""
    sink_begin: int
    """The first token of first blocks that lie apart from the window."""
    sink_end: int
    """The end of those tokens; sink_begin where there are none."""
    low: int
    """The first block whose entries may be in the tail."""
    high: int
    """The end of those blocks; low where there are none."""
    near_low: int
    """The first block that a near query may have selected."""
    near_high: int
    """The end of those blocks; near_low where there are none."""

    @property
    def rows(self) -> slice:
        return slice(self.begin, self.end)


class _Tokens(NamedTuple):
    """Block limits of every query, [n] int64: tokens for the exact parts, blocks for the tail."""

    place: Tensor
    """The query's own token."""
    window_start: Tensor
    """First token of the window."""
    sink_start: Tensor
    """First token of the document."""
    sink_stop: Tensor
    """End of the first blocks; sink_start where the window covers them."""
    tail_low: Tensor
    """First block whose entries may be in the tail."""
    tail_high: Tensor
    """End of those blocks."""
    near: Tensor
    """[n] bool: few candidates, whose selected ones are a masked product."""


def _limits(table: BlockTable, spec: SparseAttentionSpec, exact: bool, place: Tensor) -> _Tokens:
    """table: with the blocks of the queries, whose tokens are `place`."""
    own = table.block_of.long()
    first, sink_end, local = (
        x[own].long() for x in (table.first, table.sink_end, table.local_start)
    )
    start = table.start.long()
    low, high = (sink_end, local) if exact else (first, own)
    # where the first blocks reach the window, the window's own product covers them
    sink_stop = torch.where(
        sink_end < local, start[sink_end.clamp_max(len(start) - 1)], start[first]
    )
    window = torch.where(sink_end < local, start[local], start[first])
    near = (high > low) & (
        (high - low) * spec.block_size <= max(_NEAR, 2 * spec.top_k * spec.block_size)
    )
    return _Tokens(place, window, start[first], sink_stop, low, high, near)


def _chunks(
    limits: _Tokens, num_queries: int, num_heads: int, entries_per_block: int, max_queries: int
) -> Iterator[Chunk]:
    """Runs of consecutive queries. A document whose first blocks lie apart from its windows begins
    a run of its own, so that a run has one range of such blocks, and so do queries whose tokens do
    not follow on.
    """
    place = limits.place
    starts = limits.sink_start[limits.sink_stop > limits.sink_start].unique()
    gaps = (place.diff() != 1).nonzero()[:, 0] + 1
    cuts = torch.cat([torch.searchsorted(place, starts), gaps]).unique().tolist()
    begin = 0
    while begin < num_queries:
        in_tail = max(0, int(limits.tail_high[begin]) - int(limits.tail_low[begin]))
        in_window = int(place[begin]) - int(limits.window_start[begin])
        width = in_window + 64 + entries_per_block * in_tail
        end = min(num_queries, begin + max(16, min(max_queries, _ELEMENTS // (num_heads * width))))
        following = bisect_right(cuts, begin)
        if following < len(cuts):
            end = min(end, cuts[following])
        yield _chunk(limits, begin, end)
        begin = end


def _chunk(limits: _Tokens, begin: int, end: int) -> Chunk:
    rows = slice(begin, end)
    place, window, sink_start, sink_stop, tail_low, tail_high, near = (x[rows] for x in limits)
    tail = tail_high > tail_low
    sinks = sink_stop > sink_start
    # Empty ranges stay [0, 0).
    near_low, near_high = 0, 0
    low, high = 0, 0
    sink_begin, sink_end = 0, 0
    if near.any():
        near_low, near_high = int(tail_low[near].min()), int(tail_high[near].max())
    if tail.any():
        low, high = int(tail_low[tail].min()), int(tail_high[tail].max())
    if sinks.any():
        sink_begin, sink_end = int(sink_start[sinks].min()), int(sink_stop[sinks].max())
    return Chunk(
        begin,
        end,
        int(place[-1]) + 1,
        int(window.min()),
        sink_begin,
        sink_end,
        low,
        high,
        near_low,
        near_high,
    )


class _Part(NamedTuple):
    """Entries of one softmax that a chunk of queries shares."""

    keys: Tensor
    """[Hk, L, d]"""
    values: Tensor
    """[Hk, L, d]"""
    var: Tensor | None
    """[Hk, L, d] for coarse entries."""
    mask: Tensor
    """[Hk or 1, n, 1, L], True where a query sees the entry."""
    at: slice
    """Where keys and values came from: a range of tokens, or of coarse entries."""
    is_selected: bool = False
    """Whether these are tokens of selected blocks."""


class Rows:
    """A problem's tensors as rows [Hk, n, G, d] in the dtype computed in, and what every pass
    needs.
    """

    def __init__(self, problem: Problem):
        q, table, spec = problem.q, problem.table, problem.spec
        self.spec = spec
        self.table = table
        self.exact = problem.exact
        self.coarse = problem.coarse
        self.num_queries, self.num_heads, self.dim = q.shape
        self.kv_heads = problem.k.shape[1]
        self.group = self.num_heads // self.kv_heads
        self.scale = self.dim**-0.5

        # One dtype for all of it: the running sums are fp32 whatever the inputs are.
        real = real_dtype(q.dtype)
        self.q = self.rows(q.to(real))
        self.bias = None
        if problem.bias is not None:
            self.bias = self.rows(problem.bias.to(real)).unsqueeze(-1)
        self.k, self.v = (x.to(real).transpose(0, 1).contiguous() for x in (problem.k, problem.v))
        self.entries = None
        if problem.entries is not None:
            self.entries = CoarseEntries(*(x.to(real) for x in problem.entries))

        # The limits of every query, and the blocks' starts on the host: once for all passes.
        self.selected = problem.selected.long()
        own = problem.table_of_queries
        self.own = own.block_of.long()
        self.limits = _limits(own, spec, problem.exact, problem.places)
        self.start = table.start.tolist()

    def rows(self, x: Tensor) -> Tensor:
        """[n, H, ...] -> [Hk, n, G, ...] contiguous."""
        return (
            x.view(self.num_queries, self.kv_heads, self.group, *x.shape[2:])
            .transpose(0, 1)
            .contiguous()
        )

    def by_token(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(self.num_queries, self.num_heads, *x.shape[3:])

    def chunks(self, max_queries: int = _MAX_QUERIES) -> Iterator[Chunk]:
        return _chunks(
            self.limits, self.num_queries, self.num_heads, self.spec.entries_per_block, max_queries
        )

    def last(self) -> Chunk:
        """The last query alone."""
        return _chunk(self.limits, self.num_queries - 1, self.num_queries)

    def parts(self, chunk: Chunk) -> Iterator[_Part]:
        limits, rows = self.limits, chunk.rows
        if self.coarse and chunk.high > chunk.low:
            yield self._tail(chunk)
        if not self.exact:
            return
        query = limits.place[rows].unsqueeze(1)
        at = slice(chunk.window, chunk.stop)
        token = torch.arange(at.start, at.stop, device=self.q.device)
        mask = (token >= limits.window_start[rows].unsqueeze(1)) & (token <= query)
        yield _Part(self.k[:, at], self.v[:, at], None, mask[None, :, None], at)
        if chunk.sink_end > chunk.sink_begin:
            at = slice(chunk.sink_begin, chunk.sink_end)
            token = torch.arange(at.start, at.stop, device=self.q.device)
            mask = token < limits.sink_stop[rows].unsqueeze(1)
            mask &= limits.sink_start[rows].unsqueeze(1) == chunk.sink_begin
            yield _Part(self.k[:, at], self.v[:, at], None, mask[None, :, None], at)
        if self.selected.shape[2] and chunk.near_high > chunk.near_low:
            yield self._near(chunk)

    def _taken(self, rows: slice, low: int, high: int) -> Tensor:
        """[Hk, n, high - low] bool: blocks that a query selected."""
        width = high - low
        shape = (self.kv_heads, rows.stop - rows.start, width + 1)
        taken = torch.zeros(shape, dtype=torch.bool, device=self.q.device)
        # Blocks outside the range go to one more column, which is cut off.
        column = self.selected[:, rows] - low
        column = torch.where((column >= 0) & (column < width), column, width)
        return taken.scatter_(2, column, True)[..., :-1]

    def _near(self, chunk: Chunk) -> _Part:
        at = slice(self.start[chunk.near_low], int(self.table.end[chunk.near_high - 1]))
        taken = self._taken(chunk.rows, chunk.near_low, chunk.near_high)
        taken = taken & self.limits.near[chunk.rows].unsqueeze(1)
        column = self.table.block_of[at].long() - chunk.near_low
        return _Part(self.k[:, at], self.v[:, at], None, taken[..., column].unsqueeze(2), at, True)

    def _tail(self, chunk: Chunk) -> _Part:
        limits, rows, r = self.limits, chunk.rows, self.spec.entries_per_block
        assert self.entries is not None
        block = torch.arange(chunk.low, chunk.high, device=self.q.device)
        above = block >= limits.tail_low[rows].unsqueeze(1)
        below = block < limits.tail_high[rows].unsqueeze(1)
        mask = (above & below)[None]
        if self.exact and self.selected.shape[2]:
            mask = mask & ~self._taken(rows, chunk.low, chunk.high)
        at = slice(chunk.low * r, chunk.high * r)
        keys, values, var = (x[:, at] for x in self.entries)
        return _Part(keys, values, var, mask.repeat_interleave(r, -1).unsqueeze(2), at)

    def logits(self, part: _Part, rows: slice) -> tuple[Tensor, Tensor | None]:
        """[Hk, n, G, L] logits, -inf where masked, and their variance terms (None: there are
        none).
        """
        q = self.q[:, rows]
        z = _product(q, part.keys).mul_(self.scale)
        kappa = None
        if part.var is not None:
            if self.spec.order == 2:
                kappa = _product(q.square().mul_(0.5 * self.scale**2), part.var).clamp_(
                    max=self.spec.max_variance
                )
                z += kappa
            z += math.log(self.spec.coarse_block_size)
            if self.bias is not None:
                z += self.bias[:, rows]
        return z.masked_fill_(~part.mask, _NEVER), kappa

    def choices(self) -> Iterator[tuple[int, slice, Tensor]]:
        """(head, tokens of a block, the far queries that selected it in rising order), blocks in
        rising order.
        """
        if not self.exact or not self.selected.shape[2] or self.limits.near.all():
            return
        for head in range(self.kv_heads):
            far = self.selected[head].masked_fill(self.limits.near.unsqueeze(1), -1)
            block, order = far.reshape(-1).sort(stable=True)
            queries = order // self.selected.shape[2]
            ids, counts = block.unique_consecutive(return_counts=True)
            at = 0
            for m, count in zip(ids.tolist(), counts.tolist(), strict=True):
                if m >= 0:
                    yield (
                        head,
                        slice(self.start[m], int(self.table.end[m])),
                        queries[at : at + count],
                    )
                at += count


def _product(rows: Tensor, keys: Tensor) -> Tensor:
    """[Hk, n, G, d] x [Hk, L, d] -> [Hk, n, G, L]."""
    product: Tensor = torch.matmul(rows.flatten(1, 2), keys.transpose(1, 2)).unflatten(
        1, rows.shape[1:3]
    )
    return product


def _gather(probs: Tensor, values: Tensor) -> Tensor:
    """[Hk, n, G, L] x [Hk, L, d] -> [Hk, n, G, d]."""
    gathered: Tensor = torch.matmul(probs.flatten(1, 2), values).unflatten(1, probs.shape[1:3])
    return gathered


def _collect(probs: Tensor, rows: Tensor) -> Tensor:
    """Sum over queries: [Hk, n, G, L] x [Hk, n, G, d] -> [Hk, L, d]."""
    return torch.matmul(probs.flatten(1, 2).transpose(1, 2), rows.flatten(1, 2))


def attend(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See interface.Backend.attend."""
    p, sink = Rows(problem), problem.sink
    out = torch.zeros_like(p.q)
    lse = p.q.new_full(p.q.shape[:3], _NEVER)
    tail, near = lse.clone(), lse.clone()

    # Everything that a chunk reads in one piece goes first, under one maximum per row, so that no
    # running softmax is needed here.
    for chunk in p.chunks():
        rows = chunk.rows
        parts = [(part, p.logits(part, rows)[0]) for part in p.parts(chunk)]
        if not parts:
            continue

        # rows without any entry have a maximum of -inf; any finite number does for them
        top = torch.stack([z.amax(-1) for _, z in parts]).amax(0)
        top = top.clamp_min(torch.finfo(p.q.dtype).min)
        total = torch.zeros_like(top)
        for part, z in parts:
            probs = z.sub_(top.unsqueeze(-1)).exp_()
            mass = probs.sum(-1)
            total += mass
            if part.var is not None:
                tail[:, rows] = mass.log() + top
            elif part.is_selected:
                near[:, rows] = mass.log() + top
            out[:, rows] += _gather(probs, part.values)
        lse[:, rows] = total.log() + top
        out[:, rows] /= torch.where(total > 0, total, 1.0).unsqueeze(-1)

    # Selected blocks that lie far apart follow, key-side. Each update is a running softmax: the
    # row's old share shrinks by exp(old - new).
    before = lse.clone()
    for head, tokens, everyone in p.choices():
        for some in everyone.split(_GATHERED):
            # Products of one shape: how a BLAS sums depends on it, and later queries must not show
            # in earlier outputs.
            queries = torch.cat([some, some[-1:].expand(_GATHERED - len(some))])

            z = torch.matmul(p.q[head, queries].flatten(0, 1), p.k[head, tokens].T).mul_(p.scale)
            z = z.view(_GATHERED, p.group, -1)
            old = lse[head, queries]
            new = torch.logaddexp(old, torch.logsumexp(z, -1))
            probs = z.sub_(new.unsqueeze(-1)).exp_()

            update = torch.matmul(probs.flatten(0, 1), p.v[head, tokens])
            update = update.view(_GATHERED, p.group, -1)
            update.add_(out[head, queries] * (old - new).exp_().unsqueeze(-1))
            out[head].index_copy_(0, some, update[: len(some)])
            lse[head].index_copy_(0, some, new[: len(some)])

    # The sink has a logit but no value: it widens the denominator and shrinks the rest.
    without_sink = lse
    if sink is not None:
        lse = torch.logaddexp(lse, sink.to(lse.dtype).view(p.kv_heads, 1, p.group))
        out *= (without_sink - lse).exp().unsqueeze(-1)

    # Rows without any entry would give -inf - -inf here. The far blocks have no mass of their own
    # on record: it is what the denominator grew by since `before`.
    some = without_sink > _NEVER
    tail_mass = torch.where(some, (tail - lse).exp(), 0.0)
    selected_mass = torch.where(
        some, (near - lse).exp() + (without_sink - lse).exp() - (before - lse).exp(), 0.0
    )
    return (
        p.by_token(out).to(problem.q.dtype),
        p.by_token(lse),
        p.by_token(tail_mass),
        p.by_token(selected_mass),
    )


def attend_backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    pooled: bool = True,
) -> tuple[Tensor | None, ...]:
    """See interface.Backend.attend_backward."""
    p, sink = Rows(problem), problem.sink
    table, spec = problem.table, problem.spec
    real = p.q.dtype

    # delta is what the softmax's own derivative takes off every logit: dz = p (dp - delta).
    do = p.rows(dout.to(real))
    delta = (do * p.rows(out.to(real))).sum(-1)
    if dlse is not None:
        delta -= p.rows(dlse.to(real))

    # a row without entries has lse = -inf; +inf makes all its probabilities zero
    lse = p.rows(lse.to(real))
    lse = lse.masked_fill(lse == _NEVER, float("inf"))

    dq, dk, dv = torch.zeros_like(p.q), torch.zeros_like(p.k), torch.zeros_like(p.v)
    dbias = None if p.bias is None else torch.zeros_like(p.bias)
    grads = None if p.entries is None else CoarseEntries(*(torch.zeros_like(x) for x in p.entries))

    # What a chunk reads in one piece. Probabilities come from lse again instead of being kept.
    for chunk in p.chunks():
        rows = chunk.rows
        for part in p.parts(chunk):
            probs, kappa = p.logits(part, rows)
            probs.sub_(lse[:, rows].unsqueeze(-1)).exp_()
            dz = _product(do[:, rows], part.values).sub_(delta[:, rows].unsqueeze(-1)).mul_(probs)
            dvalues = _collect(probs, do[:, rows])
            dq[:, rows] += _gather(dz, part.keys).mul_(p.scale)
            dkeys = _collect(dz, p.q[:, rows]).mul_(p.scale)

            # Tokens are done here; what reached coarse entries is collected until the end.
            if part.var is None:
                dk[:, part.at] += dkeys
                dv[:, part.at] += dvalues
                continue
            assert grads is not None
            grads.key_mean[:, part.at] += dkeys
            grads.value_mean[:, part.at] += dvalues
            if dbias is not None:
                dbias[:, rows] += dz.sum(-1, keepdim=True)

            # The variance term adds 0.5 scale^2 q^2 . var to a logit, and nothing where it was cut
            # at max_variance.
            if kappa is not None:
                dz *= kappa < spec.max_variance
                dq[:, rows] += _gather(dz, part.var).mul_(p.scale**2).mul_(p.q[:, rows])
                grads.key_var[:, part.at] += _collect(dz, p.q[:, rows].square()).mul_(
                    0.5 * p.scale**2
                )

    # Selected blocks that lie far apart, in the order of the forward pass.
    for head, tokens, queries in p.choices():
        q_rows, d_rows = p.q[head, queries].flatten(0, 1), do[head, queries].flatten(0, 1)
        keys, values = p.k[head, tokens], p.v[head, tokens]
        logits = torch.matmul(q_rows, keys.T).mul_(p.scale)
        probs = logits.sub_(lse[head, queries].view(-1, 1)).exp_()
        dz = torch.matmul(d_rows, values.T).sub_(delta[head, queries].view(-1, 1)).mul_(probs)
        dv[head, tokens] += torch.matmul(probs.T, d_rows)
        dk[head, tokens] += torch.matmul(dz.T, q_rows).mul_(p.scale)
        dq[head].index_add_(
            0, queries, torch.matmul(dz, keys).mul_(p.scale).view(len(queries), p.group, -1)
        )

    # From the entries back to the tokens they were pooled from.
    if pooled and p.entries is not None and grads is not None:
        complete, r = complete_blocks(table, spec), spec.entries_per_block
        mean, *dentries = (
            x.unflatten(1, (-1, r))[:, complete].flatten(1, 2) for x in (p.entries.key_mean, *grads)
        )
        pool_spans_backward(
            problem.k,
            token_spans(table.start[complete], spec.block_size),
            spec.coarse_block_size,
            mean,
            CoarseEntries(*dentries),
            dk,
            dv,
        )

    # The sink has no value, so that only -p delta remains of its dz.
    dsink = None
    if sink is not None:
        sinks = sink.to(real).view(p.kv_heads, 1, p.group)
        dsink = -((sinks - lse).exp() * delta).sum(1).view(-1).to(sink.dtype)
    return (
        p.by_token(dq).to(problem.q.dtype),
        dk.transpose(0, 1).to(problem.k.dtype),
        dv.transpose(0, 1).to(problem.v.dtype),
        None if dbias is None else p.by_token(dbias.squeeze(-1)),
        dsink,
        *(() if pooled or grads is None else grads),
    )


def _ranked_rows(
    q: Tensor,
    entries: CoarseEntries,
    table: BlockTable,
    spec: SparseAttentionSpec,
    queries: Tensor | None,
) -> Rows:
    """Queries [n, H, d] against all entries of their past. Keys and values of tokens have no part
    in it; slices of the queries stand for them.
    """
    kv_heads = entries.key_mean.shape[0]
    return Rows(
        Problem(
            q=q,
            k=q[:, :kv_heads],
            v=q[:, :kv_heads],
            bias=None,
            sink=None,
            selected=q.new_empty(kv_heads, len(q), 0),
            entries=entries,
            table=table,
            spec=spec,
            exact=False,
            coarse=True,
            queries=queries,
        )
    )


def _estimated_lse(p: Rows, coarser: Rows, chunk: Chunk, z: Tensor) -> Tensor:
    """[Hk, n, G, 1]: log-sum-exp over the past of a chunk's queries, whole super-blocks of it being
    one entry each. coarser: the same queries against super-blocks; z: [Hk, n, G, (high - low) * r]
    logits of the chunk's blocks.
    """
    rows = chunk.rows
    limits = coarser.limits
    whole = (limits.tail_high[rows] - limits.tail_low[rows]) * p.spec.fanout

    # Blocks behind the last whole super-block count by their own entries.
    block = torch.arange(chunk.low, chunk.high, device=z.device)
    merged = block < (p.limits.tail_low[rows] + whole).unsqueeze(1)
    merged = merged.repeat_interleave(p.spec.entries_per_block, 1)[None, :, None]
    logits = [z.masked_fill(merged, _NEVER)]

    above = _chunk(limits, chunk.begin, chunk.end)
    if above.high > above.low:
        logits.append(coarser.logits(coarser._tail(above), rows)[0])
    return torch.logsumexp(torch.cat(logits, -1), -1, keepdim=True)


def rank(
    q: Tensor,
    entries: CoarseEntries,
    table: BlockTable,
    spec: SparseAttentionSpec,
    hashed: Tensor | None,
    noise: SelectionNoise,
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See interface.Backend.rank."""
    num_queries, kv_heads = len(q), entries.key_mean.shape[0]
    p = _ranked_rows(q, entries, table, spec, queries)
    above = super_blocks(entries, table, spec)
    coarser = None if above is None else _ranked_rows(q, *above, queries)

    keys = torch.full((kv_heads, num_queries, spec.top_k), -1, dtype=torch.int64, device=q.device)
    candidate_mass = torch.zeros(kv_heads, num_queries, device=q.device)
    low, high = (x[p.own].long() for x in (table.sink_end, table.local_start))
    first_head, num_heads = drawing_heads(noise, kv_heads)
    head = first_head + torch.arange(kv_heads, device=q.device).view(-1, 1, 1)

    for chunk in p.chunks():
        rows = chunk.rows
        if not (high[rows] > low[rows]).any():
            continue
        part = p._tail(chunk)
        z, kappa = p.logits(part, rows)

        # The estimate normalises over every past entry; candidates are only part of them.
        block = torch.arange(chunk.low, chunk.high, device=q.device)
        candidate = (block >= low[rows].unsqueeze(1)) & (block < high[rows].unsqueeze(1))
        if coarser is None:
            probs = (z - torch.logsumexp(z, -1, keepdim=True)).exp()
        else:
            probs = shares(z, _estimated_lse(p, coarser, chunk, z))
        probs = torch.where(part.mask, probs, 0.0)
        values, mass = rank_values(z, kappa, probs, spec)
        candidate_mass[:, rows] = torch.where(candidate, mass, 0.0).sum(-1)

        # Counters start at the document's first block: packing does not change what is drawn.
        if noise.temperature > 0:
            assert hashed is not None
            first = table.first[p.own[rows]].long().unsqueeze(1)
            counter = selection_counter(block - first, head, num_heads)
            values = values + noise.temperature * gumbel(hashed[rows].unsqueeze(1), counter)

        # Score and block id are one integer, so that ties fall to the lower id on any device.
        packed = torch.where(candidate, rank_keys(values, block), -1)
        found = min(spec.top_k, len(block))
        keys[:, rows, :found] = packed.topk(found, -1).values
    return keys, candidate_mass


def decode(problem: DecodeProblem) -> tuple[Tensor, Tensor]:
    """See interface.decode."""
    q, keys, values, entries, length, spec, bias, sink, exact, coarse, selected = problem
    num_rows, heads, dim = q.shape
    kv_heads = keys.shape[2]
    size = spec.block_size
    r = spec.entries_per_block
    real = real_dtype(q.dtype)
    rows = q.to(real).view(num_rows, kv_heads, heads // kv_heads, dim)
    scale = dim**-0.5
    own, sink_end, local = decode_limits(length, spec)
    parts: list[tuple[Tensor, Tensor]] = []  # logits [N, Hk, G, L], values [N, Hk, L, d]

    def add(k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        z = torch.matmul(rows, k.transpose(2, 3)) * scale
        parts.append((z if mask is None else z.masked_fill_(~mask, _NEVER), v))

    def add_tokens(begin: int, end: int) -> None:
        add(*(x[:, begin:end].to(real).transpose(1, 2) for x in (keys, values)))

    if exact:
        # Where the first blocks reach the window, one product covers both: none counts twice.
        add_tokens(local * size if sink_end < local else 0, length)
        if sink_end < local:
            add_tokens(0, sink_end * size)

    # Coarse logits serve the choice of blocks as well, so they are due even without a tail.
    low, high = (sink_end, local) if exact else (0, own)
    wants_tail = spec.has_tail(exact, coarse)
    if low < high and (wants_tail or spec.top_k):
        mean, value, var = (x[:, :, : own * r].to(real) for x in entries)
        c = torch.matmul(rows, mean.transpose(2, 3)) * scale + math.log(spec.coarse_block_size)
        kappa = None
        if spec.order == 2:
            kappa = torch.matmul(rows.square() * (0.5 * scale**2), var.transpose(2, 3)).clamp_(
                max=spec.max_variance
            )
            c += kappa

        block = torch.arange(own, device=q.device)
        tail = ((block >= low) & (block < high)).expand(num_rows, kv_heads, -1)

        # A chosen block takes part by its tokens and leaves the tail. Slots without a block go to a
        # column behind the last one, which is cut off.
        if exact and spec.top_k:
            if selected is None:
                denominator = None
                if spec.rank_lse == "super":
                    denominator = decode_denominator(rows, entries, c, own, spec)
                chosen = choose_blocks(
                    c, kappa, block, sink_end, local, spec, denominator
                )  # [N, Hk, K]
            else:
                chosen = selected.long()
            taken = torch.zeros(num_rows, kv_heads, own + 1, dtype=torch.bool, device=q.device)
            tail = tail & ~taken.scatter_(2, torch.where(chosen >= 0, chosen, own), True)[..., :-1]
            at = chosen.clamp_min(0).unsqueeze(-1) * size + torch.arange(size, device=q.device)
            at = at.flatten(2)
            row = torch.arange(num_rows, device=q.device).view(-1, 1, 1)
            head = torch.arange(kv_heads, device=q.device).view(1, -1, 1)
            add(
                keys[row, at, head].to(real),
                values[row, at, head].to(real),
                (chosen >= 0).repeat_interleave(size, -1).unsqueeze(2),
            )

        # The bias comes after the choice: it is no part of the ranking.
        if wants_tail:
            if bias is not None:
                c = c + bias.to(real).view(num_rows, kv_heads, -1, 1)
            in_tail = tail.repeat_interleave(r, -1).unsqueeze(2)
            parts.append((c.masked_fill(~in_tail, _NEVER), value))

    logits = [z for z, _ in parts]

    # the coarse branch alone, before the first complete block
    if not logits and sink is None:
        return torch.zeros_like(q), rows.new_full((num_rows, heads), _NEVER)

    if sink is not None:
        logits.append(sink.to(real).view(1, kv_heads, -1, 1).expand(num_rows, -1, -1, -1))
    lse = torch.logsumexp(torch.cat(logits, -1), -1, keepdim=True)
    out = torch.zeros_like(rows)
    for z, v in parts:
        out += torch.matmul((z - lse).exp(), v)
    return out.reshape(num_rows, heads, dim).to(q.dtype), lse.reshape(num_rows, heads)


def decode_denominator(
    rows: Tensor, entries: CoarseEntries, logits: Tensor, own: int, spec: SparseAttentionSpec
) -> Tensor:
    """[N, Hk, G, 1]: the estimate with rank_lse="super" of the log-sum-exp over `own` past blocks.

    rows: [N, Hk, G, d] queries; entries: [N, Hk, at least own * r, d]; logits: [N, Hk, G, own * r].
    """
    number = spec.fanout * spec.entries_per_block
    whole = own // spec.fanout
    found = logits[..., whole * number :]
    if whole:
        mean, var = (x[:, :, : whole * number] for x in (entries.key_mean, entries.key_var))
        merged = super_logits(rows, mean, var, entries.key_mean.dtype, spec)
        found = torch.cat([merged, found], -1)
    return torch.logsumexp(found, -1, keepdim=True)


def super_logits(
    rows: Tensor, mean: Tensor, var: Tensor, dtype: torch.dtype, spec: SparseAttentionSpec
) -> Tensor:
    """[N, Hk, G, S] of queries [N, Hk, G, d] with super-blocks, of whose entries the means and
    variances [N, Hk, S * fanout * r, d] are given. dtype: that super-blocks are rounded to, as
    super_blocks does it.
    """
    scale = rows.shape[-1] ** -0.5
    mean, var = (x.to(dtype) for x in merge_keys(mean, var, spec.fanout * spec.entries_per_block))
    z: Tensor = torch.matmul(rows, mean.to(rows.dtype).transpose(2, 3)) * scale
    if spec.order == 2:
        kappa = torch.matmul(rows.square() * (0.5 * scale**2), var.to(rows.dtype).transpose(2, 3))
        z = z + kappa.clamp_max(spec.max_variance)
    return z + math.log(spec.super_block_size)


def decode_limits(length: int, spec: SparseAttentionSpec) -> tuple[int, int, int]:
    """(own block, sink_end, local_start) of the last of `length` tokens of a document; see
    BlockTable.
    """
    own = (length - 1) // spec.block_size
    dense = own * spec.block_size < spec.min_sparse_length
    local = 0 if dense else max(0, own - spec.num_local_blocks + 1)
    return own, min(spec.num_sink_blocks, local), local
