"""Shared fixtures: process groups of real gloo ranks, and a quiet environment."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forked, tiers

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# A shell has what it starts in the background ignore Ctrl-C, and processes hand that on: what tests
# send themselves and others would be lost.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

BEGAN = pytest.StashKey[float]()
CPU = "cpu_seconds"
"""Of a case that passed, with the fixtures that it was the first to need."""


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is fast, and put the files that take longest first."""
    for item in items:
        if (
            not any(item.get_closest_marker(name) for name in tiers.OTHERS)
            and not tiers.PROCESSES.intersection(item.fixturenames)
            and item.originalname not in tiers.starting_processes(item.path)
        ):
            item.add_marker("fast")
    items.sort(key=lambda item: tiers.order(str(item.path.relative_to(ROOT))))


def pytest_collection_finish() -> None:
    """What is imported and collected stays until the end: nothing of it is garbage to look for, as
    DeepSpeed does with every engine.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[BEGAN] = tiers.cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """A case that takes far more than its tier allows fails; nightly ones may take as long as they
    do.
    """
    result = yield
    tier = "fast" if item.get_closest_marker("fast") else "default"
    # the server that forks ranks may have ended meanwhile, and its time with it
    used = max(0.0, tiers.cpu_seconds() - item.stash[BEGAN])
    item.user_properties.append((CPU, used))
    if used > tiers.SECONDS[tier] and not any(
        item.get_closest_marker(name) for name in ("nightly", "faults", "gpu")
    ):
        pytest.fail(
            f"{used:.0f} s of CPU time; a {tier} test may take {tiers.SECONDS[tier]:.0f} "
            "(tests/README.md)"
        )
    return result


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The tests that took most of the processors, whose times a busy machine stretches less than
    those by the clock. .pytest_cache/v/cpu_seconds has all of them.
    """
    used: dict[str, float] = {}
    for report in terminalreporter.getreports("passed"):
        name = report.nodeid.split("[")[0]
        used[name] = used.get(name, 0.0) + dict(report.user_properties).get(CPU, 0.0)
    if hasattr(config, "cache") and config.cache is not None and len(used) > 100:
        config.cache.set(CPU, used)
    terminalreporter.section(f"most processor time of {sum(used.values()):.0f} s")
    for name in sorted(used, key=lambda name: -used[name])[:25]:
        terminalreporter.line(f"{used[name]:7.2f}s {name}")


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_open():
    """An engine or a process group that a test left open fails that test's file, not the next one
    that uses them: the topology of an engine stays in a global of DeepSpeed's. So do more threads
    than there were: all later tests would wait for each other's cores.
    """
    yield
    left = []
    torch = sys.modules.get("torch")
    asked = int(os.environ["OMP_NUM_THREADS"])
    if torch is not None and torch.get_num_threads() > asked:
        torch.set_num_threads(asked)
        left.append("threads of torch or OpenMP (set their number back)")

    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None and groups.mpu is not None:
        groups.mpu = None
        left.append("an Engine (call its close())")

    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
        left.append("a process group")

    if left:
        pytest.fail(f"left open: {' and '.join(left)}")


@pytest.fixture(scope="session")
def interpret():
    """interpret(script, *args) -> stdout of a script of tests/ops/interpreter in Triton's
    interpreter.

    TRITON_INTERPRET is read when a kernel is decorated and would spoil compilation in the same
    process, and a wild pointer would take the test run with it: cases run in processes of their
    own, many in each.
    """

    def run(script: str, *arguments: str) -> str:
        environment = os.environ | {
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, str(ROOT / "tests/ops/interpreter" / script), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def run_ranks():
    """run_ranks(script, world_size, *args) -> list of JSON objects that rank 0 printed, one a line.

    Every rank is a process of its own (tests/forked.py); output that is not JSON shows up in the
    failure message.
    """

    def run(script: str, world_size: int, *args: str, timeout: int = 500) -> list[dict]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        done = forked.run_ranks(
            ROOT / "tests" / script, world_size, list(args), environment, timeout
        )
        failed = [rank for rank, result in enumerate(done) if result.returncode != 0]
        assert not failed, f"ranks {failed} of {script} failed:\n" + "\n".join(
            f"--- rank {rank}\n{done[rank].stdout[-2000:]}\n{done[rank].stderr[-4000:]}"
            for rank in failed
        )
        return [json.loads(line) for line in done[0].stdout.splitlines() if line.startswith("{")]

    return run
