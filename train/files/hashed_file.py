"""A file that is hashed and written by a thread while its content is still being made."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, BinaryIO

BLOCK_BYTES = 2**22
"""What the thread is given at a time. torch's serialiser writes 16 KB at a time, and a system call
for each took longer than the disk.
"""


class HashedFile:
    """A file open for writing from start to end. What is written is copied into one of two blocks,
    so two blocks are all the memory that it takes.

    Use as a context manager: the thread has ended behind it, also after an error.

    Raises (from any method that writes, flushes or closes):
        OSError: what the thread met, at the latest from `close`.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0
        self._filled = 0
        self._block, self._other = bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._thread.shutdown()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data: Any) -> int:
        """Takes anything with a buffer, and all of it."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK_BYTES):
            self._append(view[start : start + BLOCK_BYTES])
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Does nothing yet: torch asks for it after each tensor, and would wait for the thread."""

    def fileno(self) -> int:
        """Of a file whose content is with the operating system: who asks wants to sync it."""
        self._hand_over()
        self._wait()
        self._file.flush()
        return self._file.fileno()

    def close(self) -> None:
        if not self._file.closed:
            self.fileno()
            self._file.close()

    def facts(self) -> dict[str, Any]:
        """As manifest.file_facts, of a file that is closed."""
        return {"size": self._size, "sha256": self._digest.hexdigest()}

    def _append(self, part: memoryview) -> None:
        first = part[: BLOCK_BYTES - self._filled]
        self._block[self._filled : self._filled + len(first)] = first
        self._filled += len(first)
        if self._filled == BLOCK_BYTES:
            self._hand_over()
            rest = part[len(first) :]
            self._block[: len(rest)] = rest
            self._filled = len(rest)

    def _hand_over(self) -> None:
        """Give the block to the thread, which has ended with the other one, and go on with that."""
        self._wait()
        if self._filled:
            self._pending = self._thread.submit(self._put, self._block, self._filled)
            self._block, self._other = self._other, self._block
            self._filled = 0

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _put(self, block: bytearray, length: int) -> None:
        with memoryview(block)[:length] as view:
            self._digest.update(view)
            self._file.write(view)
