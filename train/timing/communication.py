"""What the dispatchers of a step send and wait for, read from the model while a step goes on."""

from __future__ import annotations

from model.transformer import Transformer
from ops.all_to_all import Communication, Meter, total_communication


class CommunicationMeter:
    """Of one step of one rank. Every reading is of what came since the one before.

    Args:
        wanted: whether anything is measured, which takes events on a device.
        between: counts what goes between stages of a pipeline, outside of the model: it is a part
            of the whole step alone.
    """

    def __init__(self, model: Transformer, wanted: bool, between: Meter):
        self._model, self._wanted, self._between = model, wanted, between
        self._found: list[Communication] = []
        between.measuring = wanted
        if wanted:
            self._model.measure_communication(True)

    def read(self) -> Communication | None:
        """Since the last reading; measuring goes on. None where nothing is measured."""
        if not self._wanted:
            return None
        self._found.append(self._model.measure_communication(True))
        return self._found[-1]

    def finish(self) -> Communication | None:
        """Of the whole step; measuring ends. None where nothing was measured."""
        if not self._wanted:
            return None
        self._found.append(self._model.measure_communication(False))
        self._between.measuring = False
        return total_communication([*self._found, self._between.take()])
