"""A command of ours as a child of this process: its output in a file, its end tied to ours, and
whether the kernel ended it for want of memory.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.process.identity import ROOT
from launch.process.secrets import redact_text

PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 150.0
"""Between asking a command to save and end, and killing it."""
TOLD = 6
"""Last lines of a failed command that are kept."""
LINE = 400
TAIL_BYTES = 1 << 16


def run_child(
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> int:
    """The exit code of a command whose output is appended to a file; below 0: the signal that ended
    it. It is asked to end with this process, whatever ends that.

    Args:
        env: of the command; None: that of this process.
        pass_fds: descriptors that it has as well.
    """
    parent = os.getpid()

    def tie_to_parent() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    with log.open("ab") as output:
        # A group of its own: Ctrl-C reaches it through this process, once.
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
            preexec_fn=tie_to_parent,
            process_group=0,
        )
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            try:
                child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            raise


def last_lines(log: Path) -> tuple[str, ...]:
    """What a failed command said last: its errors, or the end of its traceback."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    return tuple(redact_text(line[:LINE]) for line in (errors or lines)[-TOLD:])


def out_of_memory_kills() -> int:
    """How many processes of this control group the kernel has killed for memory so far; 0 where it
    does not say.
    """
    try:
        lines = Path("/sys/fs/cgroup/memory.events").read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])
    except (OSError, KeyError, ValueError):
        return 0
