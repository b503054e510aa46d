"""Running a command: compose its config, call it, and end as it should."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from launch.command.arguments import ArgumentError, arranged, refuse_two_values, require_sweep
from launch.command.help import command_name, page
from launch.command.interrupt import Interrupts
from launch.command.messages import fail, failure_of
from launch.command.refusals import explained
from launch.command.run_names import resolved
from launch.process.code_caches import use_own_code_caches
from launch.process.environment import adopt_rank
from launch.process.exits import FAILURES
from launch.process.identity import ROOT, is_worker, rank
from launch.process.secrets import redact_text
from launch.process.streams import forgive

QUIET = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)
"""Hydra keeps no directory or log of its own: the run directory is ours."""


@dataclass(frozen=True)
class Job:
    """One of a sweep."""

    overrides: tuple[str, ...]
    """Those of the command line, as this job has them."""
    started: float
    """Seconds of the epoch."""
    result: Any
    """What the command returned; None: it failed."""


def run_main(
    name: str,
    function: Callable[[DictConfig], Any],
    after_sweep: Callable[[list[Job]], None] | None = None,
) -> None:
    """Compose conf/<name>.yaml with the command line and call `function`; user errors end with one
    message, code 2.

    Args:
        after_sweep: told all jobs of a sweep (-m) at its end.
    """
    forgive()
    if Path.cwd() != ROOT:
        raise SystemExit(f"run from the repository root: cd {ROOT} && python -m launch.{name}")

    # With launch.node_rank the command starts the ranks of a node; srun may start it on each.
    if not any(argument.startswith("launch.node_rank=") for argument in sys.argv[1:]):
        try:
            adopt_rank()
        except ValueError as error:
            fail([str(error)])

    # Libraries' remarks about optional packages and their own deprecations, once per rank and
    # import.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", category=FutureWarning)

    os.environ.setdefault("OMP_NUM_THREADS", "1")

    try:
        use_own_code_caches(os.environ)
    except ValueError as error:
        fail([str(error)], every_rank=True)

    # DeepSpeed's launcher passes --local_rank=N, which Hydra does not know.
    arguments = [a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank"))]
    if {"--help", "-h"} & set(arguments):
        print(page(command_name()))
        return

    try:
        refuse_two_values(arguments)
        arguments, notes = resolved(command_name(), arguments)
        arguments = arranged(arguments, command_name())
        multirun = bool({"-m", "--multirun"} & set(arguments))
        if multirun:
            require_sweep(arguments)
    except ArgumentError as error:
        fail([str(error)])
    for note in notes if rank() == 0 else ():
        print(redact_text(note), file=sys.stderr, flush=True)

    sweep_dir = f"hydra.sweep.dir=runs/sweeps/{time.strftime('%Y%m%d-%H%M%S')}"
    sys.argv = [
        sys.argv[0],
        *arguments,
        *QUIET,
        *(
            [sweep_dir]
            if multirun and not any(a.startswith("hydra.sweep.dir") for a in arguments)
            else []
        ),
    ]

    failed_jobs = []
    jobs: list[Job] = []
    interrupts = Interrupts(rank=is_worker())

    def guarded(config: DictConfig) -> Any:
        overrides = tuple(HydraConfig.get().overrides.task)
        started = time.time()
        if multirun:
            own = [override.lstrip("+") for override in overrides if override not in arguments]
            told = redact_text(" ".join(own))
            print(f"job {len(jobs)} of the sweep: {told}", file=sys.stderr, flush=True)
        try:
            result = _explained(function, config, interrupts)
        except SystemExit as error:
            if not multirun:
                raise
            failed_jobs.append(error.code)  # the sweep goes on
            jobs.append(Job(overrides, started, None))
            return math.nan
        jobs.append(Job(overrides, started, result))
        return result

    # Hydra's launcher tells all jobs but the first, with every setting.
    logging.getLogger("hydra").setLevel(logging.WARNING)

    # Without it Hydra prints an error of its own and ends with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with interrupts, _composed_once(arguments):
        try:
            hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=name)(
                guarded
            )()
        except Exception as error:
            if problems := explained(error):
                fail(problems)
            raise
    if multirun and after_sweep is not None:
        after_sweep(jobs)
    if failed_jobs:
        # What ended all of them ends the sweep.
        code = failed_jobs[0] if len(set(failed_jobs)) == 1 else 1
        print(
            f"{len(failed_jobs)} job(s) of the sweep failed; their errors stand above",
            file=sys.stderr,
        )
        raise SystemExit(code if isinstance(code, int) else 1)


@contextmanager
def _composed_once(arguments: list[str]) -> Iterator[None]:
    """Hydra composes the whole config to read hydra.mode, and then again for the command. No file
    of conf/ sets a mode: without one on the command line, -m alone asks for a sweep.
    """
    get_mode = Hydra.get_mode
    if not any(argument.lstrip("+").startswith("hydra.mode=") for argument in arguments):
        Hydra.get_mode = lambda *_, **__: None
    try:
        yield
    finally:
        Hydra.get_mode = get_mode


def _explained(
    function: Callable[[DictConfig], Any], config: DictConfig, interrupts: Interrupts
) -> Any:
    """Call the function; a user's mistake ends with its message and its exit code."""
    from launch.config.build import ConfigError

    try:
        return function(config)
    except ConfigError as error:
        fail(error.problems)
    except OmegaConfBaseException as error:
        fail([f"the config cannot be read: {str(error).splitlines()[0]}"])
    except Exception as error:
        # a library has made an error of its own of the interrupt
        if interrupts.number is not None:
            raise KeyboardInterrupt from error
        kind = failure_of(error)
        if kind in ("failed", "communication", "out_of_memory"):
            raise
        fail([str(error)], every_rank=kind in ("config", "rendezvous"), code=FAILURES[kind].code)
