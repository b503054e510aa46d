"""Jobs over several nodes, through real sshd and pdsh: the numbers of one node, and clear words
when it cannot be.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from lab import wait_for
from scenario import (
    NUM_STEPS,
    SETTINGS,
    TIMEOUT,
    Outcome,
    injected,
    injection,
    losses,
    read_events,
    run,
    tail,
)

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(400)]


def assert_well(outcome: Outcome, losses: dict[int, float]) -> None:
    assert outcome.code == 0 and not outcome.verdicts, outcome.report()
    assert outcome.losses == losses and len(losses) == NUM_STEPS, outcome.report()
    assert not outcome.leftovers, outcome.report()


def test_two_nodes_give_the_losses_of_one(lab, tmp_path, data, reference):
    outcome = run(lab(2), tmp_path, data)
    assert_well(outcome, reference())
    assert (
        outcome.attempts[0]["hosts"] == ["node0", "node1"]
        and outcome.attempts[0]["world_size"] == 2
    )


@pytest.mark.parametrize(
    ("nodes", "slots", "shape"),
    [
        (
            3,
            1,
            ("model.num_experts=6", "parallel.expert_parallel_size=3", "train.global_batch_size=6"),
        ),
        (2, 2, ("parallel.expert_parallel_size=4",)),
    ],
)
def test_more_ranks_give_the_losses_of_one_node(
    lab, tmp_path, data, reference, nodes, slots, shape
):
    cluster = lab(nodes)
    cluster.hostfile(slots=slots)
    outcome = run(
        cluster,
        tmp_path,
        data,
        *shape,
        f"launch.num_nodes={nodes}",
        f"launch.num_devices={slots}",
        limit=240,
    )
    assert_well(outcome, reference(*shape, f"launch.num_devices={nodes * slots}"))


def test_the_supervisor_finds_the_address_that_faces_the_hosts(lab, tmp_path, data, reference):
    assert_well(run(lab(2), tmp_path, data, "launch.listen_addr=null"), reference())


@pytest.mark.parametrize("form", ["root@{0.name}", "{0.ipv6}", "root@{0.ipv6}"])
def test_hosts_with_a_user_or_an_ipv6_address_give_the_losses_of_one_node(
    lab, tmp_path, data, reference, form
):
    cluster = lab(2)
    cluster.hostfile(nodes=(), extra=[form.format(node) for node in cluster.nodes])
    outcome = run(cluster, tmp_path, data, "launch.listen_addr=null")
    assert_well(outcome, reference())
    assert outcome.attempts[0]["hosts"] == [form.format(node) for node in cluster.nodes]


def by_node(
    cluster, folder: Path, data, kind: str, fault: str, max_restarts: int, pace: float = 0.0
) -> list[str]:
    """What is typed on every node, but for launch.node_rank."""
    return [
        "-m",
        "launch.train",
        *SETTINGS,
        *data,
        f"launch={kind}",
        "launch.num_nodes=2",
        "launch.num_devices=1",
        f"launch.master_addr={cluster.nodes[0].address}",
        "launch.master_port=29511",
        f"run_dir={folder / 'run'}",
        f"launch.max_restarts={max_restarts}",
        *injection(folder, fault, pace),
    ]


def run_by_node(
    cluster,
    folder: Path,
    data,
    kind: str,
    fault: str = "",
    max_restarts: int = 0,
    limit: float = 150,
) -> tuple[list[int | None], dict[int, float], list[dict]]:
    """The same command on every node with its launch.node_rank; exit codes, losses and events."""
    line = by_node(cluster, folder, data, kind, fault, max_restarts)
    started = [
        cluster.start(node, [*line, f"launch.node_rank={rank}"], folder / f"log-{node.name}")
        for rank, node in enumerate(cluster.nodes)
    ]
    codes: list[int | None] = []
    for process in started:
        try:
            codes.append(process.wait(limit))
        except subprocess.TimeoutExpired:
            codes.append(None)
            process.kill()
    known = (folder / "run" / "metrics.jsonl").exists()
    return codes, losses(folder / "run") if known else {}, read_events(folder / "run")


def logs(folder: Path) -> str:
    return "\n".join(
        f"--- {path.name}\n{tail(path, 4000)}" for path in sorted(folder.glob("log-*"))
    )


@pytest.mark.parametrize("kind", ["deepspeed", "torchrun"])
def test_one_command_per_node_gives_the_losses_of_one(lab, tmp_path, data, reference, kind):
    cluster = lab(2)
    codes, found, _ = run_by_node(cluster, tmp_path, data, kind)
    assert codes == [0, 0], logs(tmp_path)
    assert found == reference(), logs(tmp_path)
    assert not cluster.job(), cluster.job()


@pytest.mark.parametrize("kind", ["deepspeed", "torchrun"])
def test_one_command_per_node_restarts_after_a_fault(lab, tmp_path, data, reference, kind):
    cluster = lab(2)
    codes, found, events = run_by_node(
        cluster, tmp_path, data, kind, fault="kill@1:7", max_restarts=1
    )
    assert codes == [0, 0] and injected(tmp_path), logs(tmp_path)
    verdicts = [event for event in events if event["event"] == "verdict"]
    assert [(v["kind"], v["ranks"], v["hosts"]) for v in verdicts] == [
        ("killed", [1], ["node1"])
    ], logs(tmp_path)
    assert found == reference(), logs(tmp_path)
    assert not cluster.job(), cluster.job()


def test_a_node_that_comes_back_joins_again(lab, tmp_path, data, reference):
    """What Kubernetes does with a pod: node1 loses power, boots, and starts the same command."""
    cluster = lab(2)
    line = by_node(cluster, tmp_path, data, "torchrun", "", 2, pace=0.4)

    def start(rank: int):
        return cluster.start(
            cluster.nodes[rank], [*line, f"launch.node_rank={rank}"], tmp_path / f"log-node{rank}"
        )

    first, lost = start(0), start(1)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and max(losses(metrics.parent), default=0) >= 6, 90, "step 6")
    cluster.power_cut(cluster.nodes[1])
    lost.wait(10)
    wait_for(
        lambda: any(e["event"] == "verdict" for e in read_events(metrics.parent)),
        TIMEOUT + 10,
        "a verdict",
    )
    cluster.boot(cluster.nodes[1])
    again = start(1)
    assert [first.wait(120), again.wait(30)] == [0, 0], logs(tmp_path)
    [verdict] = [e for e in read_events(metrics.parent) if e["event"] == "verdict"]
    assert (verdict["kind"], verdict["ranks"], verdict["hosts"]) == ("lost", [1], ["node1"]), logs(
        tmp_path
    )
    assert losses(metrics.parent) == reference(), logs(tmp_path)
    assert not cluster.job(), cluster.job()


def test_a_node_that_is_never_started_ends_the_job(lab, tmp_path, data):
    cluster = lab(2)
    line = [
        *by_node(cluster, tmp_path, data, "torchrun", "", 0),
        "launch.node_rank=0",
        "watchdog.startup_seconds=10",
    ]
    code = cluster.start(cluster.nodes[0], line, tmp_path / "log-node0").wait(90)
    assert code == 70 and "node_rank" in tail(tmp_path / "log-node0"), logs(tmp_path)
    assert not cluster.job(), cluster.job()


def refused(cluster, folder: Path, data) -> str:
    """The output of a command that must be refused before any rank starts."""
    outcome = run(cluster, folder, data, limit=60)
    assert outcome.code in (2, 69), outcome.report()
    assert not outcome.attempts and not outcome.leftovers and outcome.wall_seconds < 45, (
        outcome.report()
    )
    return outcome.log


def test_a_hostfile_with_a_wrong_host_is_refused_before_the_start(lab, tmp_path, data):
    cluster = lab(2)
    cluster.hostfile(nodes=cluster.nodes[:1], extra=["nowhere"])
    assert "nowhere" in refused(cluster, tmp_path, data)


def test_a_host_that_is_down_is_refused_before_the_start(lab, tmp_path, data):
    cluster = lab(2)
    cluster.power_cut(cluster.nodes[1])
    assert "node1" in refused(cluster, tmp_path, data)


def test_a_host_whose_name_is_not_known_is_refused_before_the_start(lab, tmp_path, data):
    cluster = lab(2)
    cluster.forget_host("node1", on=[cluster.login])
    assert "node1" in refused(cluster, tmp_path, data)


def test_too_few_hosts_are_refused_before_the_start(lab, tmp_path, data):
    cluster = lab(2)
    cluster.hostfile(nodes=cluster.nodes[:1])
    assert "names 1 host" in refused(cluster, tmp_path, data)


def test_nodes_that_know_no_names_train(lab, tmp_path, data, reference):
    """Only the login node resolves names; ranks meet by address, as they must where DNS is
    flaky.
    """
    cluster = lab(2)
    for name in ("node0", "node1", "login"):
        cluster.forget_host(name, on=cluster.nodes)
    assert_well(run(cluster, tmp_path, data), reference())


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_a_node_whose_clock_is_off_trains_and_its_faults_are_found(
    lab, tmp_path, data, reference, ahead
):
    outcome = run(lab(2, clocks={1: ahead}), tmp_path, data, fault="stop@1:7")
    assert outcome.code == 0 and outcome.losses == reference() and outcome.restarts == 1, (
        outcome.report()
    )
    assert (outcome.verdict["kind"], outcome.verdict["hosts"]) == ("frozen", ["node1"]), (
        outcome.report()
    )
    detected = outcome.verdict["time"] - (outcome.faults[0]["time"] - ahead)
    assert 0 < detected < TIMEOUT + 6, outcome.report()


def test_a_full_shm_harms_nobody(lab, tmp_path, data, reference):
    cluster = lab(2)
    cluster.nodes[1].run("sh", "-c", "head -c 300M /dev/zero > /dev/shm/full || true")
    assert_well(run(cluster, tmp_path, data), reference())
