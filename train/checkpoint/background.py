"""One task at a time in a thread of its own, whose error is raised where it is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """The thread is a daemon: a process that ends with an error does not wait for a task whose
    peers may be gone.
    """

    def __init__(self, name: str):
        self.name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a task was started that nobody has waited for."""
        return self._thread is not None

    def start(self, task: Callable[[], object]) -> None:
        assert self._thread is None, "wait() for the task before"
        self._thread = threading.Thread(target=self._run, args=(task,), name=self.name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return once the task is done, at once if there is none. Raises the task's error."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error = self._error
        self._error = None
        if error is not None:
            raise error

    def _run(self, task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:  # dcp's CheckpointException is one
            self._error = error
