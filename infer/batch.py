"""From sequences to the tensors of one forward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch

from infer.sequence import Sequence
from model.attention.base import Paging
from model.request import TokenBatch


class Piece(NamedTuple):
    """The next tokens of a sequence that are computed."""

    sequence: Sequence
    number: int


class Places:
    """Tokens of pieces, and padding between them, as they lie in a forward pass."""

    def __init__(self, number: int, page_size: int):
        self.page_size = page_size
        self.ids, self.slots, self.rows = ([0] * number for _ in range(3))
        self.mask = [False] * number

    def put(self, at: int, sequence: Sequence, begin: int, end: int) -> None:
        """Tokens [begin, end) of a sequence, from place `at` on."""
        here = slice(at, at + end - begin)
        self.ids[here] = sequence.tokens[begin:end]
        pages, size = sequence.pages, self.page_size
        self.slots[here] = [pages[i // size] * size + i % size for i in range(begin, end)]
        self.rows[here] = [sequence.row] * (end - begin)
        self.mask[here] = [True] * (end - begin)


def first_tokens(
    pieces: list[Piece], page_size: int, packed: bool, device: torch.device
) -> tuple[TokenBatch, Paging, torch.Tensor, torch.Tensor]:
    """What prefill_pages takes, for sequences of which nothing is held; then row_of of
    TokenBudgets.

    packed: documents end to end in one row, for kernels that read cu_seqlens; else one a row, with
    padding behind it, which needs no mask of all pairs. Without pieces: one token of padding, for a
    rank that has nothing while others do.
    """
    numbers = [number for _, number in pieces] or [1]
    longest = max(numbers)
    width = sum(numbers) if packed else longest
    rows = 1 if packed else len(numbers)
    places, positions = Places(rows * width, page_size), [0] * (rows * width)
    last, begin = [], 0
    for row, (sequence, number) in enumerate(pieces):
        at = begin if packed else row * width
        places.put(at, sequence, 0, number)
        positions[at : at + number] = range(number)
        if not packed:
            positions[at + number : at + width] = range(number, width)
        last.append(at + number - 1)
        begin += number

    ends = [0]
    for number in numbers:
        ends.append(ends[-1] + (number if packed else width))
    shape = (rows, width)
    input_ids = _tensor(places.ids, device).view(shape)
    batch = TokenBatch(
        input_ids,
        input_ids,
        _tensor(positions, device).view(shape),
        torch.tensor(ends, dtype=torch.int32, device=device),
        longest,
        _mask(places, shape, device),
    )
    nothing = torch.zeros((len(numbers), 0), dtype=torch.int64, device=device)
    regions = _regions(pieces, len(numbers), device)
    paging = Paging(_tensor(places.slots, device), nothing, _tensor(numbers, device), True, regions)
    return batch, paging, _tensor(last, device), _rows(places, device)


def next_tokens(
    pieces: list[Piece],
    page_size: int,
    rows: int,
    device: torch.device,
    num_pages: int | None = None,
) -> tuple[torch.Tensor, Paging, torch.Tensor | None, torch.Tensor]:
    """What step_pages takes, for sequences of which something is held; then row_of of
    TokenBudgets. A sequence with fewer new tokens has padding before them; rows beyond the pieces
    are idle. num_pages: columns of the table of pages; None: as many as the longest row needs.
    """
    width = max((number for _, number in pieces), default=1)
    if num_pages is None:
        longest = max((s.held + number for s, number in pieces), default=1)
        num_pages = -(-longest // page_size)
    places, lengths, pages = Places(rows * width, page_size), [], []
    for row, (sequence, number) in enumerate(pieces):
        end = sequence.held + number
        places.put((row + 1) * width - number, sequence, sequence.held, end)
        lengths.append(end)
        # What fills up is the row's own: a mask gives a key weight 0, and 0 times a NaN that some
        # other row has left would be NaN.
        held = sequence.pages[:num_pages]
        pages += held + held[:1] * (num_pages - len(held))

    idle = rows - len(pieces)
    lengths += [1] * idle
    pages += [0] * (idle * num_pages)
    paging = Paging(
        _tensor(places.slots, device),
        _tensor(pages, device).view(rows, num_pages),
        _tensor(lengths, device),
        False,
        _regions(pieces, rows, device),
    )
    shape = (rows, width)
    input_ids = _tensor(places.ids, device).view(shape)
    return input_ids, paging, _mask(places, shape, device), _rows(places, device)


def _mask(places: Places, shape: tuple[int, int], device: torch.device) -> torch.Tensor | None:
    if all(places.mask):
        return None
    return torch.tensor(places.mask, device=device).view(shape)


def _regions(pieces: list[Piece], rows: int, device: torch.device) -> torch.Tensor | None:
    """Of every row; None where no cache is bounded."""
    found = [s.region for s, _ in pieces if s.region is not None]
    return _tensor(found + [0] * (rows - len(found)), device) if found else None


def _rows(places: Places, device: torch.device) -> torch.Tensor:
    return torch.tensor(places.rows, dtype=torch.int32, device=device)


def _tensor(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
