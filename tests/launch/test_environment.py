"""Which rank a process is, from what launchers and schedulers leave in its environment."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from launch import train
from launch.launchers.start import Rendezvous, command
from launch.process import identity
from launch.process.environment import adopt_rank, first_host, hosts_of
from tests.lone import without_place
from train.config.launching import LaunchConfig
from train.rank.runtime import process_group

PREFIXES = ("SLURM", "OMPI", "PMI", "MPI", "MV2", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER")
STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "41",
}
SHELL = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8"}
PTY = {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_PTY_PORT": "35123"}
MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}


@pytest.fixture
def place(monkeypatch):
    """place(variables) -> (RANK, LOCAL_RANK, WORLD_SIZE) of a process with them, or None."""

    def found(variables: dict[str, str], terminal: bool = False) -> tuple[str, ...] | None:
        for name in [n for n in os.environ if n.startswith(PREFIXES)]:
            monkeypatch.delenv(name)
        without_place(monkeypatch)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(os, "isatty", lambda descriptor: terminal)
        adopt_rank()
        if not identity.is_worker():
            return None
        return os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]

    return found


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        (STEP, ("3", "1", "8")),
        # a step of 8 in an allocation of 64
        ({**STEP, "SLURM_NTASKS": "64"}, ("3", "1", "8")),
        ({**STEP, "PMI_RANK": "3", "PMI_SIZE": "8"}, ("3", "1", "8")),  # Slurm's PMI
        # srun in the shell of srun --pty
        ({**STEP, "SLURM_PTY_PORT": "35123"}, ("3", "1", "8")),
        (MPI, ("2", "0", "4")),
        ({**STEP, **MPI}, ("2", "0", "4")),  # mpirun starts its servants through srun
        ({**STEP, "PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}, ("5", "1", "8")),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", **STEP, **MPI}, ("1", "1", "2")),
        ({"RANK": "1", "WORLD_SIZE": "2", **MPI}, ("2", "0", "4")),
    ],
)  # RANK of a machine
def test_a_rank_is_what_the_nearest_launcher_has_started(place, variables, rank):
    assert place(variables) == rank


@pytest.mark.parametrize(
    ("variables", "terminal"),
    [
        (SHELL, False),  # a batch script
        ({**SHELL, "SLURM_STEP_ID": "4294967291"}, False),
        # salloc
        ({**SHELL, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, True),
        ({**SHELL, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "8"}, True),
        (PTY, True),  # srun --pty bash, in an allocation of eight tasks
        ({**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, True),
        (
            {
                **SHELL,
                "SLURM_STEP_ID": "1",
                "SLURM_STEP_NUM_TASKS": "1",
                "PMI_RANK": "0",
                "PMI_SIZE": "1",
            },
            True,
        ),
        # mpirun -n 1
        ({**MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, False),
        # set per machine
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0"}, False),
        ({"LOCAL_RANK": "0"}, False),
        ({}, False),
    ],
)
def test_a_shell_in_an_allocation_and_a_process_alone_are_no_ranks(place, variables, terminal):
    assert place(variables, terminal) is None and identity.rank() == 0


def test_steps_of_a_job_meet_at_ports_of_their_own(place):
    ports = set()
    for step in range(5):
        place({**STEP, "SLURM_STEP_ID": str(step)})
        ports.add(os.environ["MASTER_PORT"])
        assert os.environ["MASTER_ADDR"] == "gpu003"
    assert len(ports) == 5


def test_a_variable_that_is_no_number_is_named(place):
    with pytest.raises(ValueError, match="SLURM_STEP_NUM_TASKS is 'eight'"):
        place({**STEP, "SLURM_STEP_NUM_TASKS": "eight"})


def test_a_process_alone_trains_alone_whatever_is_set_for_its_machine(place, monkeypatch):
    left = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}
    assert place(left) is None
    with process_group(60):
        assert [os.environ[n] for n in ("RANK", "WORLD_SIZE")] == ["0", "1"]
    assert {name: os.environ.get(name) for name in left} == left and "LOCAL_RANK" not in os.environ


def test_ranks_that_do_not_know_each_other_are_refused(place):
    assert place(MPI)
    with pytest.raises(ValueError, match="set MASTER_ADDR and MASTER_PORT"), process_group(60):
        pass


def test_a_rank_does_not_start_ranks(place, monkeypatch):
    place(STEP)
    found = SimpleNamespace(runtime=SimpleNamespace(choices={"launch": "deepspeed"}))
    monkeypatch.setattr(train.HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(train.HydraConfig, "get", lambda: found)
    monkeypatch.setattr(train, "with_saved_config", lambda config: config)
    with pytest.raises(ValueError, match=r"launch=deepspeed starts the ranks, but .* rank 3 of 8"):
        train.train(SimpleNamespace(resume=None))


def test_srun_starts_as_many_agents_as_the_run_has_ranks():
    line = command(LaunchConfig("slurm", 2, 3), 3, Rendezvous(None, 1), ["RUN", "0"])
    assert "--ntasks=6" in line  # of SLURM_NTASKS tasks in the allocation


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", "n1"),
        ("a,b", "a b"),
        ("gpu[003-005,9],other", "gpu003 gpu004 gpu005 gpu9 other"),
        ("rack1-[01,05]-gpu", "rack1-01-gpu rack1-05-gpu"),
        ("n[098-101]", "n098 n099 n100 n101"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("r[1-2]n[3-4]", "r1n3 r1n4 r2n3 r2n4"),
        ("r[1-2]n[08-10]-ib,login", "r1n08-ib r1n09-ib r1n10-ib r2n08-ib r2n09-ib r2n10-ib login"),
        ("c[1,[3-4]]x", "c1x c3x c4x"),
        ("dgx[a,b[1-2]]", "dgxa dgxb1 dgxb2"),
        ("10.0.0.[1-2]", "10.0.0.1 10.0.0.2"),
        ("a-b[1-2],c", "a-b1 a-b2 c"),
        ("x[0-0]", "x0"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_a_list_of_hosts_is_read_as_slurm_reads_it(text, hosts):
    assert list(hosts_of(text)) == hosts.split() and first_host(text) == hosts.split()[0]


@pytest.mark.parametrize("text", ["n[1-3", "n1-3]", "n[5-3]", "", "a,,b", "n[]"])
def test_a_list_of_hosts_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="is no list of hosts"):
        list(hosts_of(text))
