"""Helpers of the entry points."""

from __future__ import annotations

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.common import _is_ours, quoted
from launch.environment import first_host
from ops.all_to_all import Hop, begin_rows


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
