"""Which of a model's layers a rank has: all of them, or under pipeline parallelism those of its
stage, which are one run of neighbours or, with virtual stages, several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerRows:
    """This rank's rows of a table that has one for each layer of a kind, in layer order."""

    own: tuple[int, ...]
    """Numbers of the rows whose layers are here, ascending."""
    layers: tuple[int, ...]
    """Numbers of all layers of the kind, one for each row."""

    @staticmethod
    def of(kind: Sequence[int], own: Sequence[int]) -> LayerRows:
        """kind: numbers of the layers that have a row, ascending; own: those of them that are
        here.
        """
        here = set(own)
        return LayerRows(tuple(row for row, layer in enumerate(kind) if layer in here), tuple(kind))

    def placed(self, rows: torch.Tensor) -> torch.Tensor:
        """[own layers, ...] -> [all layers, ...], zeros where the layer is on another stage: sums
        over stages then have every layer's.
        """
        assert len(rows) == len(self.own), (len(rows), self.own)
        if len(self.own) == len(self.layers):
            return rows
        whole = rows.new_zeros((len(self.layers), *rows.shape[1:]))
        first = 0
        for run in self._runs:
            whole[run] = rows[first : first + run.stop - run.start]
            first += run.stop - run.start
        return whole

    def taken(self, table: torch.Tensor) -> torch.Tensor:
        """[all layers, ...] -> [own layers, ...]."""
        return torch.cat([table[run] for run in self._runs]) if self.own else table[:0]

    @property
    def _runs(self) -> list[slice]:
        """The own rows as runs of neighbours, whose places a device need not be told."""
        starts = [row for row in self.own if row - 1 not in self.own]
        stops = [row + 1 for row in self.own if row + 1 not in self.own]
        return [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]


@dataclass(frozen=True)
class ModelPart:
    """The layers of one stage, or of one lap of it."""

    runs: tuple[range, ...]
    """Their numbers, ascending: neighbours, and with virtual stages such of every lap."""
    num_layers: int
    """Of the whole model."""
    moe: LayerRows
    """Rows of the layers with experts; those of multi-token prediction come last and are with the
    last layers.
    """
    decoder_moe: LayerRows
    """Rows of those without multi-token prediction, which evaluation leaves out."""
    sparse: LayerRows
    """Rows of the layers whose attention is sparse."""

    @property
    def is_first(self) -> bool:
        """Whether tokens are embedded here."""
        return self.runs[0].start == 0

    @property
    def is_last(self) -> bool:
        """Whether the loss is made here."""
        return self.runs[-1].stop == self.num_layers

    @property
    def is_whole(self) -> bool:
        return len(self.layers) == self.num_layers

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for run in self.runs for layer in run)

    def laps(self) -> tuple[ModelPart, ...]:
        """Every run alone."""
        return tuple(
            ModelPart.of((run,), self.num_layers, self.moe.layers, self.sparse.layers)
            for run in self.runs
        )

    @staticmethod
    def of(
        runs: Sequence[range],
        num_layers: int,
        moe_layers: Sequence[int],
        sparse_layers: Sequence[int],
    ) -> ModelPart:
        """moe_layers: as ModelConfig.moe_layers; sparse_layers: likewise, of attention."""
        here = {layer for run in runs for layer in run}
        if runs[-1].stop == num_layers:
            here |= set(range(num_layers, max((num_layers, *moe_layers)) + 1))

        def rows(kind: Sequence[int]) -> LayerRows:
            return LayerRows.of(kind, [layer for layer in kind if layer in here])

        decoder_moe = [layer for layer in moe_layers if layer < num_layers]
        return ModelPart(
            tuple(runs), num_layers, rows(moe_layers), rows(decoder_moe), rows(sparse_layers)
        )
