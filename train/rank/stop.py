"""Asked to stop: SIGTERM, SIGUSR1 and SIGINT are remembered, for loops to look at where they can
save and end.

Where nothing would be lost (data being prepared, a sample being written) they are obeyed at once,
by an exception. Imports no torch: the handlers must stand before the slow imports begin.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from train.rank.after_import import AfterImport

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def may_take(number: int) -> bool:
    """Whether a signal is ours to handle: a shell has jobs in the background ignore Ctrl-C."""
    return number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN


class Stopped(KeyboardInterrupt):
    """The process was asked to stop, in work that leaves nothing to save. No Exception, so that
    libraries which wrap every error in one of their own let it through."""

    on_all_ranks = True


class StopSignal:
    """Remembers the signals that ask to save and end. A context manager; main thread only.

    Args:
        second_interrupt_ends: a second SIGINT ends the process as if nobody caught it. Not for
            ranks, whose launchers may pass on a Ctrl-C that the terminal has already sent them.

    Attributes:
        received: whether the process was asked to stop.
    """

    def __init__(self, second_interrupt_ends: bool = False) -> None:
        self.received = False
        self.second_interrupt_ends = second_interrupt_ends
        self._at_once = False
        self._after_import = AfterImport()
        self._previous = {n: signal.signal(n, self._receive) for n in ASKING if may_take(n)}

    def close(self) -> None:
        """Give the signals back to those who had them before."""
        self._after_import.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def obeyed_at_once(self) -> Iterator[None]:
        """Inside, a signal raises Stopped wherever the main thread stands, but not before a module
        that it imports is there; one that came before, or that a library has swallowed, raises it
        at the edges.

        Raises:
            Stopped: the process was asked to stop.
        """
        if self.received:
            raise Stopped
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
            self._after_import.cancel()
        if self.received:
            raise Stopped

    def agreed(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all of them, so that they leave a
        loop together. Collective."""
        import torch
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.received
        asked = torch.tensor(int(self.received))
        dist.all_reduce(asked)
        return bool(asked)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT and self.second_interrupt_ends:
            # The default action ends a process even inside a collective or a kernel, where no
            # handler of ours would run.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            with suppress(OSError):  # nobody reads
                os.write(2, b"\nasked to stop: saving and ending; a second Ctrl-C ends at once\n")
        # SIGUSR1, as a second SIGINT may end the process by now.
        if self._at_once and not self._after_import.postpones(signal.SIGUSR1, frame):
            self._at_once = False
            raise Stopped
