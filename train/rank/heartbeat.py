"""Signs of life of a training process, for the agent that started it (launch/job/agent.py).

Two different signals go down one pipe: `alive` from a thread of its own, which goes on inside a
collective and stops only when the process is stopped or the interpreter is stuck, and `beat` from
the training loop, which says how far it has come. Without an agent (launch=inline, another
launcher) every call does nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from train.files.strict_json import dumps

PIPE = "LOADSTONE_HEARTBEAT_FD"
STACKS = "LOADSTONE_STACKS"
ALIVE_SECONDS = 0.5
STACK_SIGNAL = signal.SIGUSR2

_pipe: int | None = None
# faulthandler writes to its descriptor: it must stay open
_stacks: TextIO | None = None
_beats = 0


def start() -> None:
    """Begin to send `alive`, and write the stacks of all threads to $LOADSTONE_STACKS on SIGUSR2
    and on a crash.
    """
    global _pipe, _stacks
    if PIPE not in os.environ or _pipe is not None:
        return
    _pipe = int(os.environ.pop(PIPE))
    os.set_inheritable(_pipe, False)
    # an agent that does not read must not hold up training
    os.set_blocking(_pipe, False)
    path = Path(os.environ[STACKS])
    path.parent.mkdir(parents=True, exist_ok=True)
    _stacks = path.open("a")
    faulthandler.enable(_stacks)
    faulthandler.register(STACK_SIGNAL, _stacks, all_threads=True)
    threading.Thread(target=_alive, name="heartbeat", daemon=True).start()


def beat(step: int, phase: str) -> None:
    """The main thread begins `phase` ("data", "forward", ... , "done") of optimisation step `step`,
    counted from 1.
    """
    global _beats
    _beats += 1
    _send({"beats": _beats, "step": step, "phase": phase})


def failed(kind: str, message: str) -> None:
    """The process is about to end for this reason. kind: a failure of launch/process/exits.py, or
    "communication".
    """
    _send({"failure": kind, "message": message})


def event(kind: str, **facts: Any) -> None:
    """Something for RUN/supervisor.jsonl."""
    _send({"event": kind, **facts})


def _alive() -> None:
    while True:
        _send({})
        time.sleep(ALIVE_SECONDS)


def _send(message: dict[str, Any]) -> None:
    if _pipe is None:
        return
    # full, or nobody reads: the agent's own death is noticed elsewhere
    with contextlib.suppress(OSError):
        os.write(_pipe, dumps(message).encode() + b"\n")
