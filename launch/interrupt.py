"""Ctrl-C and SIGTERM end a command: its clean-up runs, no traceback is shown, and the exit code is
128 + the signal's number.

Training saves first and has handlers of its own (train/stop.py).
"""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType

from launch.exits import DONE
from train.stop import Stopped, may_take

ENDING = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While entered, the first signal raises KeyboardInterrupt where the main thread stands; a
    second one of the kind ends the process at once, clean-up or not.

    Args:
        rank: leave SIGTERM alone; an agent asks a rank to stop once it sees a handler, which must
            be the one that saves.

    Attributes:
        number: of the signal that came; None before.
    """

    def __init__(self, rank: bool = False) -> None:
        self.number: int | None = None
        self._numbers = [n for n in ENDING if may_take(n) and not (rank and n == signal.SIGTERM)]

    def __enter__(self) -> Interrupts:
        self._previous = {number: signal.signal(number, self._receive) for number in self._numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
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
        self.number = number
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt
