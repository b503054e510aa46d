"""Weights that no single checkpoint holds: the mean of several checkpoints of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from train.checkpoint.reader import MergedReader
from train.files.manifest import CheckpointError

SELECTION_BIAS = ".router.balance_bias"
"""The one buffer that is averaged: added to scores, it means what it does only beside its weights.
"""


def reader_of(checkpoints: Sequence[Path]) -> MergedReader:
    """A reader of one checkpoint, or of the mean of several, adapters added.

    Args:
        checkpoints: of one run, the newest first.

    Raises:
        CheckpointError: one of them cannot be read, or they hold different models.
    """
    return MergedReader(checkpoints[0]) if len(checkpoints) == 1 else AverageReader(checkpoints)


class AverageReader(MergedReader):
    """Reads the mean of several checkpoints, in fp32, tensor by tensor: beside what is asked for it
    holds a tensor of the same size.

    Weights, and the selection biases of routers, are averaged. All else that routers keep
    (controllers, cuts of a fallback, counters) is that of the first checkpoint, since the mean of
    two states of a controller is none.

    Raises:
        CheckpointError: one of them cannot be read, or they hold different models.
    """

    def __init__(self, checkpoints: Sequence[Path]):
        super().__init__(checkpoints[0])
        self._others = [MergedReader(checkpoint) for checkpoint in checkpoints[1:]]
        mine = _averaged_shapes(self)
        for other in self._others:
            theirs = _averaged_shapes(other)
            key = next((k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)), None)
            if key is not None:
                raise CheckpointError(
                    f"{self.checkpoint} and {other.checkpoint} hold different models, which have "
                    f"no mean: {key.removesuffix('/fp32')} is "
                    f"{_described(mine.get(key))} in one and {_described(theirs.get(key))} in the "
                    "other; choose a smaller average"
                )

    def read(self, want: dict[str, torch.Tensor]) -> None:
        super().read(want)
        self._average(want, lambda other, part: other.read(part))

    def read_parameters(
        self, want: dict[str, torch.Tensor], expert_ids: dict[str, tuple[int, ...]]
    ) -> None:
        super().read_parameters(want, expert_ids)
        self._average(want, lambda other, part: other.read_parameters(part, expert_ids))

    def _average(
        self,
        want: dict[str, torch.Tensor],
        read: Callable[[MergedReader, dict[str, torch.Tensor]], None],
    ) -> None:
        """Make the mean of what the first checkpoint has filled in."""
        for key, tensor in want.items():
            if not _is_averaged(key):
                continue
            for other in self._others:
                term = torch.empty_like(tensor)
                read(other, {key: term})
                tensor += term
            tensor /= 1 + len(self._others)


def _is_averaged(key: str) -> bool:
    return key.endswith(("/fp32", SELECTION_BIAS))


def _averaged_shapes(reader: MergedReader) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in reader.shapes.items() if _is_averaged(key)}


def _described(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else str(shape)
