"""One fault each, in a two-node job with experts across the nodes: detected in time, named rightly,
nothing lost beyond the last complete checkpoint, no process left. The rows of docs/operations.md's
table.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from scenario import NUM_STEPS, SAVE_INTERVAL, TIMEOUT, Job, Outcome, run, tabulate

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(400)]
AT_ONCE = 5.0
"""Bound for what leaves evidence: an exit, a closed connection."""
SILENT = TIMEOUT + 4.0
"""Bound for what only time reveals: the limit, reports every second, and the wait for a better
cause.
"""
STUCK = SILENT + 2.0
"""... and for asking every rank where it stands."""


def assert_recovered(
    outcome: Outcome,
    losses: dict[int, float],
    name: str,
    bound: float,
    kind: str,
    rank: int | None = 1,
    most_lost: int = SAVE_INTERVAL,
) -> None:
    """One verdict that names the right rank in time, one restart, and losses as if nothing had
    been.
    """
    verdict = outcome.verdict
    assert verdict["kind"] == kind, outcome.report()
    if rank is not None:
        host = outcome.attempts[0]["hosts"][rank]
        assert verdict["ranks"] == [rank] and verdict["hosts"] == [host], outcome.report()
        assert f"rank {rank} on {host}" in verdict["message"], outcome.report()
    assert "\n" not in verdict["message"] and verdict["message"] in outcome.log, outcome.report()
    assert 0 <= outcome.detection_seconds <= bound, outcome.report()
    assert outcome.code == 0 and outcome.restarts == 1, outcome.report()
    assert outcome.steps_lost is not None and outcome.steps_lost <= most_lost, outcome.report()
    assert outcome.losses == losses and len(losses) == NUM_STEPS, outcome.report()
    assert not outcome.leftovers, outcome.report()
    tabulate(outcome, name, bound, "restarted, losses bit-equal")


# --- a rank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind", "bound", "words"),
    [
        ("kill@1:7", "killed", AT_ONCE, "SIGKILL"),
        ("kill@0:7", "killed", AT_ONCE, "SIGKILL"),
        ("oom@1:7", "killed", AT_ONCE, "SIGKILL"),
        ("segv@0:7", "killed", AT_ONCE, "SIGSEGV"),
        ("exit0@1:7", "exited", AT_ONCE, "exit code 0"),
        ("exit3@1:7", "failed", AT_ONCE, "exit code 3"),
        ("raise@1:7", "failed", AT_ONCE, "injected fault"),
        ("raise@0:7:forward", "failed", AT_ONCE, "injected fault"),
        ("stop@1:7", "frozen", SILENT, "stopped"),
        ("stop@0:7:backward", "frozen", SILENT, "stopped"),
        ("hang@1:7", "hung", STUCK, "no progress"),
        ("hang@0:7:forward", "hung", STUCK, "no progress"),
        ("spin@1:7:forward", "hung", STUCK, "no progress"),
    ],
    ids=lambda value: str(value) if "@" in str(value) else "",
)
def test_a_broken_rank_is_named_and_the_job_goes_on(
    lab, tmp_path, data, reference, fault, kind, bound, words
):
    outcome = run(lab(2), tmp_path, data, fault=fault)
    assert_recovered(outcome, reference(), fault, bound, kind, rank=outcome.faults[0]["rank"])
    assert words in outcome.verdict["message"], outcome.report()
    if kind == "hung":
        stacks = outcome.run_dir / "failures" / "0" / f"rank-{outcome.faults[0]['rank']:05d}.txt"
        assert "sitecustomize.py" in stacks.read_text(), outcome.report()


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_rank_killed_while_it_saves_costs_that_checkpoint_only(
    lab, tmp_path, data, reference, asynchronous
):
    setting = f"checkpoint.asynchronous={asynchronous}"
    outcome = run(lab(2), tmp_path, data, setting, fault="kill@1:8:save")
    assert_recovered(
        outcome,
        reference(),
        f"kill@1:8:save, {setting}",
        AT_ONCE,
        "killed",
        most_lost=SAVE_INTERVAL + 1,
    )


@pytest.mark.parametrize("fault", ["kill@1:0:start", "raise@0:0:start", "kill@0:3"])
def test_a_fault_before_the_first_checkpoint_begins_anew(lab, tmp_path, data, reference, fault):
    outcome = run(lab(2), tmp_path, data, fault=fault)
    assert outcome.code == 0 and outcome.restarts == 1 and not outcome.resumed_steps, (
        outcome.report()
    )
    assert outcome.verdict["ranks"] == [outcome.faults[0]["rank"]] and not outcome.leftovers, (
        outcome.report()
    )
    assert outcome.losses == reference(), outcome.report()
    tabulate(outcome, f"{fault}, no checkpoint yet", AT_ONCE, "began anew, losses bit-equal")


def test_a_rank_that_hangs_at_the_start_is_found(lab, tmp_path, data, reference):
    outcome = run(lab(2), tmp_path, data, "watchdog.startup_seconds=25", fault="hang@1:0:start")
    assert outcome.code == 0 and outcome.restarts == 1 and not outcome.leftovers, outcome.report()
    assert outcome.verdict["ranks"] == [1] and outcome.detection_seconds < 25 + 6, outcome.report()
    assert outcome.losses == reference(), outcome.report()
    tabulate(outcome, "hang@1:0:start, startup_seconds=25", 31.0, "began anew, losses bit-equal")


def test_a_fault_in_the_last_evaluation_costs_no_step(lab, tmp_path, data, reference):
    outcome = run(lab(2), tmp_path, data, fault=f"kill@1:{NUM_STEPS}:evaluate")
    assert outcome.code == 0 and outcome.restarts == 1 and outcome.resumed_steps == [NUM_STEPS], (
        outcome.report()
    )
    assert outcome.losses == reference() and (outcome.run_dir / "result.json").is_file(), (
        outcome.report()
    )
    assert not outcome.leftovers, outcome.report()
    tabulate(outcome, f"kill@1:{NUM_STEPS}:evaluate", AT_ONCE, "resumed at the last step")


def test_the_same_fault_again_and_again_ends_the_job(lab, tmp_path, data):
    outcome = run(lab(2), tmp_path, data, fault="kill!@1:6", max_restarts=5, limit=240)
    assert outcome.code == 70 and 2 <= len(outcome.attempts) <= 3, outcome.report()
    assert all(v["ranks"] == [1] for v in outcome.verdicts), outcome.report()
    assert "no step" in outcome.log and not outcome.leftovers, outcome.report()
    tabulate(outcome, "kill!@1:6 at every start", AT_ONCE, "given up after no step was gained")


def test_without_restarts_a_fault_ends_the_job(lab, tmp_path, data):
    outcome = run(lab(2), tmp_path, data, fault="kill@1:7", max_restarts=0)
    assert outcome.code == 70 and outcome.restarts == 0 and not outcome.leftovers, outcome.report()
    assert outcome.verdict["restart"] is False and outcome.verdict["message"] in outcome.log, (
        outcome.report()
    )


@pytest.mark.parametrize("kind", ["slow", "slow_data"])
def test_a_straggler_is_reported_and_not_killed(lab, tmp_path, data, reference, kind):
    steps = "train.num_steps=24"
    outcome = run(lab(2), tmp_path, data, steps, fault=f"{kind}@1:3")
    found = [e for e in outcome.events if e["event"] == "straggler"]
    assert outcome.code == 0 and not outcome.verdicts, outcome.report()
    assert found and all(
        (e["rank"], e["host"]) == (1, "node1") and e["ratio"] > 1.5 for e in found
    ), outcome.report()
    assert outcome.losses == reference(steps), outcome.report()
    tabulate(outcome, f"{kind}@1: 0.25 s longer each time", None, "reported, trained on")


# --- processes around the ranks -------------------------------------------------------------------


def launch_process(job: Job, node: int):
    """DeepSpeed's launcher on a node."""
    found = [
        p
        for p in job.cluster.nodes[node].processes()
        if "deepspeed.launcher.launch" in p.command and p.command.split()[0].endswith("python")
    ]
    return found[0]


def test_a_killed_launcher_is_noticed(lab, tmp_path, data, reference):
    def act(job: Job) -> None:
        job.wait_for_step(6)
        job.signal(job.launcher(), signal.SIGKILL, "launcher killed")

    outcome = run(lab(2), tmp_path, data, act=act, pace=0.4)
    assert_recovered(outcome, reference(), "launcher killed", AT_ONCE, "launcher", rank=None)


def test_a_killed_launcher_of_a_node_is_noticed(lab, tmp_path, data, reference):
    def act(job: Job) -> None:
        job.wait_for_step(6)
        job.signal(launch_process(job, 1), signal.SIGKILL, "launcher of a node killed")

    outcome = run(lab(2), tmp_path, data, act=act, pace=0.4)
    assert_recovered(
        outcome, reference(), "launcher of a node killed", AT_ONCE, "launcher", rank=None
    )
    assert outcome.verdict["hosts"] in ([], ["node1"]), outcome.report()


@pytest.mark.parametrize("number", [0, 1])
def test_a_broken_ssh_session_harms_nobody(lab, tmp_path, data, reference, number):
    """pdsh's session to a node dies, the ranks it started do not: they hear the supervisor on a
    connection of their own. The console loses that node's output, which on node0 is all of it.
    """

    def act(job: Job) -> None:
        job.wait_for_step(6)
        sessions = [
            p
            for p in job.cluster.nodes[number].processes()
            if p.command.startswith(("sshd-session", "sshd: root"))
        ]
        assert sessions, job.cluster.nodes[number].processes()
        job.record("ssh session killed")
        for session in sessions:
            os.kill(session.pid, signal.SIGKILL)

    outcome = run(lab(2), tmp_path, data, act=act, pace=0.4)
    assert outcome.code == 0 and outcome.losses == reference() and not outcome.leftovers, (
        outcome.report()
    )
    tabulate(
        outcome,
        f"ssh session of node{number} killed",
        None,
        f"losses bit-equal, {outcome.restarts} restart{'' if outcome.restarts == 1 else 's'}",
    )


def test_a_killed_agent_takes_its_rank_along_and_is_named(lab, tmp_path, data, reference):
    def act(job: Job) -> None:
        job.wait_for_step(6)
        job.signal(job.cluster.agent(1)[1], signal.SIGKILL, "agent killed", rank=1)

    outcome = run(lab(2), tmp_path, data, act=act, pace=0.4)
    assert_recovered(outcome, reference(), "agent killed", AT_ONCE, "lost")


def test_a_killed_supervisor_leaves_no_orphan(lab, tmp_path, data, reference):
    def act(job: Job) -> None:
        assert (job.run_dir / "supervisor.json").exists() or not job.wait_for_step(1)
        job.wait_for_step(6)
        assert (job.run_dir / "supervisor.json").stat().st_mode & 0o777 == 0o600
        job.signal(job.supervisor(), signal.SIGKILL, "supervisor killed")

    cluster = lab(2)
    outcome = run(cluster, tmp_path, data, act=act, pace=0.4, settle=2 * TIMEOUT + 5)
    assert outcome.code not in (0, None) and not outcome.leftovers, outcome.report()
    tabulate(
        outcome,
        "supervisor killed",
        2 * TIMEOUT,
        f"every process gone after {outcome.settled_seconds} s",
    )
    again = run(cluster, tmp_path, (), f"resume={outcome.run_dir}")
    assert again.code == 0 and again.losses == reference(), again.report()


# --- nodes and the network ------------------------------------------------------------------------


def power_cut(job: Job) -> None:
    job.wait_for_step(6)
    job.record("power cut", rank=1)
    job.cluster.power_cut(job.cluster.nodes[1])


def cable_out(job: Job) -> None:
    job.wait_for_step(6)
    job.record("link down", rank=1)
    job.cluster.link(job.cluster.nodes[1], "down")


@pytest.mark.parametrize("act", [power_cut, cable_out])
def test_a_lost_node_is_replaced_by_a_spare(lab, tmp_path, data, reference, act):
    outcome = run(lab(3), tmp_path, data, act=act, pace=0.4, settle=TIMEOUT + 5)
    assert_recovered(
        outcome, reference(), f"{outcome.faults[0]['kind']}, spare host", SILENT, "lost"
    )
    assert outcome.attempts[1]["hosts"] == ["node0", "node2"], outcome.report()


@pytest.mark.parametrize("act", [power_cut, cable_out])
def test_a_lost_node_without_a_spare_ends_the_job(lab, tmp_path, data, act):
    outcome = run(lab(2), tmp_path, data, act=act, pace=0.4, settle=TIMEOUT + 5)
    assert outcome.code == 69 and outcome.verdict["kind"] == "lost", outcome.report()
    assert outcome.verdict["ranks"] == [1] and outcome.verdict["hosts"] == ["node1"], (
        outcome.report()
    )
    assert outcome.detection_seconds <= SILENT and not outcome.leftovers, outcome.report()
    tabulate(outcome, f"{outcome.faults[0]['kind']}, no spare host", SILENT, "ended")


def test_all_ranks_of_a_lost_node_are_named(lab, tmp_path, data, reference):
    """Two ranks a node; the second node loses power, the third takes its place."""
    cluster = lab(3)
    cluster.hostfile(slots=2)
    shape = ("parallel.expert_parallel_size=4", "launch.num_devices=2")
    outcome = run(cluster, tmp_path, data, *shape, act=power_cut, pace=0.4, limit=300)
    assert outcome.verdict["ranks"] == [2, 3] and outcome.verdict["hosts"] == ["node1"], (
        outcome.report()
    )
    assert outcome.code == 0 and outcome.restarts == 1 and not outcome.leftovers, outcome.report()
    assert outcome.losses == reference("parallel.expert_parallel_size=4", "launch.num_devices=4"), (
        outcome.report()
    )
    tabulate(
        outcome,
        "power cut of a node with two ranks, spare host",
        SILENT,
        "restarted, losses bit-equal",
    )


def test_an_elastic_job_goes_on_with_the_hosts_that_are_left(lab, tmp_path, data, reference):
    shape = ("parallel.expert_parallel_size=1", "optim.eps=0.1", "optim.lr=0.05")
    outcome = run(lab(2), tmp_path, data, *shape, "launch.elastic=true", act=power_cut, pace=0.4)
    expected = reference(*shape)
    assert outcome.code == 0 and outcome.attempts[1]["hosts"] == ["node0"], outcome.report()
    assert outcome.losses.keys() == expected.keys(), outcome.report()
    assert max(abs(outcome.losses[s] - expected[s]) / expected[s] for s in expected) < 1e-4, (
        outcome.report()
    )
    assert not outcome.leftovers, outcome.report()
    tabulate(outcome, "power cut, elastic", SILENT, "went on with one node")


def test_a_short_break_of_the_network_is_survived(lab, tmp_path, data, reference):
    def act(job: Job) -> None:
        job.wait_for_step(6)
        job.record("link down for 3 s")
        job.cluster.link(job.cluster.nodes[1], "down")
        time.sleep(3)
        job.cluster.link(job.cluster.nodes[1], "up")

    outcome = run(lab(2), tmp_path, data, act=act, pace=0.4)
    assert outcome.code == 0 and outcome.restarts == 0 and not outcome.verdicts, outcome.report()
    assert outcome.losses == reference() and not outcome.leftovers, outcome.report()
    tabulate(outcome, "link down for 3 s", None, "survived, losses bit-equal")


def test_a_lossy_and_slow_network_is_survived(lab, tmp_path, data, reference):
    cluster = lab(2)
    try:
        cluster.netem(cluster.nodes[1], "delay", "20ms", "loss", "1%")
    except RuntimeError as error:
        pytest.skip(f"this kernel has no netem: {error}")
    outcome = run(cluster, tmp_path, data, limit=300)
    assert outcome.code == 0 and not outcome.verdicts and outcome.losses == reference(), (
        outcome.report()
    )


def test_a_node_whose_sends_are_slow_is_survived(lab, tmp_path, data, reference):
    """For kernels without netem: every send of node1 to another machine waits 20 ms."""
    outcome = run(lab(2, delays={1: 0.02}), tmp_path, data, limit=300)
    assert outcome.code == 0 and not outcome.verdicts and outcome.losses == reference(), (
        outcome.report()
    )
    records = [
        json.loads(line) for line in (outcome.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [record["perf/step_seconds"] for record in records if "perf/step_seconds" in record]
    assert statistics.median(steps) > 0.2, f"nothing was slow: {steps}"
    tabulate(outcome, "every send of a node 20 ms late", None, "survived, losses bit-equal")


def test_a_stranger_on_the_supervisors_port_changes_nothing(lab, tmp_path, data, reference):
    """Rubbish, a guessed token and silence from another node."""

    def act(job: Job) -> None:
        job.wait_for_step(3)
        address = (job.run_dir / "supervisor.json").read_text()
        script = (
            "import json, socket, sys, time; a = json.loads(sys.argv[1]); "
            "open_ = [socket.create_connection((a['host'], a['port'])) for _ in range(40)]; "
            "open_[0].sendall(b'\\xff' * 3000000); "
            'open_[1].sendall(b\'{"proof": "x", "rank": 1, "host": "h", "attempt": 0}\\n\'); '
            "open_[2].sendall(b'[]\\n'); open_[3].sendall(b'{\"order\": \"abort\"}\\n'); "
            "time.sleep(2)"
        )
        job.record("stranger")
        job.cluster.nodes[1].run(sys.executable, "-c", script, address, check=False)

    outcome = run(lab(2), tmp_path, data, act=act, pace=0.5)
    assert outcome.code == 0 and not outcome.verdicts and outcome.losses == reference(), (
        outcome.report()
    )


def test_an_unreachable_metrics_server_harms_nobody(lab, tmp_path, data, reference):
    """W&B with a key, asked to be online, at an address where nobody answers."""
    secrets = tmp_path / "secrets"
    secrets.write_text("WANDB_API_KEY=" + "0" * 40 + "\n")
    secrets.chmod(0o600)
    outcome = run(
        lab(2),
        tmp_path,
        data,
        "tracker.wandb.mode=auto",
        f"launch.secrets_file={secrets}",
        "+launch.env.WANDB_BASE_URL='http://10.77.0.99:8080'",
        "+launch.env.WANDB_MODE='online'",
        limit=240,
    )
    assert outcome.code == 0 and outcome.losses == reference() and not outcome.leftovers, (
        outcome.report()
    )
    assert (
        "0" * 40 not in outcome.log
        and "0" * 40 not in (outcome.run_dir / "config.yaml").read_text()
    )
    tabulate(outcome, "W&B server unreachable", None, "trained on")


# --- orders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_job_asked_to_stop_saves_and_resumes(lab, tmp_path, data, reference, number):
    def act(job: Job) -> None:
        job.wait_for_step(6)
        job.signal(job.supervisor(), number, number.name)

    cluster = lab(2)
    outcome = run(cluster, tmp_path, data, act=act, pace=0.4)
    assert outcome.code == 0 and not outcome.verdicts and not outcome.leftovers, outcome.report()
    stopped = max(outcome.losses)
    assert (
        6 <= stopped < NUM_STEPS
        and (outcome.run_dir / "checkpoints" / f"step-{stopped:08d}").is_dir()
    ), outcome.report()
    again = run(cluster, tmp_path, (), f"resume={outcome.run_dir}")
    assert again.code == 0 and again.losses == reference() and not again.leftovers, again.report()
    tabulate(outcome, f"{number.name} to the job", 30.0, "saved, exit 0, resumed bit-equal")


def test_a_second_job_on_the_directory_is_refused(lab, tmp_path, data, reference):
    second: list[int] = []

    def act(job: Job) -> None:
        job.wait_for_step(5)  # after the first checkpoint, so that the lock alone is in the way
        job.record("second job")
        line = ["-m", "launch.train", f"resume={job.run_dir}", "launch.env={}"]
        # the same machine and another one
        for node in (job.cluster.login, job.cluster.nodes[0]):
            second.append(job.cluster.start(node, line, tmp_path / "log-second").wait(60))

    outcome = run(lab(2), tmp_path, data, act=act, pace=1.5)
    words = (tmp_path / "log-second").read_text()
    assert second == [73, 73] and "Traceback" not in words, words + outcome.report()
    assert outcome.code == 0 and not outcome.verdicts and outcome.losses == reference(), (
        outcome.report()
    )
    tabulate(outcome, "two jobs on one directory", None, "the second refused (73)")


def test_a_job_killed_without_clean_up_can_be_resumed_after_its_lock_is_stale(
    lab, tmp_path, data, reference
):
    """The whole login node loses power with the lock held."""
    cluster = lab(2)

    def act(job: Job) -> None:
        job.wait_for_step(6)
        job.record("power cut of the login node")
        cluster.power_cut(cluster.login)

    # Ranks notice within the time limit; a quick machine would have done all steps by then.
    outcome = run(cluster, tmp_path, data, act=act, pace=2.0, settle=2 * TIMEOUT + 5)
    assert not outcome.leftovers, outcome.report()
    cluster.boot(cluster.login)
    for node in cluster.nodes:
        cluster.wait_for_ssh(node)
    until = time.monotonic() + 120
    again = run(cluster, tmp_path, (), f"resume={outcome.run_dir}")
    while again.code == 73 and time.monotonic() < until:
        time.sleep(5)
        again = run(cluster, tmp_path, (), f"resume={outcome.run_dir}")
    assert again.code == 0 and again.losses == reference(), again.report()
    tabulate(
        outcome,
        "power cut of the login node",
        2 * TIMEOUT,
        f"every process gone after {outcome.settled_seconds} s",
    )


def test_an_address_that_cannot_be_listened_on_is_refused(lab, tmp_path, data):
    outcome = run(lab(2), tmp_path, data, "launch.listen_addr=10.99.0.1", limit=60)
    assert outcome.code == 2 and "10.99.0.1" in outcome.log and "Traceback" not in outcome.log, (
        outcome.report()
    )


def test_a_port_in_use_is_named(lab, tmp_path, data):
    """launch.master_port is taken on the first host, where only rank 0 can see it."""
    cluster = lab(2)
    taken = cluster.start(
        cluster.nodes[0],
        [
            "-c",
            "import socket, time; s = socket.create_server(('0.0.0.0', 29533)); time.sleep(300)",
        ],
        tmp_path / "log-taken",
    )
    outcome = run(cluster, tmp_path, data, "launch.master_port=29533", max_restarts=1)
    taken.kill()
    assert outcome.code == 2 and not outcome.leftovers, outcome.report()
    assert "port 29533 is taken: free it" in outcome.log and "Traceback" not in outcome.log, (
        outcome.report()
    )
    assert outcome.verdict["kind"] == "rendezvous" and outcome.verdict["ranks"] == [0], (
        outcome.report()
    )
