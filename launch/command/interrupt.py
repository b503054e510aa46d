"""Ctrl-C and SIGTERM end a command: its clean-up runs, no traceback is shown, and the exit code is
128 + the signal's number.

Training saves first and has handlers of its own (train/rank/stop.py).
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType

from launch.process.exits import DONE
from train.rank.after_import import AfterImport
from train.rank.stop import Stopped, may_take

ENDING = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While entered, the first signal raises KeyboardInterrupt where the main thread stands, but
    not before a module that it imports is there; a second one of the kind ends the process at once,
    clean-up or not.

    Args:
        rank: leave SIGTERM alone; an agent asks a rank to stop once it sees a handler, which must
            be the one that saves.

    Attributes:
        number: of the signal that came; None before.
    """

    def __init__(self, rank: bool = False) -> None:
        self.number: int | None = None
        self._after_import = AfterImport()
        self._numbers = [n for n in ENDING if may_take(n) and not (rank and n == signal.SIGTERM)]

    def __enter__(self) -> Interrupts:
        self._previous = {number: signal.signal(number, self._receive) for number in self._numbers}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._after_import.cancel()
        for taken, handler in self._previous.items():
            signal.signal(taken, handler)
        if kind is None or (self.number is None and not issubclass(kind, KeyboardInterrupt)):
            return
        if issubclass(kind, Stopped):  # saved, as it was asked to
            raise SystemExit(DONE) from None
        number = int(signal.SIGINT) if self.number is None else self.number
        sys.stdout.flush()
        print(f"\nended by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        raise SystemExit(128 + number) from None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._after_import.waiting:
            # The second one, in a long import.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.number = number
        if self._after_import.postpones(number, frame):
            return
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt
