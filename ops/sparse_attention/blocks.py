"""Where blocks lie: tables from cu_seqlens, made on the device without asking it anything.

Blocks start at document starts and never straddle documents. The number of blocks is only known on
the device, so tables have `num_blocks(...)` rows, an upper bound; the rows beyond the real ones are
empty (start = end = T).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ops.sparse_attention.spec import SparseAttentionSpec


class BlockTable(NamedTuple):
    """M blocks of T tokens; int32. Everything a query may do with a block follows from the query's
    own block.
    """

    start: Tensor
    """[M] first token of a block."""
    end: Tensor
    """[M] token behind its last."""
    first: Tensor
    """[M] first block of the block's document."""
    sink_end: Tensor
    """[M] for queries in block b: blocks [first, sink_end) are exact for all of them."""
    local_start: Tensor
    """[M] for queries in block b: blocks [local_start, b] are exact for all of them, and blocks
    [sink_end, local_start) are the candidates; sink_end == local_start: there are none.
    """
    doc_end: Tensor
    """[M] token at which the block's document ends."""
    block_of: Tensor
    """[T] block of a token."""
    cu_seqlens: Tensor
    """[documents + 1] of any integer type, what the table was made of."""


def num_blocks(num_tokens: int, num_documents: int, block_size: int) -> int:
    """Upper bound on the number of blocks, known without the lengths: each document adds at most
    one partial block.
    """
    return num_tokens // block_size + min(num_documents, num_tokens)


def block_ranges(
    cu_seqlens: Tensor, num_tokens: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(start, end, first, document) of every block, each [M] int64; documents of empty rows are
    arbitrary.
    """
    cu = cu_seqlens.long()
    per_document = -(-(cu[1:] - cu[:-1]) // block_size)
    last = per_document.cumsum(0)
    block = torch.arange(num_blocks(num_tokens, len(cu) - 1, block_size), device=cu.device)
    document = torch.searchsorted(last, block, right=True).clamp_max(len(cu) - 2)
    real = block < last[-1]
    first = torch.where(real, last[document] - per_document[document], block)
    start = torch.where(real, cu[document] + (block - first) * block_size, num_tokens)
    end = torch.where(real, torch.minimum(start + block_size, cu[document + 1]), num_tokens)
    return start, end, first, document


def block_table(cu_seqlens: Tensor, num_tokens: int, spec: SparseAttentionSpec) -> BlockTable:
    """cu_seqlens: [documents + 1] integers from 0 to T, not falling; documents may be empty."""
    cu = cu_seqlens.long()
    start, end, first, document = block_ranges(cu, num_tokens, spec.block_size)
    block = torch.arange(len(start), device=cu.device)
    dense = (block - first) * spec.block_size < spec.min_sparse_length
    local_start = torch.where(dense, first, torch.maximum(first, block - spec.num_local_blocks + 1))
    sink_end = torch.minimum(first + spec.num_sink_blocks, local_start)
    doc_end = torch.where(start < num_tokens, cu[document + 1], num_tokens)
    token = torch.arange(num_tokens, device=cu.device)
    block_of = torch.searchsorted(end.contiguous(), token, right=True)
    return BlockTable(
        start=start.int(),
        end=end.int(),
        first=first.int(),
        sink_end=sink_end.int(),
        local_start=local_start.int(),
        doc_end=doc_end.int(),
        block_of=block_of.int(),
        cu_seqlens=cu_seqlens,
    )


def of_queries(table: BlockTable, queries: Tensor | None) -> BlockTable:
    """The table with the blocks of the tokens `queries` [n] in the place of all tokens'; of None,
    the table itself.
    """
    return table if queries is None else table._replace(block_of=table.block_of[queries])


def query_tiles(
    table: BlockTable, num_tokens: int, tile_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(start, end, block) of query tiles that never cross a block, each [tiles] int32; empty tiles
    have start = end = T.

    tile_size divides the block size.
    """
    start, end, _, _ = block_ranges(table.cu_seqlens, num_tokens, tile_size)
    if not num_tokens:
        return start.int(), end.int(), start.int()
    return start.int(), end.int(), table.block_of[start.clamp_max(num_tokens - 1)]
