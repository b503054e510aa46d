"""What needs single tokens, not sums: of the last micro-batch of a logged step, on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ops.router import RouterOutput
from train.agenda import Step
from train.observe.base import Ask, MicroBatch, Observer
from train.observe.routing import routing_details, tile_padding


class RoutingSample(Observer):
    """Margins, logits, gates and pairs of experts (train.observe.routing.routing_details), and how
    well the tiles of the experts' products are filled.

    Args:
        wanted: on the rank that writes; others keep no routing for it.
        tile_rows: rows of a tile where there are so many slots for assignments; None: rows of other
            ranks stand in the same tiles, and these routings do not tell how they are filled.
    """

    def __init__(self, wanted: bool, tile_rows: Callable[[int], int] | None):
        self.wanted, self._tile_rows = wanted, tile_rows
        self._routings: tuple[RouterOutput, ...] = ()

    def begin_step(self, step: Step) -> Ask:
        return Ask.ROUTING if self.wanted and step.logs else Ask.NOTHING

    def micro_batch(self, step: Step, done: MicroBatch) -> None:
        if self.wanted and step.logs:
            self._routings = tuple(
                RouterOutput(*(part.detach() for part in routing))
                for routing in done.output.routings
            )

    def log(self, step: Step) -> dict[str, Any]:
        # A record after a signal has no step of its own to look at: nothing of one before may stay.
        routings, self._routings = self._routings, ()
        found: dict[str, Any] = dict(routing_details(routings))
        if self._tile_rows is not None and routings:
            found |= tile_padding(routings, self._tile_rows(routings[0].slots.numel()))
        return found
