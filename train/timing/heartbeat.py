"""Signs of life, one at the beginning of each phase: how far this rank has come."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from train.agenda import Step
from train.observe.base import Observer, Phase
from train.rank import heartbeat


class Heartbeat(Observer):
    """Tells the agent of this rank (train/rank/heartbeat.py) which phase of which step begins."""

    def phase(self, step: Step, name: Phase) -> AbstractContextManager[None]:
        # These two are around others, which say more.
        if name not in ("whole", "pause"):
            heartbeat.beat(step.number, name)
        return nullcontext()
