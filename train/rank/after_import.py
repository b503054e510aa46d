"""Signals that arrive while a module is imported wait for its end.

A handler that raises inside the start of a compiled extension ends the process: torch's C++ code
has nobody who would catch the exception, and the process aborts with a core dump instead of
cleaning up. Imports no torch: the handlers must stand before the slow imports begin.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import FrameType

IMPORTING = "<frozen importlib._bootstrap>"
LOOK_SECONDS = 0.01


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported somewhere below a frame."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            return True
        frame = frame.f_back
    return False


class AfterImport:
    """Has a handler called again once the main thread imports nothing.

    Attributes:
        waiting: whether a signal waits now.
    """

    def __init__(self) -> None:
        self.waiting = False
        self._lock = threading.Lock()

    def postpones(self, number: int, frame: FrameType | None) -> bool:
        """Whether the handler must not raise now; then signal `number` is sent again when it
        may.
        """
        if not is_importing(frame):
            self.waiting = False
            return False
        if not self.waiting:
            self.waiting = True
            threading.Thread(target=self._send, args=(number,), daemon=True).start()
        return True

    def cancel(self) -> None:
        """Send nothing more: the handlers are about to go."""
        with self._lock:
            self.waiting = False

    def _send(self, number: int) -> None:
        main = threading.main_thread().ident
        while self.waiting and is_importing(sys._current_frames().get(main or 0)):
            time.sleep(LOOK_SECONDS)
        with self._lock:
            if self.waiting:
                self.waiting = False
                os.kill(os.getpid(), number)
