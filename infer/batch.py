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


def first_tokens(
    pieces: list[Piece], page_size: int, packed: bool, device: torch.device
) -> tuple[TokenBatch, Paging, torch.Tensor]:
    """What Transformer.prefill takes, for sequences of which nothing is held.

    packed: documents end to end in one row, for kernels that read cu_seqlens; else one a row, with
    padding behind it, which needs no mask of all pairs. Without pieces: one token of padding, for a
    rank that has nothing while others do.
    """
    numbers = [number for _, number in pieces] or [1]
    longest = max(numbers)
    width = sum(numbers) if packed else longest
    rows = 1 if packed else len(numbers)
    ids, slots, positions = ([0] * (rows * width) for _ in range(3))
    mask = [False] * (rows * width)
    last, begin = [], 0
    for row, (sequence, number) in enumerate(pieces):
        at = begin if packed else row * width
        ids[at : at + number] = sequence.tokens[:number]
        slots[at : at + number] = _slots(sequence, 0, number, page_size)
        mask[at : at + number] = [True] * number
        positions[at : at + number] = range(number)
        if not packed:
            positions[at + number : at + width] = range(number, width)
        last.append(at + number - 1)
        begin += number

    ends = [0]
    for number in numbers:
        ends.append(ends[-1] + (number if packed else width))
    shape = (rows, width)
    input_ids = _tensor(ids, device).view(shape)
    batch = TokenBatch(
        input_ids,
        input_ids,
        _tensor(positions, device).view(shape),
        torch.tensor(ends, dtype=torch.int32, device=device),
        longest,
        None if all(mask) else torch.tensor(mask, device=device).view(shape),
    )
    nothing = torch.zeros((len(numbers), 0), dtype=torch.int64, device=device)
    paging = Paging(_tensor(slots, device), nothing, _tensor(numbers, device), True)
    return batch, paging, _tensor(last, device)


def next_tokens(
    pieces: list[Piece], page_size: int, rows: int, device: torch.device
) -> tuple[torch.Tensor, Paging, torch.Tensor | None]:
    """What Transformer.step takes, for sequences of which something is held. A sequence with fewer
    new tokens has padding before them; rows beyond the pieces are idle.
    """
    width = max((number for _, number in pieces), default=1)
    longest = max((s.held + number for s, number in pieces), default=1)
    num_pages = -(-longest // page_size)
    ids, slots, mask, lengths, pages = [], [], [], [], []
    for sequence, number in pieces:
        end = sequence.held + number
        padding = width - number
        ids += [0] * padding + sequence.tokens[sequence.held : end]
        slots += [0] * padding + _slots(sequence, sequence.held, end, page_size)
        mask += [False] * padding + [True] * number
        lengths.append(end)
        # What fills up is the row's own: a mask gives a key weight 0, and 0 times a NaN that some
        # other row has left would be NaN.
        held = sequence.pages[:num_pages]
        pages += held + held[:1] * (num_pages - len(held))

    idle = rows - len(pieces)
    ids += [0] * (idle * width)
    slots += [0] * (idle * width)
    mask += [False] * (idle * width)
    lengths += [1] * idle
    pages += [0] * (idle * num_pages)
    paging = Paging(
        _tensor(slots, device),
        _tensor(pages, device).view(rows, num_pages),
        _tensor(lengths, device),
        False,
    )
    token_mask = None if all(mask) else torch.tensor(mask, device=device).view(rows, width)
    return _tensor(ids, device).view(rows, width), paging, token_mask


def _slots(sequence: Sequence, begin: int, end: int, page_size: int) -> list[int]:
    pages = sequence.pages
    return [pages[i // page_size] * page_size + i % page_size for i in range(begin, end)]


def _tensor(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
