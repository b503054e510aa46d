"""Decoding one token of every row by graphs: a step copies its inputs to where the graph reads
them, and replays it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from infer.batch import Piece, next_tokens
from infer.graphs.capture import Capture, Replay
from model.attention.base import Paging
from model.attention.cache import Pages
from model.paging import Decoded, TokenBudgets, step_pages
from model.routers.state import RouterState
from model.transformer import Transformer

LEAST_PAGES = 8
"""Columns of the narrowest table of pages. Beyond it they double: each width is a graph more."""

Shape = tuple[str, int, int]
"""The engine's context, rows, and columns of the table of pages."""


def doubled(number: int, least: int, most: int) -> int:
    """The first of least, 2 least, 4 least, ... that is not below `number`, at most `most`."""
    size = least
    while size < number:
        size *= 2
    return min(size, most)


def _sizes(least: int, most: int) -> list[int]:
    """All that `doubled` may give."""
    return sorted({doubled(number, least, most) for number in range(1, most + 1)})


class DecodeGraphs:
    """A graph for every shape of a step that has come so far. A shape is the number of rows, in
    powers of two up to the slots, and the width of the table of pages.

    Rows without a request write to the scratch page, see it alone and visit no expert, so nobody
    else's numbers hang on them. A graph reads weights, routers' buffers, tables of budgets and
    pages where they are: what is copied into these holds from the next step on. What a graph cannot
    see is another number in Python, such as how many blocks a sparse layer selects; whoever changes
    one names another context (Engine.use_context), and steps are captured anew under it.

    Args:
        pages: the pools of the model's layers.
        budgets: tables of the MoE layers (BudgetRows); None: the routers' own state.
        max_slots: most rows; max_pages: most pages of a row.
        max_active: as in RoutingRequest.

    Attributes:
        num_replays: steps so far.
    """

    def __init__(
        self,
        model: Transformer,
        pages: list[Pages],
        budgets: Sequence[RouterState] | None,
        max_slots: int,
        max_pages: int,
        max_active: int | None,
        capture: Capture,
    ):
        self.model, self.pages, self.capture = model, pages, capture
        self.tables = None if budgets is None else tuple(budgets)
        self.page_size = pages[0].page_size
        self.max_slots, self.max_pages, self.max_active = max_slots, max_pages, max_active
        self.num_replays = 0
        self._replays: dict[Shape, Replay] = {}
        self._outputs: dict[int, Decoded] = {}
        """By rows: of any number of pages, since a step's are read before the next one."""

        device = model.any_weight.device

        def buffer(number: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(number, dtype=dtype, device=device)

        self._ids, self._slots, self._lengths = (buffer(max_slots) for _ in range(3))
        self._rows = buffer(max_slots, torch.int32)
        self._mask = buffer(max_slots, torch.bool)
        self._pages = buffer(max_slots * max_pages)

    @property
    def shapes(self) -> list[Shape]:
        """Those that have been captured, in their order."""
        return list(self._replays)

    def every_shape(self, context: str) -> list[Shape]:
        """Those that steps under a context can have, the smallest first."""
        rows = _sizes(1, self.max_slots)
        return [(context, n, width) for width in _sizes(LEAST_PAGES, self.max_pages) for n in rows]

    def prepare(self, shape: Shape) -> None:
        """Capture a shape before a step has it, with rows that have no request.

        Raises:
            CaptureError: the device cannot record it.
        """
        if shape not in self._replays:
            self._fill([], *shape[1:])
            self._replay_of(shape)

    def _replay_of(self, shape: Shape) -> Replay:
        """Captured where it has not been, with what is in the buffers."""
        if shape not in self._replays:
            self._replays[shape] = self.capture(lambda: self._run(*shape[1:]))
        return self._replays[shape]

    def step(self, pieces: list[Piece], context: str, keep_routing: bool) -> Decoded:
        """The next token of every piece, as step_pages computes it. What comes back is valid
        until the next step, but for the routing.
        """
        rows = doubled(len(pieces), 1, self.max_slots)
        longest = max(sequence.held + 1 for sequence, _ in pieces)
        num_pages = doubled(-(-longest // self.page_size), LEAST_PAGES, self.max_pages)
        self._fill(pieces, rows, num_pages)

        self._replay_of((context, rows, num_pages))()
        self.num_replays += 1
        out = self._outputs[rows]
        ids = out.expert_ids
        return out._replace(expert_ids=ids.clone() if keep_routing and ids is not None else None)

    def _fill(self, pieces: list[Piece], rows: int, num_pages: int) -> None:
        host = torch.device("cpu")
        input_ids, paging, mask, row_of = next_tokens(pieces, self.page_size, rows, host, num_pages)
        self._ids[:rows].copy_(input_ids[:, 0])
        self._slots[:rows].copy_(paging.slots)
        self._lengths[:rows].copy_(paging.lengths)
        self._rows[:rows].copy_(row_of)
        self._pages[: rows * num_pages].copy_(paging.pages.flatten())
        if mask is None:
            self._mask[:rows].fill_(True)
        else:
            self._mask[:rows].copy_(mask[:, 0])

    def _run(self, rows: int, num_pages: int) -> None:
        """A step on the buffers. The first one of so many rows makes room for what comes out."""
        paging = Paging(
            self._slots[:rows],
            self._pages[: rows * num_pages].view(rows, num_pages),
            self._lengths[:rows],
            False,
        )
        budgets = None
        if self.tables is not None:
            budgets = TokenBudgets(self.tables, self._rows[:rows])
        found = step_pages(
            self.model,
            self._ids[:rows].view(rows, 1),
            paging,
            self.pages,
            self._mask[:rows].view(rows, 1),
            True,
            budgets,
            None,
            self.max_active,
        )
        if rows not in self._outputs:
            made = [None if new is None else torch.empty_like(new) for new in found]
            self._outputs[rows] = Decoded(*made)  # type: ignore[arg-type]
        for place, new in zip(self._outputs[rows], found, strict=True):
            if place is not None and new is not None:
                place.copy_(new)
