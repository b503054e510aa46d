"""A command on several devices of this machine: as many processes of it, each told its rank.

For commands that only read a run. Training has a supervisor instead (launch/job), which restarts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from launch.process.children import PR_SET_PDEATHSIG
from train.rank.ports import RANKS_KEY, STORE

POLL_SECONDS = 0.1
GRACE_SECONDS = 15.0
"""Between asking the ranks to end and killing them."""
ASKED = signal.SIGUSR1
"""What rank 0 is asked to end by, where the ranks end by themselves."""


def run_on_ranks(
    number: int, module: str, arguments: list[str], patience: float | None = None
) -> int:
    """Start `python -m module arguments` as ranks 0 to number - 1 and wait for all. Rank 0 has this
    command's output, the others its errors alone.

    Args:
        patience: the ranks end by themselves. Each SIGTERM or SIGINT that comes here is handed to
            rank 0 as SIGUSR1, and when a rank has failed the others have so many seconds to tell
            their clients. None: both end all ranks at once.

    Returns:
        0, or the exit code of the first rank that failed. The others, which would wait for it, are
        ended then.
    """
    with tempfile.TemporaryDirectory(prefix="loadstone-") as folder:
        place = {
            **os.environ,
            "WORLD_SIZE": str(number),
            "LOCAL_WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",  # they meet in a file instead
            STORE: str(Path(folder) / "store"),
            RANKS_KEY: secrets.token_hex(32),
        }
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(number):
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, *arguments],
                        env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=None if rank == 0 else subprocess.DEVNULL,
                        # Ctrl-C of a terminal reaches them through this process, once.
                        process_group=None if patience is None else 0,
                        preexec_fn=None if patience is None else _tied(os.getpid()),
                    )
                )
            if patience is None:
                return _first_failure(ranks)
            with _handed_to(ranks[0]) as asked:
                code = _first_failure(ranks, patience)
            # A rank that is still loading knows no better than to end by the signal.
            return 128 + asked[0] if asked and code == 128 + ASKED else code
        finally:
            _end(ranks)


def _tied(parent: int) -> Callable[[], None]:
    """In a child before it begins: it ends with its parent, whatever ends that."""

    def tie() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return tie


@contextlib.contextmanager
def _handed_to(rank: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """The first two signals that ask to end go to a rank, and are noted; a third one is for those
    who had them before.
    """
    asked: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) == 2:
            for taken, handler in before.items():
                signal.signal(taken, handler)
        rank.send_signal(ASKED)

    before = {n: signal.signal(n, hand_on) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for taken, handler in before.items():
            signal.signal(taken, handler)


def _first_failure(ranks: list[subprocess.Popen[bytes]], patience: float = 0.0) -> int:
    """Exit code of the first rank that failed, when all have ended or `patience` is over."""
    first: int | None = None
    since = 0.0
    while True:
        codes = [rank.poll() for rank in ranks]
        # A signal, whose number is negative here, ends a rank from outside: of several that have
        # failed at once it is the cause.
        if first is None and (failed := [code for code in codes if code]):
            first, since = min(failed), time.monotonic()
        if all(code is not None for code in codes) or (
            first is not None and time.monotonic() - since >= patience
        ):
            found = first or 0
            return found if found >= 0 else 128 - found
        time.sleep(POLL_SECONDS)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        try:
            rank.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
