"""The judge on a simulated clock: whatever the order of symptoms, the verdict names the cause."""

from __future__ import annotations

import pytest

from launch.job.judge import SETTLE_SECONDS, Judge
from train.config.launching import WatchdogConfig

TIMEOUT, STARTUP = 10.0, 120.0


class Job:
    """Ranks that report every second until something happens to them."""

    def __init__(self, world_size: int = 4):
        self.judge = Judge(world_size, WatchdogConfig(TIMEOUT, STARTUP), 0.0)
        self.now = 0.0
        self.facts = {
            rank: {
                "step": 5,
                "phase": "forward",
                "beats": 50,
                "silent": 0.1,
                "idle": 0.2,
                "usual": 0.5,
                "state": "R",
            }
            for rank in range(world_size)
        }
        self.silent: set[int] = set()
        self.run(1)

    def host(self, rank: int) -> str:
        return f"node{rank // 2}"

    def run(self, seconds: float):
        """Time passes; the verdict when there is one."""
        until = self.now + seconds
        while self.now < until:
            self.now += 0.25
            for rank, facts in self.facts.items():
                if rank not in self.silent:
                    self.judge.report(rank, self.host(rank), self.now, facts)
                    for span in ("silent", "idle"):
                        if facts.get(f"grow_{span}"):
                            facts[span] += 0.25
            if (verdict := self.judge.verdict(self.now)) is not None:
                return verdict
        return None

    def exit(self, rank: int, code: int, **facts):
        self.judge.report(
            rank, self.host(rank), self.now, {**self.facts[rank], "exit_code": code, **facts}
        )
        self.silent.add(rank)

    def stuck(self, *ranks: int, key: str = "idle", **facts):
        for rank in ranks:
            self.facts[rank] |= {f"grow_{key}": True, **facts}


def lost_contact(job: Job, *ranks: int):
    for rank in ranks:
        job.exit(rank, 1, failure="communication", message="[gloo] Connection closed by peer")


@pytest.mark.parametrize("peers_first", [True, False])
def test_a_killed_rank_is_named_and_not_its_peers(peers_first):
    job = Job()
    if peers_first:
        lost_contact(job, 0, 1)
        assert job.run(0.5) is None
    job.exit(2, -9)
    if not peers_first:
        lost_contact(job, 0, 1, 3)
    verdict = job.run(SETTLE_SECONDS + 1)
    assert (verdict.kind, verdict.ranks, verdict.hosts) == ("killed", (2,), ("node1",))
    assert verdict.message == "rank 2 on node1: ended by SIGKILL (step 5, forward)"


def test_a_killed_agent_is_named_although_only_its_peers_report():
    job = Job()
    job.silent.add(3)
    job.judge.disconnected(3, job.now)
    lost_contact(job, 0, 1, 2)
    verdict = job.run(6)
    assert (verdict.kind, verdict.ranks) == ("lost", (3,))


def test_a_dead_link_is_named_although_peers_fail_first():
    job = Job()
    job.silent |= {2, 3}
    job.run(1)
    lost_contact(job, 0)
    verdict = job.run(TIMEOUT + 3)
    assert (verdict.kind, verdict.ranks, verdict.hosts) == ("lost", (2, 3), ("node1",))
    assert job.now < TIMEOUT + 4


def test_lost_contact_without_a_cause_is_the_verdict_in_the_end():
    job = Job()
    lost_contact(job, 1)
    assert job.run(TIMEOUT) is None
    assert job.run(5).kind == "communication"


def test_a_short_silence_and_a_reconnection_are_no_fault():
    job = Job()
    job.silent.add(1)
    job.judge.disconnected(1, job.now)
    assert job.run(1.5) is None
    job.silent.clear()
    assert job.run(20) is None


def test_a_stopped_rank_is_frozen_and_its_waiting_peers_are_not():
    job = Job()
    job.stuck(1, key="silent", state="T", grow_idle=True)
    job.stuck(0, 2, 3)
    verdict = job.run(TIMEOUT + 4)
    assert (verdict.kind, verdict.ranks) == ("frozen", (1,))


def test_of_hung_ranks_the_one_outside_collectives_is_named():
    job = Job()
    job.stuck(0, 1, 3, waiting=True)
    job.stuck(2, waiting=False)
    verdict = job.run(TIMEOUT + 4)
    assert (verdict.kind, verdict.ranks) == ("hung", (2,))


def test_of_hung_ranks_the_one_with_the_fewest_beats_is_named():
    job = Job()
    job.stuck(0, 1, 3)
    job.stuck(2, beats=49)
    assert job.run(TIMEOUT + 4).ranks == (2,)


def test_work_that_always_takes_long_is_given_time():
    job = Job()
    job.stuck(0, 1, 2, 3, usual=8.0, phase="save")
    assert job.run(31) is None
    assert job.run(5).kind == "hung"


def test_work_done_for_the_first_time_has_the_startup_limit():
    job = Job()
    job.stuck(0, 1, 2, 3, usual=None, phase="save")
    assert job.run(STARTUP - 2) is None
    assert job.run(10).kind == "hung"


def test_exit_0_before_the_end_is_a_fault_and_after_it_is_not():
    job = Job()
    job.exit(0, 0)
    lost_contact(job, 1)
    assert job.run(4).kind == "exited"
    job = Job()
    for rank in range(4):
        job.exit(rank, 0, phase="done")
    job.judge.launcher_exit(1, job.now)
    assert job.run(5) is None and job.judge.complete() and job.judge.step == 5


def test_ranks_ended_by_the_launcher_are_a_consequence():
    job = Job()
    job.exit(0, -15, told=True)
    job.exit(1, -15, told=True)
    job.exit(3, 1, failure="failed", message="RuntimeError: boom")
    verdict = job.run(4)
    assert (verdict.kind, verdict.ranks) == ("failed", (3,)) and "boom" in verdict.message


def test_ranks_that_never_report_are_named():
    judge = Judge(2, WatchdogConfig(TIMEOUT, STARTUP), 0.0)
    assert judge.verdict(STARTUP + 1) is None  # settles
    verdict = judge.verdict(STARTUP + 3)
    assert verdict.kind == "startup" and "ranks 0, 1" in verdict.message


def test_a_launcher_that_ends_alone_is_a_fault():
    job = Job()
    job.judge.launcher_exit(1, job.now)
    assert job.run(4).kind == "launcher"


def test_the_finished_step_is_the_slowest_ranks():
    job = Job()
    job.facts[2]["step"] = 4
    job.run(0.5)
    assert job.judge.step == 3


class Starting(Job):
    """Of two ranks only the second has come to its supervisor yet, and its process is not importing
    for long.
    """

    def __init__(self, **facts):
        super().__init__(2)
        self.judge = Judge(2, WatchdogConfig(TIMEOUT, STARTUP), 0.0)
        self.facts = {
            1: {"step": 0, "phase": "spawn", "beats": 0, "silent": 0.1, "idle": 0.2, "state": "R"}
            | facts
        }


def test_an_agent_that_dies_before_it_reports_is_named_and_not_the_one_its_launcher_then_ends():
    job = Starting()
    job.run(1)
    job.facts[1]["asked"] = True
    verdict = job.run(SETTLE_SECONDS + 1)
    assert verdict.kind == "startup" and verdict.ranks == ()
    assert "ranks 0 did not report, and the launcher told the others to end" in verdict.message


def test_so_it_is_when_the_others_are_gone_as_well():
    """DeepSpeed's launcher ends the whole tree of the other agents, and kills what does not go."""
    job = Starting()
    job.run(1)
    job.exit(1, -15, told=True, asked=True)
    job.judge.disconnected(1, job.now)
    job.judge.launcher_exit(247, job.now)
    verdict = job.run(SETTLE_SECONDS + 1)
    assert (
        verdict.kind == "startup"
        and "ranks 0 did not report, and the launcher has ended" in verdict.message
    )


def test_a_rank_that_fails_by_itself_is_named_although_others_have_not_reported():
    job = Starting()
    job.exit(1, 1, failure="config", message="no such file")
    job.judge.launcher_exit(1, job.now)
    verdict = job.run(SETTLE_SECONDS + 1)
    assert (verdict.kind, verdict.ranks) == ("config", (1,))


def test_a_scheduler_that_stops_everybody_while_they_start_is_no_fault():
    job = Starting(asked=True)
    job.judge.stopping = True
    assert job.run(SETTLE_SECONDS + 3) is None


def test_an_agent_that_dies_while_its_rank_starts_is_named_and_not_the_rank_its_launcher_ends():
    job = Job(2)
    for facts in job.facts.values():
        facts |= {"step": 0, "phase": "spawn", "beats": 0}
    job.run(0.5)
    job.silent.add(0)
    job.judge.disconnected(0, job.now)
    job.exit(1, -15, told=True, asked=True)
    verdict = job.run(6)
    assert (verdict.kind, verdict.ranks) == ("lost", (0,))
