"""Which of a model's layers a rank has: all of them, or under pipeline parallelism those of its
stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class LayerRows:
    """This rank's rows of a table that has one for each layer of a kind, in layer order."""

    own: range
    """Numbers of the rows whose layers are here: neighbours."""
    layers: tuple[int, ...]
    """Numbers of all layers of the kind, one for each row."""

    @staticmethod
    def of(kind: Sequence[int], own: Sequence[int]) -> LayerRows:
        """kind: numbers of the layers that have a row, ascending; own: those of them that are
        here.
        """
        first = sum(layer < own[0] for layer in kind) if own else 0
        return LayerRows(range(first, first + len(own)), tuple(kind))

    @property
    def places(self) -> slice:
        """The own rows of a whole table."""
        return slice(self.own.start, self.own.stop)

    def placed(self, rows: torch.Tensor) -> torch.Tensor:
        """[own layers, ...] -> [all layers, ...], zeros where the layer is on another stage: sums
        over stages then have every layer's.
        """
        assert len(rows) == len(self.own), (len(rows), self.own)
        if len(self.own) == len(self.layers):
            return rows
        around = (self.own.start, len(self.layers) - self.own.stop)
        return F.pad(rows, (*(0, 0) * (rows.dim() - 1), *around))


@dataclass(frozen=True)
class ModelPart:
    """The layers of one stage, which are neighbours."""

    layers: range
    """Their numbers."""
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
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        """Whether the loss is made here."""
        return self.layers.stop == self.num_layers

    @property
    def is_whole(self) -> bool:
        return self.is_first and self.is_last

    @staticmethod
    def of(
        layers: range, num_layers: int, moe_layers: Sequence[int], sparse_layers: Sequence[int]
    ) -> ModelPart:
        """moe_layers: as ModelConfig.moe_layers; sparse_layers: likewise, of attention."""
        stop = layers.stop if layers.stop < num_layers else max((num_layers, *moe_layers)) + 1
        here = range(layers.start, stop)

        def rows(kind: Sequence[int]) -> LayerRows:
            return LayerRows.of(kind, [layer for layer in kind if layer in here])

        decoder_moe = [layer for layer in moe_layers if layer < num_layers]
        return ModelPart(
            layers, num_layers, rows(moe_layers), rows(decoder_moe), rows(sparse_layers)
        )
