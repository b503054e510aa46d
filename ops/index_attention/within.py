"""An index inside sparse attention (ops/sparse_attention): it chooses among that op's candidates,
and learns from that op's own softmax, in which what was not chosen stands as pooled entries.

Shape letters: T tokens, H heads, Hk key/value heads, G = H / Hk, d head dimension, w width of the
index, b rows, Q queries of a tile, M blocks, K selected blocks, B block_size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.gather_attention import Gather, pick_backend
from ops.index_attention.gathered import teach_all
from ops.index_attention.spec import IndexSpec
from ops.index_attention.tile import (
    block_scores,
    blocks_mask,
    divergence,
    own_graph,
    real_dtype,
)
from ops.sparse_attention.entries import CoarseEntries
from ops.sparse_attention.ranking import block_of_key, rank_keys
from ops.sparse_attention.spec import SparseAttentionSpec

NEVER = float("-inf")
TILE_VALUES = 2**22
"""Numbers of a tile's largest tensors, which bounds what is needed beside the inputs."""


class Teacher(NamedTuple):
    """What the op made of the tokens, from which the index learns; none of it gets a gradient."""

    q: Tensor
    """[T, H, d]."""
    k: Tensor
    """[T, Hk, d]."""
    entries: CoarseEntries
    """[Hk, M * r, d] each, as the op had them, of the blocks of blocks.block_table."""
    selected: Tensor
    """[Hk, T, K] block ids that were seen by their tokens, -1 for none, in any order."""
    lse: Tensor
    """[T, H], logarithm of the denominator of the op's softmax."""
    bias: Tensor | None
    """[T, H], what was added to the logits of entries."""


def rule_of(spec: SparseAttentionSpec) -> IndexSpec:
    """The index inside is MSA's: a query for each key/value head, a key for each token, and a block
    is worth the largest product of a token in it.
    """
    return IndexSpec("msa", spec.block_size, max(1, spec.top_k))


def candidate_range(position: Tensor, spec: SparseAttentionSpec) -> tuple[Tensor, Tensor]:
    """(sink_end, local_start) of queries at `position` [...] int64 in their documents: blocks
    between them are candidates (BlockTable).
    """
    own = position // spec.block_size
    local = torch.where(
        own * spec.block_size < spec.min_sparse_length,
        0,
        (own - spec.num_local_blocks + 1).clamp_min(0),
    )
    return local.clamp_max(spec.num_sink_blocks), local


def candidates_of(position: Tensor, num_blocks: int, spec: SparseAttentionSpec) -> Tensor:
    """[..., num_blocks] bool: which of a document's blocks a query at `position` [...] may
    choose.
    """
    block = torch.arange(num_blocks, device=position.device)
    low, high = (x.unsqueeze(-1) for x in candidate_range(position, spec))
    return (block >= low) & (block < high)


def best_blocks(scores: Tensor, candidates: Tensor, top_k: int) -> Tensor:
    """The top_k best candidates [..., top_k] int64 in rising order, then -1; equal scores (in fp32)
    go to the lower block. scores: [..., M]; candidates: likewise, bool.
    """
    block = torch.arange(scores.shape[-1], device=scores.device)
    # plus zero there is one zero only
    keys = rank_keys(scores.detach().float() + 0.0, block.expand_as(scores))
    found = keys.masked_fill(~candidates, -1).topk(min(top_k, keys.shape[-1]), -1).values
    far = torch.iinfo(torch.int64).max
    chosen = block_of_key(found)
    rising = torch.where(chosen < 0, far, chosen).sort(-1).values
    missing = rising.new_full((*rising.shape[:-1], top_k - rising.shape[-1]), far)
    rising = torch.cat((rising, missing), -1)
    return torch.where(rising == far, -1, rising)


def select_blocks(
    queries: Tensor,
    keys: Tensor,
    bounds: Sequence[int],
    spec: SparseAttentionSpec,
    backend: str | None = None,
) -> Tensor:
    """The blocks that the index chooses for packed documents, as ops.sparse_attention takes them.

    Args:
        queries: [T, Hk, w]; keys: [T, w]; rotary positions applied.
        bounds: where documents begin, and T.
        backend: "triton" or "torch"; None: see ops.gather_attention.pick_backend.

    Returns:
        [Hk, T, top_k] int32 in rising order, then -1. No gradient.
    """
    width = queries.shape[2]
    taken = pick_backend(backend, queries.device, queries.dtype, None, spec.block_size, width)
    best = _best_by_kernels if taken == "triton" else _best_of
    selected = torch.full(
        (queries.shape[1], len(queries), spec.top_k), -1, dtype=torch.int32, device=queries.device
    )
    with torch.no_grad():
        for tile in _tiles(bounds, spec, queries.shape[1], taken == "triton"):
            if tile.num_blocks:
                chosen = best(queries[tile.rows], keys[tile.tokens(spec)], tile, spec)
                chosen = torch.where(chosen < 0, -1, chosen + tile.first_block)
                selected[:, tile.rows, : chosen.shape[-1]] = chosen.int()
    return selected


def _best_of(queries: Tensor, keys: Tensor, tile: _Tile, spec: SparseAttentionSpec) -> Tensor:
    """[Hk, Q, K] blocks of the document in rising order, then -1."""
    scores = _scores(queries, keys, tile, spec)
    return best_blocks(scores, tile.candidates(spec, queries), spec.top_k)


def _best_by_kernels(
    queries: Tensor, keys: Tensor, tile: _Tile, spec: SparseAttentionSpec
) -> Tensor:
    """As _best_of, int32."""
    from ops.index_attention.triton_backend import IndexTile, block_scores, largest

    first_position = tile.start - tile.begin
    given = queries.contiguous(), keys.to(queries.dtype).contiguous(), None
    scores = block_scores(IndexTile(*given, first_position, rule_of(spec))).values
    return largest(scores.masked_fill_(~tile.candidates(spec, queries), NEVER), spec.top_k)


@torch.no_grad()
def select_held(
    queries: Tensor, keys: Tensor, position: Tensor, spec: SparseAttentionSpec
) -> Tensor:
    """What select_blocks gives for tokens of rows whose index keys a cache holds, up to rounding.

    Args:
        queries: [b, S, Hk, w]; keys: [b, N, w] of each row's document, its complete blocks at
            least, and after them anything finite. position: [b, S] int64.

    Returns:
        [b, S, Hk, top_k] int64 places of blocks in their documents in rising order, then -1.
    """
    real, number = real_dtype(queries.dtype), keys.shape[1] // spec.block_size
    if not number or not spec.top_k:
        shape = (*queries.shape[:3], spec.top_k)
        return torch.full(shape, -1, dtype=torch.int64, device=queries.device)
    held = keys[:, : number * spec.block_size].to(real)
    scores = block_scores(queries.to(real), held, None, position, rule_of(spec))
    candidates = candidates_of(position, number, spec).unsqueeze(1).expand_as(scores)
    return best_blocks(scores, candidates, spec.top_k).transpose(1, 2)


def teach_index(
    queries: Tensor,
    keys: Tensor,
    teacher: Teacher,
    bounds: Sequence[int],
    spec: SparseAttentionSpec,
    token_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL divergence in nats of the index's softmax over the candidates from the masses that the
    op's softmax gave them: the exact mass of selected blocks, the estimated mass of the others. So
    every candidate has a teacher, and no pass over all tokens is due.

    Args:
        queries: [T, Hk, w]; keys: [T, w], of the index. token_mask: [T] bool, tokens that count;
            None: all.
        backend: "triton" or "torch"; None: see ops.gather_attention.pick_backend. Kernels take
            keys and teacher in the dtype of `queries`.

    Returns:
        [] fp32 (fp64), mean over key/value heads, summed over the tokens that count; its gradient
        reaches queries and keys alone. Deterministic.
    """
    taken = pick_backend(
        backend,
        queries.device,
        queries.dtype,
        teacher.q.shape[2],
        spec.block_size,
        queries.shape[2],
        "what teaches an index inside sparse attention",
    )
    found: Tensor = _Teach.apply(  # type: ignore[no-untyped-call]
        queries, keys, teacher, token_mask, tuple(bounds), spec, taken == "triton"
    )
    return found


class _Tile(NamedTuple):
    """A run of queries of one document."""

    begin: int
    """The document's first token."""
    start: int
    stop: int
    first_block: int
    """The document's first block."""
    num_blocks: int
    """Blocks of the document up to the last candidate of the run, from its first one on."""

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def tokens(self, spec: SparseAttentionSpec) -> slice:
        """Of these blocks."""
        return slice(self.begin, self.begin + self.num_blocks * spec.block_size)

    def position(self, like: Tensor) -> Tensor:
        """[Q] int64."""
        return torch.arange(self.start - self.begin, self.stop - self.begin, device=like.device)

    def candidates(self, spec: SparseAttentionSpec, like: Tensor) -> Tensor:
        """[Q, num_blocks] bool."""
        return candidates_of(self.position(like), self.num_blocks, spec)


def _tiles(
    bounds: Sequence[int], spec: SparseAttentionSpec, by_key: int, kernels: bool = False
) -> Iterator[_Tile]:
    """by_key: numbers of a query for a key. A tile's size follows from its place alone, so that
    later tokens cannot change it.
    """
    size_of: Callable[[int, int], int] = _tile_queries
    if kernels:
        from ops.index_attention.triton_backend import tile_queries

        size_of = tile_queries
    first_block = 0
    for begin, end in itertools.pairwise(bounds):
        at = begin
        while at < end:
            stop = min(at + size_of(at - begin + 1, by_key), end)
            _, local = candidate_range(torch.tensor([at - begin, stop - 1 - begin]), spec)
            yield _Tile(begin, at, stop, first_block, int(local.max()))
            at = stop
        first_block += -(-(end - begin) // spec.block_size)


def _tile_queries(num_seen: int, by_key: int) -> int:
    """How many queries go in a tile, the first of which sees so many keys."""
    return max(1, min(256, TILE_VALUES // (by_key * num_seen)))


def _scores(queries: Tensor, keys: Tensor, tile: _Tile, spec: SparseAttentionSpec) -> Tensor:
    """[Hk, Q, num_blocks], of queries [Q, Hk, w] and keys [num_blocks * B, w]."""
    real = real_dtype(queries.dtype)
    position = tile.position(queries).unsqueeze(0)
    scores = block_scores(
        queries.to(real).unsqueeze(0), keys.to(real).unsqueeze(0), None, position, rule_of(spec)
    )
    return scores[0]


def _masses(teacher: Teacher, tile: _Tile, candidates: Tensor, spec: SparseAttentionSpec) -> Tensor:
    """[Hk, Q, num_blocks]: mass of the op's softmax on every candidate, summed over the group."""
    q, k, entries, selected, lse, bias = teacher
    real, kv_heads, r = real_dtype(q.dtype), k.shape[1], spec.entries_per_block
    scale = q.shape[-1] ** -0.5

    def grouped(x: Tensor) -> Tensor:
        """[Q, H, ...] -> [Hk, G, Q, ...]."""
        rows: Tensor = x[tile.rows].to(real).unflatten(1, (kv_heads, -1))
        return rows.movedim(0, 2)

    rows, norm = grouped(q), grouped(lse).unsqueeze(-1)
    at = slice(tile.first_block * r, (tile.first_block + tile.num_blocks) * r)
    mean, _, var = (x[:, at].to(real).unsqueeze(1) for x in entries)
    c = torch.matmul(rows, mean.transpose(2, 3)) * scale + math.log(spec.coarse_block_size)
    if spec.order == 2:
        kappa = torch.matmul(rows.square() * (0.5 * scale**2), var.transpose(2, 3))
        c = c + kappa.clamp_max(spec.max_variance)
    if bias is not None:
        c = c + grouped(bias).unsqueeze(-1)
    chosen = selected[:, tile.rows].long() - tile.first_block
    taken = blocks_mask(torch.where(chosen < tile.num_blocks, chosen, -1), tile.num_blocks)
    # only what stands in the tail has a mass below one by its entry
    in_tail = (candidates & ~taken).repeat_interleave(r, -1).unsqueeze(1)
    mass = (c - norm).masked_fill(~in_tail, NEVER).exp().sum(1)
    by_block: Tensor = mass.unflatten(-1, (-1, r)).sum(-1)

    # Exact masses, key-side: a product of all queries with the blocks that any of them selected.
    for head in range(kv_heads):
        blocks = taken[head].any(0).nonzero()[:, 0]
        first = tile.begin + blocks * spec.block_size
        tokens = first.unsqueeze(1) + torch.arange(spec.block_size, device=q.device)
        z = torch.matmul(rows[head], k[tokens.flatten(), head].to(real).T) * scale
        seen = taken[head][:, blocks].repeat_interleave(spec.block_size, 1)
        exact = (z - norm[head]).masked_fill(~seen, NEVER).exp().sum(0)
        by_block[head][:, blocks] += exact.unflatten(-1, (-1, spec.block_size)).sum(-1)
    return by_block


class _Teach(torch.autograd.Function):
    """apply(queries, keys, teacher, token_mask, bounds, spec, kernels) -> []. The gradient is known
    as soon as the value is, but for a factor: it is computed with it, so that the masses of a tile
    are made once.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        queries, keys, teacher, token_mask, bounds, spec, kernels = given
        real = real_dtype(queries.dtype)
        learns = any(ctx.needs_input_grad[:2])
        grads = [torch.zeros_like(x, dtype=real) for x in (queries, keys) if learns]
        teach = _taught_by_kernels if kernels else _taught
        total = teach(queries, keys, teacher, token_mask, bounds, spec, grads)
        ctx.save_for_backward(*grads)
        ctx.dtypes = queries.dtype, keys.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = (
            (g * grads[0]).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*found, None, None, None, None, None)


def _taught(
    queries: Tensor,
    keys: Tensor,
    teacher: Teacher,
    token_mask: Tensor | None,
    bounds: Sequence[int],
    spec: SparseAttentionSpec,
    grads: list[Tensor],
) -> Tensor:
    """[], what teach_index gives. grads: of queries and keys, to which theirs are added; none where
    nothing learns.
    """
    real, learns = real_dtype(queries.dtype), bool(grads)
    total: Tensor = queries.new_zeros((), dtype=real)
    by_key = queries.shape[1] + teacher.q.shape[1]
    for tile in _tiles(bounds, spec, by_key):
        if not tile.num_blocks:
            continue
        parts = queries[tile.rows].to(real), keys[tile.tokens(spec)].to(real)
        if learns:
            parts = parts[0].detach().requires_grad_(), parts[1].detach().requires_grad_()
        candidates = tile.candidates(spec, queries)
        masses = _masses(teacher, tile, candidates, spec)
        with own_graph(learns):
            scores = _scores(*parts, tile, spec)
            among = candidates.expand_as(scores)
            by_query = divergence(scores, masses, among).mean(0)
            if token_mask is not None:
                by_query = by_query * token_mask[tile.rows].to(real)
            share = by_query.sum()
        total += share.detach()
        if learns:
            dqueries, dkeys = torch.autograd.grad(share, parts)
            grads[0][tile.rows] += dqueries
            grads[1][tile.tokens(spec)] += dkeys
    return total


def _taught_by_kernels(
    queries: Tensor,
    keys: Tensor,
    teacher: Teacher,
    token_mask: Tensor | None,
    bounds: Sequence[int],
    spec: SparseAttentionSpec,
    grads: list[Tensor],
) -> Tensor:
    """As _taught."""
    from ops.index_attention.triton_backend import Gradients, IndexTile, block_scores

    teacher = _for_kernels(teacher, queries.dtype)
    queries, keys = queries.contiguous(), keys.to(queries.dtype).contiguous()
    weights = None if token_mask is None else token_mask.float()
    total: Tensor = queries.new_zeros((), dtype=torch.float32)
    sinks = spec.num_sink_blocks
    for tile in _tiles(bounds, spec, queries.shape[1], True):
        number = tile.num_blocks - sinks
        if number <= 0:
            continue
        # No query has the first blocks as candidates, so that what the index sees begins behind
        # them: a query's candidates are the first blocks of that.
        low, high = candidate_range(tile.position(queries), spec)
        candidates = (high - low).int()
        begin = tile.begin + sinks * spec.block_size
        tokens = slice(begin, tile.tokens(spec).stop)
        index = IndexTile(queries[tile.rows], keys[tokens], None, tile.start - begin, rule_of(spec))
        into = Gradients(grads[0][tile.rows], grads[1][tokens], None) if grads else None
        scores = block_scores(index, with_best=bool(grads))
        masses = _masses_by_kernels(teacher, tile, candidates, spec)
        of_tile = None if weights is None else weights[tile.rows]
        total += teach_all(index, scores, masses, candidates, of_tile, into)
    return total


def _for_kernels(teacher: Teacher, dtype: torch.dtype) -> Teacher:
    q, k, entries, selected, lse, bias = teacher
    return Teacher(
        q.to(dtype).contiguous(),
        k.to(dtype).contiguous(),
        CoarseEntries(*(x.to(dtype).contiguous() for x in entries)),
        selected,
        lse.float().contiguous(),
        None if bias is None else bias.float().contiguous(),
    )


def _masses_by_kernels(
    teacher: Teacher, tile: _Tile, candidates: Tensor, spec: SparseAttentionSpec
) -> Tensor:
    """[Hk, Q, more than the candidates] fp32: what _masses gives, from the first block on that may
    be one. teacher: as _for_kernels gives it; candidates: [Q] int32, how many each query has.
    """
    from ops.gather_attention import triton_backend as gathering
    from ops.index_attention.triton_backend import block_masses

    q, k, entries, selected, lse, bias = teacher
    sinks, r = spec.num_sink_blocks, spec.entries_per_block
    first, number = tile.first_block + sinks, tile.num_blocks - sinks
    masses = block_masses(
        q,
        entries.key_mean,
        lse,
        candidates * r,
        tile.start,
        first * r,
        number // 16 * 16 + 16,
        r,
        variances=entries.key_var if spec.order == 2 else None,
        max_variance=spec.max_variance,
        num_pooled=spec.coarse_block_size,
        bias=bias,
    )
    if not selected.shape[-1]:
        return masses

    # Selected blocks have exact masses instead. What is not there goes into a column behind the
    # blocks, which nobody reads.
    chosen = selected[:, tile.rows] - first
    chosen = torch.where((chosen < 0) | (chosen >= number), -1, chosen)
    chosen = chosen.sort(-1, descending=True).values.int()
    begin = tile.begin + sinks * spec.block_size
    gather = Gather(
        q[tile.rows],
        k,
        None,
        chosen,
        torch.full_like(candidates, begin),
        spec.block_size,
        tile.start,
    )
    exact = gathering.masses(gather, lse[tile.rows], 0, len(candidates))
    return masses.scatter_(-1, torch.where(chosen < 0, number, chosen).long(), exact)
