"""Exit codes of a job, after sysexits.h, and what each kind of failure means for it."""

from __future__ import annotations

from dataclasses import dataclass

DONE = 0
BAD_CONFIG = 2
BAD_DATA = 65
NO_HOSTS = 69
FAILED = 70
IN_USE = 73
CANNOT_WRITE = 74
INTERRUPTED = 130


@dataclass(frozen=True)
class Failure:
    """What the command does after one kind of failure."""

    code: int
    """Exit code of the command."""
    restart: bool
    """Whether another attempt may go better."""


FAILURES = {
    "killed": Failure(FAILED, True),  # ended by a signal
    "exited": Failure(FAILED, True),  # left with code 0 before the end of training
    "failed": Failure(FAILED, True),  # an exception
    "out_of_memory": Failure(FAILED, True),  # an allocation failed, or the kernel ended a rank
    "communication": Failure(FAILED, True),  # ranks lost each other and nobody knows why
    "frozen": Failure(FAILED, True),  # stopped, or no sign of life
    "hung": Failure(FAILED, True),  # alive without progress
    "lost": Failure(FAILED, True),  # no word from the rank's host
    "launcher": Failure(FAILED, True),  # the launcher ended on its own
    "rendezvous": Failure(BAD_CONFIG, True),  # rank 0 cannot listen where the others look for it
    "startup": Failure(FAILED, True),  # ranks did not appear
    "non_finite": Failure(BAD_DATA, False),  # NaN or infinite loss or gradient
    "alarm": Failure(BAD_DATA, False),  # an alarm whose action is to stop
    "checkpoint": Failure(BAD_DATA, False),  # none usable, or of another model
    "gone": Failure(CANNOT_WRITE, False),  # checkpoints that the run has saved are not there
    "disk_full": Failure(CANNOT_WRITE, False),
    "in_use": Failure(IN_USE, False),  # another job holds the run directory
    "interrupted": Failure(INTERRUPTED, False),  # a second SIGINT: do not even wait for the save
    "config": Failure(BAD_CONFIG, False),  # a setting or an input the user must mend
}
