"""A command on several devices of this machine: as many processes of it, each told its rank.

For commands that only read a run. Training has a supervisor instead (launch/job), which restarts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train.rank.ports import STORE

POLL_SECONDS = 0.1
GRACE_SECONDS = 15.0
"""Between asking the ranks to end and killing them."""


def run_on_ranks(number: int, module: str, arguments: list[str]) -> int:
    """Start `python -m module arguments` as ranks 0 to number - 1 and wait for all. Rank 0 has this
    command's output, the others its errors alone.

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
        }
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(number):
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, *arguments],
                        env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=None if rank == 0 else subprocess.DEVNULL,
                    )
                )
            return _first_failure(ranks)
        finally:
            _end(ranks)


def _first_failure(ranks: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        if failed:
            # a signal's number is negative here, and 128 + it for shells
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if all(code == 0 for code in codes):
            return 0
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
