"""A file that is hashed while it is written."""

from __future__ import annotations

import hashlib
from types import TracebackType
from typing import Any, BinaryIO

BLOCK_BYTES = 2**20
"""What is hashed and handed to the operating system at a time. torch's serialiser writes 16 KB at a
time, and a system call for each took longer than the disk. A thread of its own for it was tried:
its share of the processors was more than what it saved.
"""


class HashedFile:
    """A file open for writing from start to end, in blocks of BLOCK_BYTES.

    Use as a context manager: after an error it is left as it is, for the caller to close.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0
        self._block = bytearray(BLOCK_BYTES)
        self._filled = 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data: Any) -> int:
        """Takes anything with a buffer, and all of it."""
        view = memoryview(data).cast("B")
        size, start = len(view), 0
        while start < size:
            taken = min(size - start, BLOCK_BYTES - self._filled)
            self._block[self._filled : self._filled + taken] = view[start : start + taken]
            self._filled += taken
            start += taken
            if self._filled == BLOCK_BYTES:
                self._hand_over()
        self._size += size
        return size

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Does nothing yet: torch asks for it after each tensor."""

    def fileno(self) -> int:
        """Of a file whose content is with the operating system: who asks wants to sync it."""
        self._hand_over()
        self._file.flush()
        return self._file.fileno()

    def close(self) -> None:
        if not self._file.closed:
            self.fileno()
            self._file.close()

    def facts(self) -> dict[str, Any]:
        """As manifest.file_facts, of a file that is closed."""
        return {"size": self._size, "sha256": self._digest.hexdigest()}

    def _hand_over(self) -> None:
        with memoryview(self._block)[: self._filled] as view:
            self._digest.update(view)
            self._file.write(view)
        self._filled = 0
