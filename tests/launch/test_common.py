"""Helpers of the entry points."""

from __future__ import annotations

import shlex
import sys

import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from launch.command.main import run_main
from launch.config.overrides import literal, plain, quoted, typed
from launch.process.environment import first_host
from launch.process.identity import ROOT
from launch.saved.files import load_config
from ops.all_to_all import Hop, begin_rows
from tests.lone import without_place
from train.rank.errors import is_ours


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("gpu[003-007,9],other", "gpu003"),
        ("a,b", "a"),
        ("single", "single"),
        ("n[1,5]", "n1"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_first_host_of_a_slurm_list(node_list, host):
    assert first_host(node_list) == host


PATHS = [
    "/a b/c.yaml",
    "/it's/c=d.yaml",
    "/ü/{x}[y],z",
    "back\\slash",
    "/ends\\",
    "/ends\\\\",
    "/both\\'",
    "\\\\'",
    "/${oc.env:HOME}/x",
    "\\${a}",
    "\\\\${a}",
    "/${",
    "$",
    "${}'\\",
    "$$${a}",
    "line\nfeed",
    "\\\n",
    "",
    "null",
    "1",
    "true",
    " ",
    "#",
    "%(x)s",
    "~",
    "a: b",
]


def read_back(path: str) -> str:
    """What a process finds under the key whose override quotes the path."""
    (override,) = OverridesParser.create().parse_overrides([f"+saved_config={quoted(path)}"])
    config = OmegaConf.create({"nested": {}})
    OmegaConf.update(config, "nested.saved_config", override.value(), force_add=True)
    assert plain(config)["nested"]["saved_config"] == config.nested.saved_config
    return config.nested.saved_config


@pytest.mark.parametrize("path", PATHS)
def test_quoted_values_survive_hydras_grammar_and_interpolation(path):
    assert read_back(path) == path


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("\\'\"${}[]:=,a \n\té%#@~"), max_size=12) | st.text(max_size=12))
def test_quoted_values_survive_whatever_they_hold(path):
    assert read_back(path) == path


@pytest.mark.parametrize("path", [p for p in PATHS if p not in ("null", "1", "true")])
def test_a_printed_command_can_be_typed_as_it_is(path):
    (word,) = shlex.split(typed("run", path))
    (override,) = OverridesParser.create().parse_overrides([word])
    assert OmegaConf.create({"run": override.value()}).run == path
    assert typed("run", "runs/a-b/2026.1_x") == "run=runs/a-b/2026.1_x"


@pytest.mark.parametrize("path", PATHS)
def test_resolved_values_stay_what_they_are_in_a_saved_config(tmp_path, path):
    kept = {"run_dir": path, "launch": {"env": {"A": path}}, "sources": [{"path": path}], "seed": 1}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(literal(kept))))
    assert plain(load_config(str(tmp_path / "config.yaml"))) == kept


def test_our_checks_are_told_from_errors_inside_libraries():
    with pytest.raises(ValueError) as ours:
        begin_rows(torch.zeros(3, 1), (Hop(None, [1], [1]),))
    assert is_ours(ours.value)
    with pytest.raises(ValueError) as theirs:
        torch.distributed.init_process_group("no such backend")
    assert not is_ours(theirs.value)


@pytest.mark.parametrize(("arguments", "times"), [((), 1), (("hydra.mode=RUN",), 2)])
def test_a_command_composes_its_settings_once(monkeypatch, arguments, times):
    """Hydra by itself does so twice. It still looks for a mode where one is given."""
    without_place(monkeypatch)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    composed, told, compose_config = [], [], Hydra.compose_config

    def counted(*args, **options):
        composed.append(options["run_mode"])
        return compose_config(*args, **options)

    monkeypatch.setattr(Hydra, "compose_config", counted)
    get_mode = Hydra.get_mode
    run_main("report", told.append)
    assert len(composed) == times and len(told) == 1 and Hydra.get_mode is get_mode
