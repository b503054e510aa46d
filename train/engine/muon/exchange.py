"""Matrices in flat tensors of which every rank has a slice: worked on where they are whole, and
where one is cut, sent to one rank and back.

There and back are one all-to-all each. All ranks know all slices (pieces.py), so no sizes are
exchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from train.engine.muon.pieces import BATCH_ELEMENTS, Block, Matrix, Slices, owned, pieces

ROUND_ELEMENTS = 2**25
"""Of the cut matrices that a rank owns in one exchange."""


class Run(NamedTuple):
    """Matrices of one shape, one behind the other."""

    offset: int
    """Of the first one's first element."""
    number: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Elements of all of them."""
        return self.number * self.rows * self.columns


class Cut(NamedTuple):
    """A piece of a cut matrix on its way, as one rank sees it."""

    offset: int
    """In this rank's flat tensor; 0 for a piece of another rank."""
    place: int
    """Among the matrices that this rank owns, laid one behind the other; 0 where another owns it.
    """
    size: int
    rows: int
    """Of its matrix, as columns are."""
    columns: int


@dataclass(frozen=True)
class Round:
    """One exchange of cut matrices, as one rank sees it."""

    leaving: tuple[Cut, ...]
    """In the order of the ranks that get them."""
    leaving_sizes: tuple[int, ...]
    """Elements for each rank."""
    coming: tuple[Cut, ...]
    """In the order of the ranks that they are from."""
    coming_sizes: tuple[int, ...]
    staying: tuple[Cut, ...]
    """Pieces of matrices that this rank owns, which are here already."""
    matrices: tuple[Run, ...]
    """The owned ones, at their places."""


Source = Callable[[int, int], Tensor]
"""(offset, size) -> those elements of a rank's flat tensor [size], in the dtype in which they
travel.
"""
Function = Callable[[Tensor], Tensor]
"""[B, rows, columns] -> the same shape and dtype."""
Sink = Callable[[int, int, int, Tensor], None]
"""Takes (offset, rows, columns, elements [size]): what a part of the flat tensor becomes, and the
shape of the matrix it is of.
"""


class Layout:
    """All matrices of the flat tensors that the ranks of a group hold together.

    Args:
        blocks: the matrices, with how their elements are shared out.
        num_ranks, rank: of the group, and this one's.
        group: of processes; None where there is one rank.

    Attributes:
        num_matrices, num_elements: of all ranks.
        num_cut: matrices that no rank holds whole.
        exchanged: elements that this rank sends for one update, there and back; over all ranks as
            many are received.
    """

    def __init__(
        self,
        blocks: Iterable[tuple[Block, Slices]],
        num_ranks: int = 1,
        rank: int = 0,
        group: Any = None,
    ):
        self._group = group
        matrices = owned([(b, pieces(b, slices, num_ranks)) for b, slices in blocks], num_ranks)
        whole = [matrix for matrix in matrices if len(matrix.pieces) == 1]
        cut = [matrix for matrix in matrices if len(matrix.pieces) > 1]
        self.num_matrices, self.num_cut = len(matrices), len(cut)
        self.num_elements = sum(matrix.size for matrix in matrices)

        self._runs = _runs((m.pieces[0].offset, m) for m in whole if m.owner == rank)
        self._rounds = [_round(part, num_ranks, rank) for part in _parts(cut, num_ranks)]
        self.exchanged = sum(sum(r.leaving_sizes) + sum(r.coming_sizes) for r in self._rounds)

    def update(self, source: Source, function: Function, sink: Sink) -> None:
        """Replace every matrix by a function of it. Collective over the group where one is cut."""
        # The first pieces travel while the whole matrices are worked on.
        flight = self._send(self._rounds[0], source) if self._rounds else None
        for run in self._runs:
            for part in _batches(run):
                matrices = source(part.offset, part.size).view(part[1:])
                sink(part.offset, part.rows, part.columns, function(matrices).reshape(-1))

        for number, current in enumerate(self._rounds):
            assert flight is not None
            arrived = flight()
            following = self._rounds[number + 1 : number + 2]
            flight = self._send(following[0], source) if following else None
            self._finish(current, arrived, source, function, sink)

    def _send(self, current: Round, source: Source) -> Callable[[], Tensor]:
        """Start the way there; what it returns waits for the pieces of this rank's matrices."""
        parts = [source(piece.offset, piece.size) for piece in current.leaving]
        sent = torch.cat(parts or [source(0, 0)])
        return self._exchange(sent, current.leaving_sizes, current.coming_sizes)

    def _finish(
        self, current: Round, arrived: Tensor, source: Source, function: Function, sink: Sink
    ) -> None:
        """Put the owned matrices together, work on them, and send every piece home."""
        flat = arrived.new_empty(sum(run.size for run in current.matrices))
        for piece, elements in _split(current.coming, arrived):
            flat[piece.place : piece.place + piece.size] = elements
        for piece in current.staying:
            flat[piece.place : piece.place + piece.size] = source(piece.offset, piece.size)

        for run in current.matrices:
            for part in _batches(run):
                there = flat[part.offset : part.offset + part.size]
                there.copy_(function(there.view(part[1:])).reshape(-1))

        parts = [flat[piece.place : piece.place + piece.size] for piece in current.coming]
        sent = torch.cat(parts or [flat[:0]])
        wait = self._exchange(sent, current.coming_sizes, current.leaving_sizes)
        for piece in current.staying:
            elements = flat[piece.place : piece.place + piece.size]
            sink(piece.offset, piece.rows, piece.columns, elements)
        for piece, elements in _split(current.leaving, wait()):
            sink(piece.offset, piece.rows, piece.columns, elements)

    def _exchange(
        self, sent: Tensor, send_sizes: tuple[int, ...], receive_sizes: tuple[int, ...]
    ) -> Callable[[], Tensor]:
        received = sent.new_empty(sum(receive_sizes))
        work = dist.all_to_all_single(
            received, sent, list(receive_sizes), list(send_sizes), group=self._group, async_op=True
        )

        def wait() -> Tensor:
            work.wait()
            return received

        return wait


# --- planning, the same on every rank -------------------------------------------------------------


def _parts(cut: list[Matrix], num_ranks: int) -> Iterator[list[Matrix]]:
    """The matrices in their order, by exchange."""
    part: list[Matrix] = []
    size = 0
    for matrix in cut:
        if part and size + matrix.size > ROUND_ELEMENTS * num_ranks:
            yield part
            part, size = [], 0
        part.append(matrix)
        size += matrix.size
    if part:
        yield part


def _round(matrices: list[Matrix], num_ranks: int, rank: int) -> Round:
    leaving: list[list[Cut]] = [[] for _ in range(num_ranks)]
    coming: list[list[Cut]] = [[] for _ in range(num_ranks)]
    staying, places = [], []
    after = 0
    for matrix in matrices:
        shape = (matrix.rows, matrix.columns)
        is_own = matrix.owner == rank
        if is_own:
            places.append((after, matrix))
        for piece in matrix.pieces:
            place = after + piece.first if is_own else 0
            offset = piece.offset if piece.rank == rank else 0
            found = Cut(offset, place, piece.size, *shape)
            if is_own and piece.rank == rank:
                staying.append(found)
            elif is_own:
                coming[piece.rank].append(found)
            elif piece.rank == rank:
                leaving[matrix.owner].append(found)
        after += matrix.size * is_own

    return Round(
        leaving=tuple(itertools.chain.from_iterable(leaving)),
        leaving_sizes=tuple(sum(piece.size for piece in to_one) for to_one in leaving),
        coming=tuple(itertools.chain.from_iterable(coming)),
        coming_sizes=tuple(sum(piece.size for piece in of_one) for of_one in coming),
        staying=tuple(staying),
        matrices=tuple(_runs(places)),
    )


def _runs(places: Iterable[tuple[int, Matrix]]) -> list[Run]:
    """Neighbours of one shape put together."""
    runs: list[Run] = []
    for offset, matrix in sorted(places, key=lambda found: found[0]):
        last = runs[-1] if runs else None
        shape = (matrix.rows, matrix.columns)
        if last is not None and last[2:] == shape and last.offset + last.size == offset:
            runs[-1] = last._replace(number=last.number + 1)
        else:
            runs.append(Run(offset, 1, *shape))
    return runs


def _batches(run: Run) -> Iterator[Run]:
    """As many of a run at a time as BATCH_ELEMENTS allows, one at least."""
    each = run.rows * run.columns
    most = max(1, BATCH_ELEMENTS // each)
    for first in range(0, run.number, most):
        number = min(most, run.number - first)
        yield Run(run.offset + first * each, number, run.rows, run.columns)


def _split(cuts: tuple[Cut, ...], elements: Tensor) -> Iterator[tuple[Cut, Tensor]]:
    """Pieces with their elements, which lie one behind the other."""
    start = 0
    for piece in cuts:
        yield piece, elements[start : start + piece.size]
        start += piece.size
