"""What needs single tokens, not sums: of the last micro-batch of a logged step, on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ops.router import RouterOutput
from train.agenda import Step
from train.observe.base import Ask, MicroBatch, Observer
from train.observe.routing import mean_details, routing_details, tile_padding, tile_rows_of


class RoutingSample(Observer):
    """Margins, logits, gates and pairs of experts (train.observe.routing.routing_details), and how
    well the tiles of the experts' products are filled.

    Args:
        wanted: on the rank that writes; others keep no routing for it.
        tile_rows: rows of a tile where there are so many slots for assignments; None: rows of other
            ranks stand in the same tiles, and these routings do not tell how they are filled.
        pipeline: the group of ranks that have other layers of the same tokens; None: all are here.
    """

    def __init__(self, wanted: bool, tile_rows: Callable[[int], int] | None, pipeline: Any = None):
        self.wanted, self._tile_rows = wanted, tile_rows
        self._pipeline = pipeline
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
        tiles: list[tuple[int, int]] = []
        if self._tile_rows is not None and routings:
            rows = self._tile_rows(routings[0].slots.numel())
            tiles = tile_rows_of(routings, rows) if rows > 1 else []
        layers, tiles = self._of_all_stages(routing_details(routings), tiles)
        return mean_details(layers) | tile_padding(tiles)

    def _of_all_stages(
        self, layers: list[dict[str, float]], tiles: list[tuple[int, int]]
    ) -> tuple[list[dict[str, float]], list[tuple[int, int]]]:
        """What the stages of a pipeline have of their layers, put together. Collective over the
        ranks that have parts of the same sample.
        """
        if self._pipeline is None or not self.wanted:
            return layers, tiles
        stages: list[Any] = [None] * dist.get_world_size(self._pipeline)
        dist.all_gather_object(stages, (layers, tiles), group=self._pipeline)
        return (
            [layer for stage, _ in stages for layer in stage],
            [rows for _, stage in stages for rows in stage],
        )
