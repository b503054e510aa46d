"""What compiling has cost a run."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from train.agenda import Step
from train.observe.base import Observer, Phase

log = logging.getLogger("loadstone")
STEPS = 4
"""How many steps are looked at. A variant of a block, of rows with several documents for example,
may be compiled in a later one than the first.
"""


class FirstSteps(Observer):
    """Says once how long the first step took, in which the blocks are compiled, beside the quickest
    of the steps that follow.

    Args:
        num_blocks: how many are compiled here.
        prints: of one rank.
    """

    def __init__(self, num_blocks: int, prints: bool):
        self.num_blocks, self.prints = num_blocks, prints
        self.seconds: list[float] = []

    @contextlib.contextmanager
    def phase(self, step: Step, name: Phase) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if name != "whole" or len(self.seconds) == STEPS:
            return
        self.seconds.append(time.perf_counter() - started)
        if len(self.seconds) == STEPS and self.prints:
            log.info(self.line())

    def line(self) -> str:
        """What the first step took, and the quickest after it."""
        first, *others = self.seconds
        return (
            f"compile  {self.num_blocks} blocks; the first step took {first:.1f} s with compiling "
            f"them, the quickest of the next {len(others)} {min(others):.3f} s"
        )
