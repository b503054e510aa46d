"""Conversations into rows: whole, each a document of its own, with as little filler as first-fit
decreasing leaves.

Boundaries of documents come from here and never from a token: chat models end every turn with the
token that ends documents elsewhere.
"""

from __future__ import annotations

import numpy as np

WINDOW = 4096
"""Conversations packed together. Part of the order of samples, so it stays as it is."""


def pack_window(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Divide conversations into rows, first-fit decreasing: the longest first, each into the first
    row with room; of equal length the earlier first.

    Args:
        lengths: [conversations] int64, each at least 1 and at most `capacity`.

    Returns:
        For every row [conversations in it] int64, indices into lengths, in increasing order.
    """
    order = np.argsort(-lengths, kind="stable")
    room = np.full(len(lengths), capacity, dtype=np.int64)
    rows: list[list[int]] = []
    for i in order:
        # Rows that are not begun have all the room there is, so one is always found.
        row = int(np.argmax(room >= lengths[i]))
        if row == len(rows):
            rows.append([])
        rows[row].append(int(i))
        room[row] -= lengths[i]
    return [np.array(sorted(row), dtype=np.int64) for row in rows]


def pack_epoch(
    lengths: np.ndarray, capacity: int, generator: np.random.RandomState | None
) -> list[np.ndarray]:
    """The rows of an epoch: conversations in the order that the generator draws, in windows of
    WINDOW; the rows of a window again in an order that it draws, since long ones come first.

    Args:
        lengths: [conversations] int64, 0 for those that are left out.
        generator: None: in their own order, as held-out conversations are.

    Returns:
        As pack_window, over all conversations.
    """
    kept = np.flatnonzero(lengths > 0)
    order = kept if generator is None else generator.permutation(kept)
    rows: list[np.ndarray] = []
    for begin in range(0, len(order), WINDOW):
        window = order[begin : begin + WINDOW]
        packed = [window[row] for row in pack_window(lengths[window], capacity)]
        if generator is not None:
            packed = [packed[i] for i in generator.permutation(len(packed))]
        rows += packed
    return rows
