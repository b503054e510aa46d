"""Shared fixtures: process groups of real gloo ranks, and a quiet environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def interpret():
    """interpret(script, *args) -> stdout of a script of tests/ops/interpreter in Triton's interpreter.

    TRITON_INTERPRET is read when a kernel is decorated and would spoil compilation in the same process, and a wild pointer
    would take the test run with it: cases run in processes of their own, many in each.
    """
    def run(script: str, *arguments: str) -> str:
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                                    "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "tests/ops/interpreter" / script), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    return run


@pytest.fixture(scope="session")
def run_ranks():
    """run_ranks(script, world_size, *args) -> list of JSON objects that rank 0 printed, one a line.

    Every rank is a process of its own; output that is not JSON shows up in the failure message.
    """
    def run(script: str, world_size: int, *args: str, timeout: int = 500) -> list[dict]:
        from train.ports import free_port

        port = free_port()
        processes = []
        for rank in range(world_size):
            env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT),
                   "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            processes.append(subprocess.Popen([sys.executable, "-W", "ignore", str(ROOT / "tests" / script), *args],
                                              cwd=ROOT, env=env, text=True,
                                              stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        outputs = []
        try:
            for process in processes:
                outputs.append(process.communicate(timeout=timeout))
        finally:
            for process in processes:
                process.kill()
        failed = [r for r, p in enumerate(processes) if p.returncode != 0]
        assert not failed, f"ranks {failed} of {script} failed:\n" + "\n".join(
            f"--- rank {r}\n{outputs[r][0][-2000:]}\n{outputs[r][1][-4000:]}" for r in failed)
        return [json.loads(line) for line in outputs[0][0].splitlines() if line.startswith("{")]
    return run
