"""Which tokens of a row each rank has that gathers keys and values: as much work for everyone.

Queries attend independently of each other, so any of them may be on any rank. Runs of equal length
are uneven work, as later tokens of a document see more, and so are pairs of runs from both ends
where rows are packed. So rows are cut into blocks of tokens, and these dealt out by what they cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

BLOCKS = 64
"""Blocks that a rank gets of a row of many tokens."""
LEAST = 8
"""Tokens of a block at least, where so many fit."""


class Run(NamedTuple):
    """Neighbouring tokens of one document that one rank has, on the host."""

    row: int
    first: int
    """Place in the row of its first token."""
    end: int
    """The place behind its last."""
    document: int
    """Place in the row of its document's first token."""


@dataclass(frozen=True)
class Deal:
    """How the tokens of B rows are dealt out to `size` ranks, S / size of each row to each."""

    order: Tensor
    """[B, S] int64, places in a row: those of the first rank in rising order, then those of the
    next one.
    """
    runs: tuple[tuple[Run, ...], ...]
    """Of each rank, row by row, in rising order."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> Deal:
        """With its tensor elsewhere."""
        return replace(self, order=move(self.order))


@dataclass(frozen=True)
class Dealer:
    """Deals out rows to `size` ranks.

    work: places in a document, [...] int64 -> what a query there costs, [...] int64 in any unit.
    """

    size: int
    work: Callable[[Tensor], Tensor]

    def __call__(self, positions: Tensor) -> Deal:
        """positions: [B, S] int64 on the host, which restart with every document; `size` divides
        S. The same on every rank.
        """
        order = dealt(self.work(positions), self.size)
        return Deal(order, runs_of(order, positions, self.size))


def block_size(length: int, size: int) -> int:
    """Tokens of the blocks that rows of `length` tokens are cut into for `size` ranks: as many as
    leave every rank BLOCKS of them, or the next smaller number with which all ranks get equally
    many whole blocks.
    """
    share = length // size
    wanted = max(LEAST, share // BLOCKS)
    return next(n for n in range(min(wanted, share), 0, -1) if share % n == 0)


def dealt(work: Tensor, size: int) -> Tensor:
    """[B, S] int64, the order of a deal, from the work of every token [B, S] int64.

    Blocks go heaviest first, in rounds of one for each rank: the heaviest of a round to the rank
    with the least so far. So all ranks have equally many, which keeps tensors equal. Of equal work
    the earlier block goes first, and of equal loads the lower rank: nothing depends on a sort.
    """
    batch, length = work.shape
    tokens = block_size(length, size)
    by_block = work.unflatten(1, (-1, tokens)).sum(2)
    heaviest = by_block.sort(dim=1, descending=True, stable=True).indices
    owner = torch.empty_like(heaviest)
    load = work.new_zeros(batch, size)
    for blocks in heaviest.split(size, 1):
        ranks = load.sort(dim=1, stable=True).indices
        owner.scatter_(1, blocks, ranks)
        load.scatter_add_(1, ranks, by_block.gather(1, blocks))
    # Rank by rank, and within a rank in the order of the row.
    blocks = owner.sort(dim=1, stable=True).indices
    return (blocks.unsqueeze(2) * tokens + torch.arange(tokens)).flatten(1)


def runs_of(order: Tensor, positions: Tensor, size: int) -> tuple[tuple[Run, ...], ...]:
    """Of each rank, from the order of a deal and the positions, [B, S] int64 each."""
    starts = torch.arange(order.shape[1]) - positions
    found = []
    for share in order.chunk(size, 1):
        runs: list[Run] = []
        for row, places in enumerate(share):
            documents = starts[row][places]
            cut = (places.diff() != 1) | (documents.diff() != 0)
            heads = [0, *(cut.nonzero()[:, 0] + 1).tolist(), len(places)]
            for a, b in itertools.pairwise(heads):
                first = int(places[a])
                runs.append(Run(row, first, first + b - a, int(documents[a])))
        found.append(tuple(runs))
    return tuple(found)
