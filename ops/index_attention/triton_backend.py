"""Starts the kernels of an index's scores, of the choice among them, of what teaches it where all
blocks do, and of the scores' gradients. Nothing here waits for the device.

Shape letters: Q queries of a tile, n keys, C choices, I index heads, w their width, M blocks, K
blocks that are chosen; of sparse attention T tokens, H heads, Hk key/value heads, d head dimension,
E entries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ops.compile.launch import launch
from ops.index_attention.kernels import configs
from ops.index_attention.kernels.grads import index_key_grad_kernel, index_query_grad_kernel
from ops.index_attention.kernels.largest import largest_kernel
from ops.index_attention.kernels.masses import index_divergence_kernel, index_masses_kernel
from ops.index_attention.kernels.scores import held_scores_kernel, index_scores_kernel
from ops.index_attention.spec import IndexSpec
from ops.index_attention.tile import ranked
from ops.sparse_attention.kernels.configs import next_power_of_two

CHUNK_VALUES = 2**24
"""Scores of a tile of queries, which bounds what is needed beside inputs and outputs."""
MOST_QUERIES = 1024


class IndexTile(NamedTuple):
    """Queries of one document that follow each other, and the index keys that they may see; in
    fp32, bf16 or fp16.
    """

    queries: Tensor
    """[Q, I, w]."""
    keys: Tensor
    """[n, w] of the tokens, or with rule=qsa of the complete blocks, from the document's first."""
    weights: Tensor | None
    """[Q, I] with weighted heads."""
    first_position: int
    """Of the first query in its document."""
    spec: IndexSpec

    @property
    def choices(self) -> int:
        return self.queries.shape[1] if self.spec.by_head else 1

    @property
    def tokens_of_key(self) -> int:
        return self.spec.block_size if self.spec.pools_keys else 1


class Scores(NamedTuple):
    values: Tensor
    """[C, Q, M] fp32, -inf of blocks that a query may not choose."""
    best: Tensor | None
    """[C, Q, M] int32: with rule=msa the key that gave a block its score, the lowest of equal ones;
    else, and where it was not asked for, None.
    """


class Gradients(NamedTuple):
    """Of what IndexTile has, fp32."""

    queries: Tensor
    keys: Tensor
    weights: Tensor | None


def tile_queries(num_seen: int, by_key: int) -> int:
    """How many queries go in a tile, the first of which sees so many keys, with by_key scores of a
    query for each.
    """
    return max(1, min(MOST_QUERIES, CHUNK_VALUES // (by_key * max(1, num_seen))))


def block_scores(tile: IndexTile, with_best: bool = False) -> Scores:
    """What tile.block_scores gives, by sums in the kernel's order: products of a head in that of
    its dimensions, heads in theirs, in fp32 throughout. A score hangs on its query and key alone.
    """
    queries, keys, weights, first_position, spec = tile
    num_queries, heads, width = queries.shape
    span = spec.block_size if spec.rule == "msa" else 1
    number, choices = -(-len(keys) // span), tile.choices
    values = torch.empty(choices, num_queries, number, dtype=torch.float32, device=queries.device)
    with_best = with_best and spec.rule == "msa"
    best = torch.empty_like(values, dtype=torch.int32) if with_best else None
    config = configs.scores_config(width, queries.dtype)
    blocks = max(1, config.columns // span)
    launch(
        index_scores_kernel,
        (-(-number // blocks), -(-num_queries // config.rows), choices),
        queries,
        keys,
        weights,
        values,
        best,
        num_queries,
        len(keys),
        number,
        heads,
        first_position,
        tile.tokens_of_key,
        _scale(width, heads, spec),
        BY_HEAD=spec.by_head,
        SPAN=span,
        QUERIES=config.rows,
        KEYS=config.columns,
        WIDTH=width,
        DIM=configs.padded(width),
        **config.options,
    )
    return Scores(values, best)


def held_scores(
    queries: Tensor,
    keys: Tensor,
    weights: Tensor | None,
    rows: Tensor,
    position: Tensor,
    spec: IndexSpec,
) -> Tensor:
    """What tile.block_scores gives, [b, C, S, M] fp32, of keys that are read where they are held.

    Args:
        queries: [b, S, I, w]; weights: [b, S, I] with weighted heads; position: [b, S] int64.
        keys: [pool, w], contiguous, in the dtype of the queries; rows: [b, n] int64, where in the
            pool the keys of a row's document are.
    """
    batch, new, heads, width = queries.shape
    span = spec.block_size if spec.rule == "msa" else 1
    number, choices = -(-rows.shape[1] // span), heads if spec.by_head else 1
    values = torch.empty(batch, choices, new, number, dtype=torch.float32, device=queries.device)
    config = configs.held_config(width, heads, queries.dtype, spec.by_head)
    launch(
        held_scores_kernel,
        (-(-number // max(1, config.columns // span)), batch * new),
        queries.contiguous(),
        keys,
        rows.contiguous(),
        None if weights is None else weights.contiguous(),
        position.contiguous(),
        values,
        new,
        rows.shape[1],
        number,
        heads,
        spec.block_size if spec.pools_keys else 1,
        _scale(width, heads, spec),
        BY_HEAD=spec.by_head,
        SPAN=span,
        HEADS=config.rows,
        KEYS=config.columns,
        WIDTH=width,
        DIM=configs.padded(width),
        **config.options,
    )
    return values


def largest(values: Tensor, number: int) -> Tensor:
    """Places of the largest values of each row, [..., min(number, N)] int32 in rising order, then
    -1; equal values from the lower place on, -inf never. values: [..., N] fp32.
    """
    number = min(number, values.shape[-1])
    chosen = values.new_full((*values.shape[:-1], number), -1, dtype=torch.int32)
    if number:
        launch(
            largest_kernel,
            (chosen.numel() // number,),
            values.contiguous(),
            chosen,
            values.shape[-1],
            number,
            CHUNK=configs.CHUNK,
            num_warps=4,
        )
    return chosen


def choose(scores: Tensor, position: Tensor, spec: IndexSpec) -> Tensor:
    """The blocks of tile.choose, [b, C, Q, K] int32 in rising order, then -1."""
    if spec.rule == "msa":
        scores = ranked(scores, position, spec)
    return largest(scores, spec.top_k)


def block_masses(
    q: Tensor,
    keys: Tensor,
    lse: Tensor,
    counts: Tensor,
    first_token: int,
    first_entry: int,
    row_size: int,
    of_block: int,
    *,
    variances: Tensor | None = None,
    max_variance: float = 0.0,
    num_pooled: int = 1,
    bias: Tensor | None = None,
) -> Tensor:
    """What a softmax gives to blocks by their entries, tokens or what these are pooled to, summed
    over the heads of a group: [Hk, Q, row_size] fp32, 0 where a query has no entry of a block.

    Args:
        q: [T, H, d], of which the tokens from first_token on are the queries; lse: [T, H] fp32.
        keys: [Hk, E, d], in the dtype of q; of strides that are multiples of d.
        counts: [Q] int32, how many entries from first_entry on each query has, of at most row_size
            blocks; of_block: entries of a block, a power of two.
        variances: as `keys`, which are means of num_pooled tokens then, for logits of order 2 (see
            SparseAttentionSpec). bias: [T, H] fp32, added to the logits.
    """
    num_heads, dim = q.shape[1:]
    kv_heads = keys.shape[0]
    group = num_heads // kv_heads
    config = configs.masses_config(dim, of_block, q.dtype)
    heads, blocks = next_power_of_two(group), config.columns // of_block
    queries = max(1, config.rows // heads)
    num_queries = len(counts)
    masses = torch.zeros(kv_heads, num_queries, row_size, dtype=torch.float32, device=q.device)
    launch(
        index_masses_kernel,
        (-(-row_size // (blocks * configs.MASSES_STEPS)), -(-num_queries // queries), kv_heads),
        q,
        keys,
        variances,
        bias,
        lse,
        counts,
        masses,
        first_token,
        num_queries,
        first_entry,
        keys.stride(0) // dim,
        keys.stride(1) // dim,
        row_size,
        kv_heads,
        dim**-0.5,
        max_variance,
        math.log2(num_pooled),
        GROUP=group,
        QUERIES=queries,
        HEADS=heads,
        DIM=dim,
        ENTRIES=of_block,
        BLOCKS=blocks,
        STEPS=configs.MASSES_STEPS,
        ORDER=0 if variances is None else 2,
        **config.options,
    )
    return masses


def divergences(
    scores: Tensor, masses: Tensor, candidates: Tensor, weights: Tensor | None, learns: bool
) -> Tensor:
    """[C, Q] fp32: tile.divergence of each query's first `candidates` blocks, times its weight and
    1 / C. If it learns, their masses become the gradients of their scores.

    Args:
        scores: [C, Q, M] fp32; masses: [C, Q, M or more] fp32; both contiguous.
        candidates: [Q] int32; weights: [Q] fp32, None: ones.
    """
    choices, num_queries, number = scores.shape
    found = torch.empty(choices, num_queries, dtype=torch.float32, device=scores.device)
    launch(
        index_divergence_kernel,
        (num_queries, choices),
        scores,
        masses,
        candidates,
        weights,
        found,
        num_queries,
        number,
        masses.shape[-1],
        1.0 / choices,
        LEARNS=learns,
        CHUNK=configs.ROW,
        num_warps=4,
    )
    return found


def add_grads(tile: IndexTile, columns: Tensor, grads: Tensor, into: Gradients) -> None:
    """Write the gradients of a tile's queries and weights, and add those of its keys.

    Args:
        columns: [C, Q, K] int32 keys, rising, then -1. grads: likewise, fp32, of their scores.
        into: shaped as what the tile has.
    """
    queries, keys, weights, first_position, spec = tile
    num_queries, heads, width = queries.shape
    by_head, scale = spec.by_head, _scale(width, heads, spec)
    shape = {"WIDTH": width, "DIM": configs.padded(width), "BY_HEAD": by_head}
    of_choice = 1 if by_head else heads
    config = configs.query_grad_config(width, of_choice, queries.dtype)
    launch(
        index_query_grad_kernel,
        (num_queries, tile.choices, -(-of_choice // config.rows)),
        queries,
        keys,
        weights,
        columns,
        (columns >= 0).sum(-1, dtype=torch.int32),
        grads,
        into.queries,
        into.weights,
        num_queries,
        columns.shape[-1],
        heads,
        scale,
        HEADS=config.rows,
        COLUMNS=config.columns,
        **shape,
        **config.options,
    )

    # By key: what is not there goes into a column of its own, which nobody reads. Rows begin at
    # multiples of 16, so that loads are wide.
    row_size = len(keys) // 16 * 16 + 16
    spread = grads.new_zeros(tile.choices, num_queries, row_size)
    spread.scatter_(-1, torch.where(columns < 0, len(keys), columns).long(), grads)
    config = configs.key_grad_config(width, queries.dtype)
    launch(
        index_key_grad_kernel,
        (-(-len(keys) // config.columns),),
        queries,
        keys,
        weights,
        spread,
        into.keys,
        num_queries,
        len(keys),
        row_size,
        heads,
        first_position,
        tile.tokens_of_key,
        scale,
        QUERIES=config.rows,
        KEYS=config.columns,
        **shape,
        **config.options,
    )


def _scale(width: int, heads: int, spec: IndexSpec) -> float:
    return math.pow(width if spec.by_head else heads * width, -0.5)
