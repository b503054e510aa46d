"""Helpers of the entry points."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.common import _is_ours, first_host, quoted
from launch.spawn import _handles_sigterm, command
from ops.all_to_all import Hop, begin_rows
from train.config import LaunchConfig


@pytest.mark.parametrize(("node_list", "host"), [("gpu[003-007,9],other", "gpu003"), ("a,b", "a"), ("single", "single"),
                                                 ("n[1,5]", "n1"), ("127.0.0.1", "127.0.0.1")])
def test_first_host_of_a_slurm_list(node_list, host):
    assert first_host(node_list) == host


@pytest.mark.parametrize("path", ["/a b/c.yaml", "/it's/c=d.yaml", "/ü/{x}[y],z", "back\\slash"])
def test_quoted_values_survive_hydras_grammar(path):
    (override,) = OverridesParser.create().parse_overrides([f"+saved_config={quoted(path)}"])
    assert override.value() == path


def test_our_checks_are_told_from_errors_inside_libraries():
    with pytest.raises(ValueError) as ours:
        begin_rows(torch.zeros(3, 1), (Hop(None, [1], [1]),))
    assert _is_ours(ours.value)
    with pytest.raises(ValueError) as theirs:
        torch.distributed.init_process_group("no such backend")
    assert not _is_ours(theirs.value)


def test_a_process_is_told_to_stop_once_it_listens():
    code = ("import signal, sys; signal.signal(signal.SIGTERM, lambda *a: sys.exit(0)); print('on', flush=True); "
            "signal.pause()")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    deaf = subprocess.Popen([sys.executable, "-c", "print('on', flush=True); import time; time.sleep(60)"],
                            stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "on\n" and deaf.stdout.readline() == "on\n"
        assert _handles_sigterm(process.pid) and not _handles_sigterm(deaf.pid)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        deaf.kill()


def test_commands_carry_the_layout():
    launch = LaunchConfig("deepspeed", 4, 2, hostfile="hosts", master_addr="a", master_port=1)
    assert {"--num_gpus=4", "--num_nodes=2", "--hostfile=hosts", "--master_addr=a", "--master_port=1",
            "x=1"} <= set(command(launch, "launch.train", ["x=1"]))
    torchrun = command(LaunchConfig("torchrun", 4), "launch.train", ["x=1"])
    assert "--nproc-per-node=4" in torchrun and torchrun[-1] == "x=1"
