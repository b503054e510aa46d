"""Command lines of the launchers, hostfiles, batch scripts, and what an agent makes of its
environment.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import subprocess
import sys

import pytest

from launch.command.messages import failure_of
from launch.job import wire
from launch.job.agent import _catches, in_collective
from launch.job.judge import Verdict
from launch.job.supervisor import Supervisor
from launch.launchers import hosts, slurm
from launch.launchers.start import Rendezvous, command
from launch.process.environment import adopt_rank, interface_of
from launch.process.exits import BAD_CONFIG, FAILURES
from tests.lone import without_place
from train.config.launching import LaunchConfig, SlurmConfig, WatchdogConfig
from train.config.training import CheckpointConfig
from train.rank.ports import STORE, RendezvousError, free_port, listen
from train.rank.runtime import process_group

AGENT = ["RUN/supervisor.json", "0"]
HERE = Rendezvous("10.0.0.1", 29500)


def test_deepspeed_on_this_machine_looks_for_no_hostfile():
    line = command(LaunchConfig("deepspeed", 4), 1, HERE, AGENT)
    assert {"--num_gpus=4", "--hostfile=/dev/null", "--no_local_rank"} <= set(line)
    assert line[-4:] == ["--module", "launch.job.agent", *AGENT] and "--force_multi" not in line


def test_deepspeed_over_ssh_carries_the_hosts():
    launch = LaunchConfig("deepspeed", 4, 2, hostfile="H", launcher="openmpi", ssh_port=2222)
    line = set(command(launch, 2, HERE, AGENT, "RUN/hostfile"))
    assert {
        "--hostfile=RUN/hostfile",
        "--num_nodes=2",
        "--master_addr=10.0.0.1",
        "--master_port=29500",
        "--force_multi",
        "--launcher=openmpi",
        "--ssh_port=2222",
        "--no_ssh_check",
    } <= line


def test_one_command_per_node():
    launch = LaunchConfig("deepspeed", 4, 2, node_rank=1, master_addr="10.0.0.1", master_port=29500)
    line = set(command(launch, 2, HERE, AGENT, "RUN/hostfile"))
    assert {
        "--no_ssh",
        "--node_rank=1",
        "--hostfile=RUN/hostfile",
    } <= line and "--force_multi" not in line
    launch = LaunchConfig("torchrun", 4, 2, node_rank=1, master_addr="10.0.0.1", master_port=29500)
    line = command(launch, 2, HERE, AGENT)
    # torch's own static rendezvous would listen on every interface
    assert line[2] == "launch.launchers.torch_run"
    assert {
        "--nnodes=2",
        "--rdzv-backend=one_address",
        "--rdzv-endpoint=10.0.0.1:29500",
        "--rdzv-conf=rank=1",
    } <= set(line)


def test_on_one_machine_torchrun_keeps_its_rendezvous_in_a_private_file():
    line = command(
        LaunchConfig("torchrun", 4),
        1,
        Rendezvous("127.0.0.1", 29500),
        AGENT,
        store_folder="PRIVATE",
    )
    assert {
        "--rdzv-backend=c10d",
        "--rdzv-conf=store_type=file",
        "--rdzv-endpoint=PRIVATE/torchrun-0",
        "--local-addr=127.0.0.1",
    } <= set(line)


def test_srun_starts_the_agents():
    line = command(LaunchConfig("slurm", 8, 4), 4, Rendezvous(None, 1), AGENT)
    assert line[:3] == ["srun", "--nodes=4", "--ntasks-per-node=8"] and line[-3:] == [
        "launch.job.agent",
        *AGENT,
    ]


class Run:
    launch = LaunchConfig(
        "slurm", 8, 4, slurm=SlurmConfig("gpu", time="1-00:00:00", extra=("--exclusive",))
    )
    checkpoint = CheckpointConfig(grace_seconds=90)
    experiment_name = "big"


def test_the_batch_script_signals_the_supervisor_before_the_time_limit(tmp_path):
    script = slurm.batch_script(Run(), tmp_path / "a run")
    for option in (
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--partition=gpu",
        "--time=1-00:00:00",
        "--signal=B:USR1@120",
        "--requeue",
        "--exclusive",
    ):
        assert f"#SBATCH {option}\n" in script
    assert "account" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    command_line = script.splitlines()[-1]
    words = subprocess.run(
        ["bash", "-c", command_line.replace("exec ", "printf '%s\\n' ", 1)],
        text=True,
        capture_output=True,
        check=True,
    ).stdout.splitlines()
    assert words[-1] == f"+saved_config='{tmp_path / 'a run' / 'config.yaml'}'"


def test_submitting_without_slurm_says_where_the_script_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"needs sbatch.*slurm\.sh"):
        slurm.submit(Run(), tmp_path)


def test_submitting_passes_on_what_sbatch_says(tmp_path, monkeypatch):
    fake = tmp_path / "sbatch"
    fake.write_text("#!/bin/sh\ngrep -q SBATCH $1 && echo Submitted batch job 7\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm.submit(Run(), tmp_path) == "Submitted batch job 7"
    fake.write_text("#!/bin/sh\necho invalid partition >&2; exit 1\n")
    with pytest.raises(ValueError, match="invalid partition"):
        slurm.submit(Run(), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb 2\n", "line 2 is 'b 2'"),
        ("a slots=0\n", "line 1"),
        ("a slots=2\na slots=2\n", "a second time"),
        ("# nothing\n", "names no host"),
        ("-oProxyCommand=x slots=1\n", "no host name"),
        ("a slots=1\nroot@a slots=1\n", "line 2 names a a second time"),
        ("node[1-4] slots=8\n", "line 1: .*on a line of its own"),
        ("a,b slots=8\n", "no host name"),
        ("^hosts slots=8\n", "no host name"),
        ("-l@a slots=1\n", "no host name"),
        ("@a slots=1\n", "no host name"),
        ("a@b@c slots=1\n", "no host name"),
        ("ssh:a slots=1\n", "no host name"),
        ("[2001:db8::2] slots=1\n", "has brackets; write 2001:db8::2"),
    ],
)
def test_a_broken_hostfile_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(ValueError, match=message):
        hosts.parse_hostfile(tmp_path / "hostfile")


def test_a_hostfile_may_have_comments_and_spares(tmp_path):
    (tmp_path / "hostfile").write_text("a slots=4 # first\n\n#b slots=4\nc slots=2\n")
    found = hosts.parse_hostfile(tmp_path / "hostfile")
    assert found == (hosts.Host("a", 4), hosts.Host("c", 2))
    assert "host c has 2 slots" in hosts.hosts_problems(found, 2, 4)[0]
    assert "names 2 hosts" in hosts.hosts_problems(found, 3, 2)[0]


@pytest.mark.parametrize(
    ("name", "machine", "pdsh_name"),
    [
        ("ubuntu@worker-1.cluster", "worker-1.cluster", "ubuntu@worker-1.cluster"),
        ("10.0.0.2", "10.0.0.2", "10.0.0.2"),
        ("2001:db8::2", "2001:db8::2", "ssh:2001:0db8:0000:0000:0000:0000:0000:0002"),
        ("root@2001:db8::2", "2001:db8::2", "ssh:root@2001:0db8:0000:0000:0000:0000:0000:0002"),
    ],
)
def test_a_host_may_be_given_with_its_user_and_by_any_address(tmp_path, name, machine, pdsh_name):
    (tmp_path / "hostfile").write_text(f"{name}\tslots=4\r\n")
    (host,) = hosts.parse_hostfile(tmp_path / "hostfile")
    assert (host.name, host.slots, host.machine, host.pdsh_name) == (name, 4, machine, pdsh_name)
    assert hosts.hosts_problems([host], 1, 4) == []
    takes_all = name == machine and ":" not in name
    assert bool(hosts.hosts_problems([host], 1, 4, "openmpi")) != takes_all


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="needs pdsh")
@pytest.mark.parametrize(
    "name",
    [
        "someone@worker-1",
        "fd00:77::2",
        "someone@fd00:77::2",
        "::2",
        "fd00::a",
        "2001:db8:0:1:2:3:4:5",
    ],
)
def test_pdsh_understands_the_names_it_is_given(tmp_path, monkeypatch, name):
    """A stand-in for ssh says what it was asked for."""
    fake = tmp_path / "ssh"
    fake.write_text('#!/bin/sh\necho "asked $*"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    host = hosts.Host(name, 1)
    said = subprocess.run(
        ["pdsh", "-S", "-w", host.pdsh_name, "true"],
        env={**os.environ, "PDSH_RCMD_TYPE": "ssh"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    asked = said.partition("asked ")[2].split()
    expected = ipaddress.ip_address(host.machine).exploded if host.is_ipv6 else host.machine
    assert expected in asked, said
    assert name == host.machine or f"-l{name.removesuffix('@' + host.machine)}" in asked, said


@pytest.mark.parametrize("name", ["fe80::1", "root@::1"])
def test_an_address_that_means_another_machine_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "hostfile").write_text(f"{name} slots=1\n")
    assert (
        "link-local or loopback"
        in hosts.hosts_problems(hosts.parse_hostfile(tmp_path / "hostfile"), 1, 1)[0]
    )


@pytest.mark.parametrize("user", ["", "root@"])
def test_the_address_that_faces_a_host_is_found_for_every_form(monkeypatch, user):
    assert (
        hosts.facing_address(f"{user}127.0.0.1").startswith("127.")
        and hosts.address_of(f"{user}127.0.0.1") is None
    )
    assert (
        hosts.address_of(f"{user}10.1.2.3") == "10.1.2.3" and hosts.address_of(f"{user}::1") is None
    )
    assert hosts.address_of(f"{user}2001:db8::2") == "2001:db8::2"
    # a name with addresses of both kinds
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, port, **options: (
            [
                (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("2001:db8::9", 0, 0, 0)),
                (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("10.9.9.9", 0)),
            ]
            if host == "both"
            else pytest.fail(host)
        ),
    )
    assert hosts.address_of(f"{user}both") == "10.9.9.9"


@pytest.mark.skipif(
    not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"), reason="needs IPv6"
)
def test_the_supervisor_can_listen_on_an_ipv6_address():
    assert hosts.facing_address("root@::1") == "::1"
    with socket.create_server(("::1", 0), family=hosts.family_of("::1")) as server:
        address = wire.JobFile(*server.getsockname()[:2], "token")
        with socket.create_connection((address.host, address.port)):
            pass


def test_hosts_that_do_not_answer_are_named(tmp_path, monkeypatch):
    fake = tmp_path / "ssh"
    fake.write_text(
        "#!/bin/sh\nfor a; do last=$host; host=$prev; prev=$a; done\n"
        '[ "$host" = good ] || { echo "no route to $host" >&2; exit 255; }\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = hosts.unreachable([hosts.Host("good", 1), hosts.Host("bad", 1)], None)
    assert found == {"bad": "no route to bad"}


@pytest.mark.parametrize(
    "names",
    [
        {
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "4",
        },
        {
            "SLURM_PROCID": "3",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NODELIST": "n[1,5]",
            "SLURM_JOB_ID": "30001",
        },
    ],
)
def test_ranks_of_other_launchers_get_torchs_names(monkeypatch, names):
    without_place(monkeypatch)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    adopt_rank()
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]) == (
        "3",
        "1",
        "4",
    )
    if "SLURM_PROCID" in names:
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("n1", "30001")


def test_the_loopback_interface_is_found_by_its_address():
    assert interface_of("127.0.0.1") == "lo" and interface_of("203.0.113.7") is None


def test_a_process_is_told_to_stop_once_it_listens():
    listening = (
        "import signal; signal.signal(signal.SIGTERM, lambda *a: None); print('on', "
        "flush=True); signal.pause()"
    )
    deaf = "print('on', flush=True); import time; time.sleep(60)"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for code in (listening, deaf)
    ]
    try:
        assert all(p.stdout.readline() == "on\n" for p in processes)
        assert [_catches(p.pid, 15) for p in processes] == [True, False]
    finally:
        for process in processes:
            process.kill()


STACKS = """Thread 0x1 (most recent call first):
  File "/x/train/heartbeat.py", line 9 in _alive

Current thread 0x2 (most recent call first):
  File "{top}", line 1 in f
  File "/x/train/loop.py", line 2 in optimisation_step
  File "/x/launch/train.py", line 3 in work
"""


@pytest.mark.parametrize(
    ("top", "waiting"),
    [
        ("/s/torch/distributed/distributed_c10d.py", True),
        ("/s/train/pipeline/link.py", True),
        ("/s/time.py", False),
    ],
)
def test_stacks_tell_who_waits_for_others(top, waiting):
    assert in_collective(STACKS.format(top=top)) is waiting
    assert in_collective("") is None


# --- a port that is taken -------------------------------------------------------------------------


@pytest.fixture
def taken():
    """(address, port) on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()


def nodes(port: int, **more) -> LaunchConfig:
    return LaunchConfig(
        **{
            "kind": "torchrun",
            "num_nodes": 2,
            "node_rank": 0,
            "master_addr": "127.0.0.1",
            "master_port": port,
            **more,
        }
    )


def test_a_taken_port_is_refused_before_anything_starts(taken, tmp_path, monkeypatch):
    with pytest.raises(
        RendezvousError,
        match=f"port {taken[1]} is taken: free it, or choose another launch.master_port",
    ):
        hosts.refuse_taken_port(nodes(taken[1]))
    monkeypatch.setattr(hosts, "address_of", {"here": taken[0]}.get)
    (tmp_path / "hosts").write_text("here slots=1\nother slots=1\n")
    with pytest.raises(RendezvousError, match="is taken"):
        hosts.refuse_taken_port(
            nodes(
                taken[1],
                kind="deepspeed",
                node_rank=None,
                master_addr=None,
                hostfile=str(tmp_path / "hosts"),
            )
        )


def test_a_port_that_rank_0_does_not_take_here_is_no_matter(taken):
    hosts.refuse_taken_port(nodes(free_port()))
    hosts.refuse_taken_port(nodes(taken[1], node_rank=1))
    # another machine's
    hosts.refuse_taken_port(nodes(taken[1], master_addr="192.0.2.1"))
    # one machine: a private file
    hosts.refuse_taken_port(LaunchConfig("deepspeed", 2, master_port=taken[1]))
    hosts.refuse_taken_port(LaunchConfig("inline"))


def test_a_rank_that_cannot_listen_says_one_line_and_the_job_may_try_again(taken):
    with pytest.raises(RendezvousError) as found:
        listen(*taken)
    assert failure_of(found.value) == "rendezvous" and "\n" not in str(found.value)
    assert FAILURES["rendezvous"].code == BAD_CONFIG and FAILURES["rendezvous"].restart
    with pytest.raises(
        RendezvousError, match=r"none of this machine's: give one that is as launch\.master_addr"
    ):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize("port", [None, 29500])
def test_only_a_port_that_was_chosen_here_is_tried_again(tmp_path, port):
    class Config:
        launch, watchdog = LaunchConfig("deepspeed", master_port=port), WatchdogConfig()
        checkpoint = CheckpointConfig()

    job = Supervisor(Config(), tmp_path, [], lambda size: [], {})
    failure = job._failure(Verdict("rendezvous", (0,), ("here",), 0, "start", "it is taken"))
    assert (failure.code, failure.restart) == (BAD_CONFIG, port is None)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_a_process_group_on_a_taken_port_is_one_line(taken, monkeypatch, address):
    """In torch's own store as well, which is used where the address is a name."""
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(taken[1]),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(STORE, raising=False)
    # torch's store binds every interface, which loopback alone does not stand in the way of
    with socket.socket() as everywhere:
        if address == "localhost":
            everywhere.bind(("", 0))
            everywhere.listen()
            monkeypatch.setenv("MASTER_PORT", str(everywhere.getsockname()[1]))
        with pytest.raises(RendezvousError, match="is taken"), process_group(20):
            pass
