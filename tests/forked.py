"""Commands and ranks in processes of their own that have imported torch and DeepSpeed before they
begin.

Most of what a small job costs is Python importing them: five seconds of a core, for each rank and
each command. Here a server (multiprocessing's forkserver) imports them once per test process. Every
command is a fork of it with its own arguments, environment, output and exit code. Nothing that a
command does reaches the server or another command.

What a fork does not show is the import itself, and what reads the environment during it: tests
about starting, signals and launchers use real processes.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import warnings
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def server() -> ForkServerContext:
    """The server of this process, started on first use; it ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore"):
        forkserver.ensure_running()
    return context


class Forked:
    """A running `python -m module arguments` or `python script arguments` from the repository's
    root.

    Args:
        program: a module's name, or the path of a script.
        arguments: of its command line.
        environment: all of its environment.
    """

    def __init__(self, program: str | Path, arguments: list[str], environment: dict[str, str]):
        self.arguments = [str(program), *map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        outputs = [str(Path(self._folder.name) / name) for name in ("stdout", "stderr")]
        self._outputs = [Path(output) for output in outputs]
        self._process = server().Process(
            target=_run, args=(program, self.arguments, environment, outputs)
        )
        self._process.start()

    def wait(self, timeout: float) -> subprocess.CompletedProcess:
        """What it printed and its exit code, as subprocess.run(text=True) would give them; kills it
        when time is over.

        Raises:
            subprocess.TimeoutExpired: with its output so far.
        """
        self._process.join(timeout)
        late = self._process.exitcode is None
        self.kill()
        code = self._process.exitcode
        out, err = (
            path.read_text(errors="replace") if path.is_file() else "" for path in self._outputs
        )
        self._folder.cleanup()
        if late:
            raise subprocess.TimeoutExpired(self.arguments, timeout, out, err)
        return subprocess.CompletedProcess(self.arguments, code, out, err)

    @property
    def printed(self) -> str:
        """On stdout so far."""
        path = self._outputs[0]
        return path.read_text(errors="replace") if path.is_file() else ""

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self._process.exitcode is None:
            self._process.kill()
        self._process.join()


def run(
    program: str | Path, arguments: list[str], environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess:
    return Forked(program, arguments, environment).wait(timeout)


def run_ranks(
    program: str | Path,
    world_size: int,
    arguments: list[str],
    environment: dict[str, str],
    timeout: float,
) -> list[subprocess.CompletedProcess]:
    """The ranks of one job on this machine, each told its place as torchrun would; in the order of
    their ranks.
    """
    from train.rank.ports import free_port

    place = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    started: list[Forked] = []
    try:
        for rank in range(world_size):
            own = {**environment, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(Forked(program, arguments, own))
        deadline = time.monotonic() + timeout
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()


def _run(
    program: str | Path, arguments: list[str], environment: dict[str, str], outputs: list[str]
) -> None:
    """In the fork: become the command."""
    for descriptor, output in enumerate(outputs, 1):
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    # as in a process that nobody forked
    multiprocessing.set_start_method(None, force=True)
    os.chdir(ROOT)
    warnings.simplefilter("ignore")
    sys.argv = list(arguments)
    try:
        with contextlib.ExitStack() as stack:
            # a fork of the server ends without them
            stack.callback(atexit._run_exitfuncs)
            if isinstance(program, Path):
                sys.path.insert(0, str(program.parent))
                runpy.run_path(str(program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
