"""Which rank has which piece of a matrix, and who orthogonalises it: the same on every rank, and in
a plan before any has started. Imports no torch.

ZeRO gives every rank a slice of a whole group of parameters (stages 1 and 2), or a slice of every
parameter (stage 3). A matrix that lies whole within a slice is that rank's work, and nothing of it
travels. One that is cut goes to one of the ranks with the largest pieces, and its update comes
back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

BATCH_ELEMENTS = 2**25
"""Matrices of one shape are orthogonalised together up to so many elements."""


class Block(NamedTuple):
    """A matrix in the order of the flat elements that ranks share out."""

    first: int
    """Its first element."""
    rows: int
    columns: int


class Slices(NamedTuple):
    """How ranks share out flat elements: rank r has those from r * size on."""

    size: int
    offset: int = 0
    """Where a rank's slice begins in its flat tensor."""


class Piece(NamedTuple):
    """What one rank holds of a matrix."""

    rank: int
    offset: int
    """Of its first element in the rank's flat tensor."""
    first: int
    """Of the same element in the matrix."""
    size: int


@dataclass(frozen=True)
class Matrix:
    """A matrix, the pieces that it lies in, and the rank that orthogonalises it."""

    rows: int
    columns: int
    pieces: tuple[Piece, ...]
    owner: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


def pieces(block: Block, slices: Slices, num_ranks: int) -> tuple[Piece, ...]:
    """What each rank holds of a matrix."""
    first, after = block.first, block.first + block.rows * block.columns
    found = []
    for rank in range(first // slices.size, min(num_ranks, -(-after // slices.size))):
        start = max(first, rank * slices.size)
        stop = min(after, (rank + 1) * slices.size)
        offset = slices.offset + start - rank * slices.size
        found.append(Piece(rank, offset, start - first, stop - start))
    assert sum(piece.size for piece in found) == after - first, (block, slices, num_ranks)
    return tuple(found)


def owned(matrices: Iterable[tuple[Block, tuple[Piece, ...]]], num_ranks: int) -> list[Matrix]:
    """Who orthogonalises which: the only holder, or of the ranks with a piece at least half as
    large as the largest the one with the least to do so far, ties to the lower rank.
    """
    found: dict[int, Matrix] = {}
    load = [0] * num_ranks
    in_order = list(enumerate(matrices))
    # Whole ones first: what they cost is given, and the cut ones even it out.
    for number, (block, parts) in sorted(in_order, key=lambda item: (len(item[1][1]) > 1, item[0])):
        largest = max(piece.size for piece in parts)
        holders = [piece.rank for piece in parts if 2 * piece.size >= largest]
        owner = min(holders, key=lambda rank: (load[rank], rank))
        load[owner] += multiplications(block.rows, block.columns, 1)
        found[number] = Matrix(block.rows, block.columns, parts, owner)
    return [found[number] for number in range(len(found))]


def multiplications(rows: int, columns: int, steps: int) -> int:
    """Multiplications and additions of orthogonalising one matrix by Newton-Schulz."""
    short, long = min(rows, columns), max(rows, columns)
    return steps * (4 * short * short * long + 2 * short**3)
