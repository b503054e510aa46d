"""The agent of one rank, which the launcher starts: python -m launch.job.agent RUN/supervisor.json
ATTEMPT.

It runs the training process as its child.

It tells the supervisor how its rank is, and ends the rank when the supervisor says so or can no
longer be reached, so that nothing outlives its job. It imports neither torch nor deepspeed: it must
not share the fate of what it watches.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launch.job.wire import Closed, JobFile, Line, Stranger, join
from launch.process.children import out_of_memory_kills
from launch.process.environment import adopt_rank, interface_of
from launch.process.exits import FAILED, NO_HOSTS
from launch.process.secrets import read_secrets_file
from launch.process.streams import forgive
from train.rank.heartbeat import PIPE, STACK_SIGNAL, STACKS
from train.rank.lock import SignOfLife
from train.rank.ports import STORE
from train.rank.stop import ASKING

PR_SET_PDEATHSIG = 1
CONNECT_SECONDS = 30.0
STACK_SECONDS = 0.4
REFUSED_SECONDS = SILENT_SECONDS = 3.0
FIRST_REFUSED_SECONDS = 1.0
"""Before the first connection: the supervisor listens before it starts a launcher, so where nobody
does it is gone.
"""
NOTHING_TO_SAVE = ("spawn", "start")
"""Phases of a rank that has not come to its first step."""
BURST_SECONDS = 0.1
"""Beats come in bursts; waking up for every one would cost the ranks their cores."""


class Agent:
    """An agent owns the training process of one rank and the connection to the supervisor."""

    def __init__(self, path: Path, attempt: int):
        self.path, self.attempt = path, attempt
        self.rank, self.host = int(os.environ["RANK"]), socket.gethostname()
        self.parent = os.getppid()
        self.job = _load_job(path)
        self.line: Line | None = None
        self.welcome: dict[str, Any] = {}
        self.child: subprocess.Popen[bytes] | None = None
        self.pipe = self.exited = -1
        """Descriptors: what the child says, and that it has ended."""
        self.buffer = b""
        self.facts: dict[str, Any] = {"step": 0, "phase": "spawn", "beats": 0}
        self.spans: dict[str, list[float]] = {}
        """Phase -> how often it took place, then the two longest times it took, in seconds."""
        self.alive = self.progressed = self.heard = time.monotonic()
        self.refused: float | None = None
        self.asked = False
        """Whether this process was told to end: by its launcher, when another agent has died, or by
        a scheduler.
        """
        self.stopping: float | None = None
        """When the child must be gone after it was asked to save and end."""
        self.told = False
        self.orders: list[dict[str, Any]] = []
        self.life = SignOfLife(path.parent, self.rank)

    # --- connection -------------------------------------------------------------------------------

    def connect(self) -> None:
        """Join the supervisor, or come back without a connection."""
        try:
            self.line, self.welcome = join(
                self.job,
                self.welcome.get("timeout", CONNECT_SECONDS),
                rank=self.rank,
                host=self.host,
                attempt=self.attempt,
            )
        except (ConnectionRefusedError, Stranger):
            # a stranger on its port: the supervisor is gone all the same
            self.refused = self.refused or time.monotonic()
            return
        except OSError:
            return
        self.heard, self.refused = time.monotonic(), None

    def drop(self) -> None:
        if self.line is not None:
            self.line.close()
        self.line = None

    def send(self, **message: Any) -> None:
        if self.line is None:
            return
        try:
            self.line.send(message)
        except Closed:
            self.drop()

    def superseded(self) -> bool:
        """Whether another job has taken over the run, which must not be written by two.

        Whoever takes over removes the file of the job before; a supervisor that ends by itself has
        told its agents to leave.
        """
        try:
            return JobFile.load(self.path).token != self.job.token
        except FileNotFoundError:
            return self.path.parent.is_dir()
        except (OSError, ValueError, TypeError):
            return False

    def receive(self) -> None:
        if self.line is None:
            return
        try:
            self.line.flush()
            messages = self.line.receive()
        except Closed:
            self.drop()
            return
        if messages:
            self.heard = time.monotonic()
        self.orders += [m for m in messages if "order" in m]

    @property
    def stacks(self) -> Path:
        """Where the child writes its stacks."""
        return self.path.parent / "failures" / str(self.attempt) / f"rank-{self.rank:05d}.txt"

    # --- child ------------------------------------------------------------------------------------

    def start_child(self) -> None:
        assert self.line is not None

        # The job's variables win over this node's own, and secrets over both.
        read, write = os.pipe()
        env = {**os.environ, **self.job.env, PIPE: str(write), STACKS: str(self.stacks)}
        if self.job.secrets_file is not None:
            env |= read_secrets_file(os.path.expanduser(self.job.secrets_file))
        if self.job.store_folder is not None:
            env[STORE] = str(Path(self.job.store_folder) / f"ranks-{self.attempt}")

        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name in self.welcome["rendezvous"]:
                env.setdefault(name, str(self.welcome["rendezvous"][name]))

        # gloo would listen on whatever the host's name resolves to, often an address that others
        # cannot reach.
        interface = interface_of(self.line.socket.getsockname()[0])
        if interface is not None:
            env.setdefault("GLOO_SOCKET_IFNAME", interface)

        # The kernel kills the child with this process, even where this one is killed by SIGKILL.
        agent = os.getpid()

        def tie_to_agent() -> None:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != agent:
                os.kill(os.getpid(), signal.SIGKILL)

        # Kills for want of memory are counted from here, to tell them from other SIGKILLs.
        self.memory_kills = out_of_memory_kills()
        command = [
            sys.executable,
            "-u",
            "-m",
            "launch.train",
            *self.job.arguments,
            f"+attempt={self.attempt}",
        ]
        self.child = subprocess.Popen(
            command, env=env, pass_fds=[write], preexec_fn=tie_to_agent, process_group=0
        )

        # Only the child holds the writing end, so that its death closes the pipe.
        os.close(write)
        os.set_blocking(read, False)
        self.pipe = read

        # Not on an old kernel: there the exit is seen half a report later.
        with contextlib.suppress(OSError):
            self.exited = os.pidfd_open(self.child.pid)

        self.alive = self.progressed = time.monotonic()

    def read_heartbeat(self) -> None:
        try:
            while received := os.read(self.pipe, 65536):
                self.buffer += received
        except BlockingIOError:
            pass

        # A beat may arrive in two halves; the second comes with the next reading.
        *lines, self.buffer = self.buffer.split(b"\n")
        now = time.monotonic()
        for text in lines:
            message = json.loads(text)
            self.alive = now
            if "event" in message:
                self.send(**message)
                continue
            if "beats" in message:
                times, *longest = self.spans.get(self.facts["phase"], [0])
                self.spans[self.facts["phase"]] = [
                    times + 1,
                    *sorted([*longest, now - self.progressed])[-2:],
                ]
                self.progressed = now
            self.facts |= message

    def report(self) -> None:
        """Tell the supervisor how the rank is."""
        assert self.child is not None
        now = time.monotonic()
        self.send(
            **self.facts,
            silent=round(now - self.alive, 2),
            idle=round(now - self.progressed, 2),
            usual=self.usual(),
            state=_state(self.child.pid),
            orphaned=os.getppid() != self.parent,
            asked=self.asked,
        )

    def usual(self) -> float | None:
        times, *longest = self.spans.get(self.facts["phase"], [0])
        return None if times == 0 else longest[0] if times >= 3 else longest[-1]

    def ask_to_stop(self) -> None:
        """Have the rank save and end. It is killed when it has not done so in time."""
        if self.stopping is None:
            self.stopping = time.monotonic() + float(self.welcome.get("grace", 0.0))
        if (
            self.child is not None
            and self.child.poll() is None
            and not self.told
            and _catches(self.child.pid, signal.SIGTERM)
        ):
            self.told = True
            self.child.send_signal(signal.SIGTERM)

    def dump_stacks(self) -> bool | None:
        """Have the child write its stacks. Returns whether its main thread stands in a collective,
        or None when it does not say.
        """
        assert self.child is not None
        path = self.stacks
        size = path.stat().st_size if path.is_file() else 0
        if self.child.poll() is not None or not _catches(self.child.pid, STACK_SIGNAL):
            return None
        self.child.send_signal(STACK_SIGNAL)
        time.sleep(STACK_SECONDS)
        try:
            with path.open() as file:
                file.seek(size)
                return in_collective(file.read())
        except OSError:
            return None

    def kill_child(self) -> None:
        assert self.child is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()

    # --- life -------------------------------------------------------------------------------------

    def run(self) -> int:
        """Returns the exit code of the agent: the child's, or 70 when it was ended from outside."""
        # some schedulers signal every process of a job; to die of it would look like the cause
        for number in ASKING:
            signal.signal(number, self._asked)

        until = time.monotonic() + CONNECT_SECONDS
        while self.line is None:
            self.connect()
            gone = (
                self.refused is not None and time.monotonic() - self.refused > FIRST_REFUSED_SECONDS
            )
            if self.line is None and (gone or time.monotonic() > until):
                print(
                    f"agent of rank {self.rank}: no supervisor of this job at "
                    f"{self.job.host}:{self.job.port}",
                    file=sys.stderr,
                )
                return NO_HOSTS
            time.sleep(0.0 if self.line else 0.2)

        self.life.show()
        try:
            return self._watch()
        finally:
            self.life.end()

    def _asked(self, number: int, frame: object) -> None:
        self.asked = True

    def _watch(self) -> int:
        self.start_child()
        assert self.child is not None
        interval, next_report = min(1.0, self.welcome["timeout"] / 8), 0.0
        while self.child.poll() is None:
            self._wait(interval / 2)
            self.read_heartbeat()
            self.receive()
            if self.line is None:
                self.connect()
            self.life.show()

            now = time.monotonic()
            if now >= next_report:
                next_report = now + interval
                self.report()

            if self.asked or self.stopping is not None:
                # again: a rank that is still starting cannot be told yet
                self.ask_to_stop()

            if self._must_end(now):
                self.kill_child()
                return FAILED
        self.read_heartbeat()
        return self._after_exit()

    def _wait(self, seconds: float) -> None:
        watched = [d for d in (self.pipe, self.exited) if d >= 0]
        watched += [self.line.fileno()] if self.line is not None else []
        ready = select.select(watched, [], [], seconds)[0]
        if self.exited not in ready:
            time.sleep(BURST_SECONDS)

    def _must_end(self, now: float) -> bool:
        """Follow orders, and end a rank that has lost its supervisor."""
        orders, self.orders = self.orders, []
        for order in orders:
            if order["order"] == "abort":
                self.dump_stacks()
                return True
            if order["order"] == "stacks":
                self.send(waiting=self.dump_stacks())
            if order["order"] == "stop":
                self.ask_to_stop()

        # Two jobs must not write one run: the one that was replaced goes.
        if now - self.heard > SILENT_SECONDS and self.superseded():
            print(
                f"agent of rank {self.rank} on {self.host}: "
                "another job has taken over the run, ending",
                file=sys.stderr,
            )
            return True

        # Nobody listens there any more: save what can be saved, and end.
        if (
            self.refused is not None
            and now - self.refused > REFUSED_SECONDS
            and self.stopping is None
        ):
            saves = self.facts["phase"] not in NOTHING_TO_SAVE
            print(
                f"agent of rank {self.rank} on {self.host}: the supervisor is gone, "
                f"{'saving and ' * saves}ending",
                file=sys.stderr,
            )
            if not saves:
                return True
            self.ask_to_stop()

        # No word and no refusal: the network is gone, and the supervisor counts this rank as lost
        # too.
        if now - self.heard > self.welcome["timeout"] and self.refused is None:
            print(
                f"agent of rank {self.rank} on {self.host}: no word from the supervisor for "
                f"{self.welcome['timeout']:g} s, ending",
                file=sys.stderr,
            )
            return True
        return self.stopping is not None and now > self.stopping

    def _after_exit(self) -> int:
        """Report the exit and stay until the supervisor has judged: a launcher ends all ranks when
        one agent leaves.
        """
        assert self.child is not None

        code = self.child.returncode
        if code == -signal.SIGTERM and not self.told:
            # DeepSpeed's launcher ends a tree from its leaves: our own signal follows the rank's.
            time.sleep(BURST_SECONDS)
            self.told = self.asked

        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child.pid, signal.SIGKILL)  # what the rank has left behind

        message = {
            **self.facts,
            "exit_code": code,
            "told": self.told,
            "out_of_memory": out_of_memory_kills() > self.memory_kills,
        }
        self.send(**message)

        # An empty file of stacks says nothing; it and the folders made for it go.
        with contextlib.suppress(OSError):
            if self.stacks.stat().st_size == 0:
                self.stacks.unlink()
                self.stacks.parent.rmdir()
                self.stacks.parent.parent.rmdir()

        ended = time.monotonic()
        leave = False
        while not leave and time.monotonic() - self.heard < self.welcome["timeout"]:
            time.sleep(0.1)
            self.receive()
            if self.line is None:
                if self.refused is not None or time.monotonic() - ended > self.welcome["timeout"]:
                    break
                self.connect()
                self.send(**message)
            leave = any(o["order"] in ("leave", "abort") for o in self.orders)
        return code if code >= 0 else 128 - code


def in_collective(stacks: str) -> bool | None:
    """Whether the thread that runs the training loop waits for other ranks, from faulthandler's
    dump of all threads.
    """
    for thread in stacks.split("\n\n"):
        frames = [line for line in thread.splitlines() if line.lstrip().startswith("File ")]
        if any("/launch/train.py" in frame for frame in frames):
            return any(
                part in frame
                for frame in frames[:3]
                for part in (
                    "/torch/distributed/",
                    "/deepspeed/comm/",
                    "/ops/all_to_all/",
                    "/train/pipeline/link.py",
                    "in _own_store",
                )
            )
    return None


def _load_job(path: Path) -> JobFile:
    """Read the job's file. On a network file system it may appear a little late."""
    until = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return JobFile.load(path)
        except PermissionError as error:
            raise SystemExit(f"agent: {error}") from error
        except (OSError, ValueError, TypeError) as error:
            if time.monotonic() > until:
                raise SystemExit(
                    f"agent: {path} cannot be read ({error}); the run "
                    "directory must be on a file system that all nodes share"
                ) from error
            time.sleep(0.2)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return "?"


def _catches(pid: int, number: int) -> bool:
    """Whether a process handles the signal. One that is still starting would die of it."""
    try:
        caught = next(
            line
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("SigCgt:")
        )
    except (OSError, StopIteration):
        return False
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def main() -> int:
    forgive()
    adopt_rank()
    try:
        return Agent(Path(sys.argv[1]), int(sys.argv[2])).run()
    except OSError as error:
        print(f"agent: {errno.errorcode.get(error.errno or 0, '')} {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    raise SystemExit(main())
