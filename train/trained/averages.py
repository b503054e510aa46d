"""Averages of weights as a reader gives them: the mean of several checkpoints of a run, or the
moving average that a checkpoint holds beside its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from train.checkpoint.expert_stacks import Wanted
from train.checkpoint.reader import MergedReader
from train.engine.average import AVERAGE
from train.files.manifest import CheckpointError

SELECTION_BIAS = ".router.balance_bias"
"""The one buffer that is averaged: added to scores, it means what it does only beside its weights.
"""


def reader_of(checkpoints: Sequence[Path], weights: str = "native") -> MergedReader:
    """A reader of one checkpoint, or of the mean of several, adapters added.

    Args:
        checkpoints: of one run, the newest first.
        weights: ema: of the only one, the moving average.

    Raises:
        CheckpointError: one of them cannot be read, or they hold different models.
    """
    if weights == "ema":
        return MovingAverageReader(checkpoints[0])
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


class MovingAverageReader(MergedReader):
    """Reads the moving average of a checkpoint's weights in their place. What was not trained is
    as it is, and so is what routers keep beside their weights.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has no moving average.
    """

    def __init__(self, checkpoint: Path):
        self._averages: dict[str, str] = {}
        super().__init__(checkpoint)
        held = [key for key in self.stored if key.endswith(f"/{AVERAGE}")]
        if not held:
            raise CheckpointError(
                f"{checkpoint} has no moving average of its weights; train with optim.ema_decay"
            )
        # Under the key of the weight stands its average, here and among what is packed.
        self._averages = {key.removesuffix(AVERAGE) + "fp32": key for key in held}
        for asked, key in self._averages.items():
            self.stored[asked] = self.stored.pop(key)
            self._members.pop(asked, None)
            if key in self._members:
                self._members[asked] = self._members.pop(key)

    def _load_entries(self, plain: dict[str, torch.Tensor], stacks: dict[str, Wanted]) -> None:
        def renamed(wanted: dict[str, Any]) -> dict[str, Any]:
            return {self._averages.get(key, key): value for key, value in wanted.items()}

        super()._load_entries(renamed(plain), renamed(stacks))


def _is_averaged(key: str) -> bool:
    return key.endswith(("/fp32", SELECTION_BIAS))


def _averaged_shapes(reader: MergedReader) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in reader.shapes.items() if _is_averaged(key)}


def _described(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else str(shape)
