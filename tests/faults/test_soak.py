"""One job and many faults: each is found, the right rank is named every time, and no number
changes.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from scenario import TIMEOUT, Job, run, tabulate

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]
NUM_FAULTS, SPACING = 6, 6
NUM_STEPS = SPACING * (NUM_FAULTS + 1)
SEEDS = [int(seed) for seed in os.environ.get("LOADSTONE_SOAK_SEEDS", "1,2").split(",")]
INSIDE = {
    "kill": "killed",
    "segv": "killed",
    "stop": "frozen",
    "hang": "hung",
    "spin": "hung",
    "exit0": "exited",
    "raise": "failed",
}
"""Kinds of tests/faults/site, and the verdict on each."""
OUTSIDE = {"agent": "lost", "cable": "lost"}
"""A rank's agent is killed; its node's cable is out for longer than the limit."""


def plan(seed: int) -> list[tuple[str, int, int]]:
    """Six faults of different kinds: (kind, rank, step)."""
    chance = random.Random(seed)
    kinds = chance.sample([*INSIDE, *OUTSIDE], NUM_FAULTS)
    return [
        (kind, chance.randrange(2), SPACING * (i + 1) + chance.randrange(3))
        for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_six_faults_in_a_row_change_nothing(lab, tmp_path, data, reference, seed):
    faults = plan(seed)

    def act(job: Job) -> None:
        """The faults from outside, each when its step is near."""
        for number, (kind, rank, step) in enumerate(faults):
            job.wait(
                lambda number=number: verdicts(job) >= number, f"fault {number} was judged", 120
            )
            if kind in INSIDE:
                continue
            job.wait(
                lambda number=number: attempts(job) == number + 1, f"attempt {number} began", 60
            )
            job.wait_for_step(step - 1)
            node = job.cluster.rank(rank)[0]
            if kind == "agent":
                agent = job.cluster.agent(rank)[1]
                job.record(kind, rank=rank)
                os.kill(agent.pid, signal.SIGKILL)
            else:
                job.record(kind, rank=rank)
                job.cluster.link(node, "down")
                time.sleep(TIMEOUT + 4)
                job.cluster.link(node, "up")

    inside = ";".join(f"{kind}@{rank}:{step}" for kind, rank, step in faults if kind in INSIDE)
    outcome = run(
        lab(3),
        tmp_path,
        data,
        f"train.num_steps={NUM_STEPS}",
        fault=inside,
        pace=0.3,
        act=act,
        max_restarts=2 * NUM_FAULTS,
        limit=600,
        settle=TIMEOUT + 5,
    )
    expected = [((INSIDE | OUTSIDE)[kind], [rank]) for kind, rank, _ in faults]
    assert [(v["kind"], v["ranks"]) for v in outcome.verdicts] == expected, (
        f"{faults}\n{outcome.report()}"
    )
    struck = sorted(outcome.faults, key=lambda fact: fact["time"])
    delays = [
        round(v["time"] - f["time"], 1) for v, f in zip(outcome.verdicts, struck, strict=True)
    ]
    assert all(0 <= delay <= TIMEOUT + 6 for delay in delays), f"{delays}\n{outcome.report()}"
    assert outcome.code == 0 and outcome.restarts == NUM_FAULTS and not outcome.leftovers, (
        outcome.report()
    )
    assert outcome.losses == reference(f"train.num_steps={NUM_STEPS}"), outcome.report()
    tabulate(
        outcome,
        f"soak {seed}: {', '.join(f'{kind}@{rank}' for kind, rank, _ in faults)}",
        TIMEOUT + 6,
        f"every rank named, found after {delays} s, losses bit-equal",
    )


def verdicts(job: Job) -> int:
    return sum(event["event"] == "verdict" for event in job.events())


def attempts(job: Job) -> int:
    return sum(event["event"] == "attempt" for event in job.events())
