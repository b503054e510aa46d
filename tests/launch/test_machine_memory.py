"""What the machine's memory does not hold by the plan is refused before anything is started or
written.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from launch import train as command
from launch.config.overrides import plain
from launch.config.parse import parse
from launch.job import memory
from launch.job.memory import (
    Machine,
    memory_problem,
    planned_memory,
    ranks_of_this_node,
    this_machine,
)
from tests.composing import composed

OLMOE = (
    "experiment=olmoe_1b_7b",
    "train.seq_len=512",
    "train.micro_batch_size=1",
    "train.global_batch_size=8",
    "model.recompute=block",
)


def run_of(*overrides: str, ranks: int = 1):
    return parse(plain(composed(*overrides)), ranks)


@pytest.mark.parametrize(("share", "fits"), [(0.25, False), (0.99, False), (1.01, True)])
def test_one_rank_on_the_cpu_is_held_against_the_host(share, fits):
    run = run_of(*OLMOE)
    total = planned_memory(run, 1).total
    problem = memory_problem(run, 1, 1, Machine((), int(total * share)))
    assert (problem is None) == fits
    assert fits or (
        f"needs {total / 2**30:.1f} GiB" in problem and "launch.check_memory=false" in problem
    )


def test_ranks_of_a_node_share_the_host_on_the_cpu_and_have_a_device_each_on_cuda():
    ranks = ("launch=deepspeed", "launch.num_devices=8", "parallel=ep8")
    run = run_of(*OLMOE, *ranks, ranks=8)
    one = planned_memory(run, 8).total
    assert memory_problem(run, 8, 8, Machine((), 8 * one)) is None
    assert "8 ranks need" in memory_problem(run, 8, 8, Machine((), 7 * one))
    assert memory_problem(run, 8, 4, Machine((), 7 * one)) is None  # two nodes of four
    assert memory_problem(run, 8, 8, Machine((one,) * 8, 1)) is None
    assert "a device" in memory_problem(run, 8, 8, Machine((one,) * 7 + (one - 1,), 2**50))
    # a scheduler shows each rank only its own
    assert memory_problem(run, 8, 8, Machine((one,), 1)) is None


def test_what_is_offloaded_counts_on_the_host():
    run = run_of(
        *OLMOE, "deepspeed=zero2", "+deepspeed.zero_optimization.offload_optimizer={device: cpu}"
    )
    plan = planned_memory(run, 1)
    there = plan.total - plan.optimizer
    assert memory_problem(run, 1, 1, Machine((there,), plan.optimizer)) is None
    assert "the host" in memory_problem(run, 1, 1, Machine((there,), plan.optimizer - 1))
    assert "a device" in memory_problem(run, 1, 1, Machine((there - 1,), plan.optimizer))
    # on the CPU it is the same memory
    assert memory_problem(run, 1, 1, Machine((), plan.total)) is None


@pytest.mark.parametrize(
    ("visible", "devices"),
    [(None, (80, 40)), ("", ()), ("-1", ()), ("1", (40,)), ("1,0", (40, 80)), ("GPU-5ad6", (40,))],
)
def test_the_devices_that_count_are_those_a_process_sees(monkeypatch, visible, devices):
    monkeypatch.setattr(memory, "version", lambda name: "2.0+cu126")
    monkeypatch.setattr(memory, "ask", lambda *a: SimpleNamespace(code=0, output="80\n40\n"))
    found = this_machine({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert found.devices == tuple(d * 2**20 for d in devices) and found.host > 2**28


def test_without_a_device_or_a_torch_for_it_the_host_counts(monkeypatch):
    monkeypatch.setattr(memory, "version", lambda name: "2.0+cpu")
    monkeypatch.setattr(memory, "ask", lambda *a: pytest.fail("nothing to ask"))
    assert this_machine({}).devices == ()
    monkeypatch.setattr(memory, "version", lambda name: "2.0")
    monkeypatch.setattr(memory, "ask", lambda *a: SimpleNamespace(code=None, output=""))
    assert this_machine({}).devices == ()


@pytest.mark.parametrize(
    ("lines", "files", "limits"),
    [
        ("0::/a/b\n", {"a/memory.max": "1000\n", "a/b/memory.max": "max\n"}, [1000]),
        ("0::/a/b\n", {"memory.max": "500\n", "a/memory.max": "1000\n"}, [500, 1000]),
        (
            "3:cpu:/x\n2:memory:/c\n",
            {
                "memory/c/memory.limit_in_bytes": "700\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            [700],
        ),
        ("0::/\n", {}, []),
    ],
)
def test_limits_of_control_groups_count(tmp_path, lines, files, limits):
    own = tmp_path / "own"
    own.write_text(lines)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    assert sorted(memory._limits(tmp_path / "root", own)) == limits


@pytest.mark.parametrize(
    ("environ", "ranks"), [({}, 3), ({"LOCAL_WORLD_SIZE": "8"}, 8), ({"LOCAL_SIZE": "2"}, 2)]
)
def test_the_launcher_says_how_many_ranks_share_the_node(environ, ranks):
    assert ranks_of_this_node(environ, 3) == ranks


@pytest.mark.parametrize("switch", [(), ("launch.check_memory=false",), ("launch.dry_run=true",)])
def test_a_machine_with_a_quarter_of_the_memory_starts_nothing(
    tmp_path, monkeypatch, capsys, switch
):
    asked = [*OLMOE, f"run_dir={tmp_path / 'run'}", *switch]
    config = composed(*asked)
    quarter = planned_memory(run_of(*OLMOE), 1).total // 4
    monkeypatch.setattr(memory, "this_machine", lambda: Machine((), quarter))
    started = []
    monkeypatch.setattr(
        command,
        "supervise",
        lambda config, run: started.append(OmegaConf.select(config, "run_dir")),
    )
    if switch:
        command.train(config)
        assert bool(started) == (switch[0] == "launch.check_memory=false")
        return
    with pytest.raises(ValueError, match="this machine, which has"):
        command.train(config)
    assert not started and not (tmp_path / "run").exists()


def test_machines_that_are_not_this_one_are_left_to_their_ranks(monkeypatch):
    monkeypatch.setattr(memory, "this_machine", lambda: Machine((), 1))
    assert not run_of("launch=slurm", "launch.num_nodes=2", ranks=2).launch.starts_here
    assert not run_of("launch=deepspeed", "launch.hostfile=hosts").launch.starts_here
    assert run_of("launch=torchrun").launch.starts_here
