"""A saved config holds every setting; what an old one lacks is what it was when it was saved."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from launch.config.overrides import plain
from launch.config.parse import parse
from launch.saved.configs import load_run_config
from launch.saved.defaults import complete, defaults_of, records
from launch.saved.former_defaults import HELD
from tests.composing import composed


def known() -> dict[str, dict]:
    return {cls.__name__: defaults_of(cls) for cls in records()}


def test_every_default_is_held_for_configs_that_were_saved_without_it():
    """A new setting: add it to launch/saved/former_defaults.py. A default that changes: leave the
    old value there.
    """
    missing = {
        name: lacking
        for name, defaults in known().items()
        if (lacking := {k: v for k, v in defaults.items() if k not in HELD.get(name, {})})
    }
    assert not missing


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("router=threshold", "attention=scc", "balance=none"),
        ("experiment=olmoe_1b_7b", "router=top_p", "launch=deepspeed"),
    ],
)
def test_a_completed_config_names_every_setting_and_means_the_same(overrides):
    config = composed(*overrides)
    before = parse(plain(config), 1 if not overrides or "launch" not in overrides[-1] else 2)
    text = OmegaConf.to_yaml(config)
    complete(config)
    assert parse(plain(config), 1 if "launch" not in (overrides or ("",))[-1] else 2) == before
    assert config.model.rope_theta == before.model.rope_theta and "rope_theta" in OmegaConf.to_yaml(
        config.model
    )
    for line in text.splitlines():
        # interpolations stay
        assert "${" not in line or line in OmegaConf.to_yaml(config)
    groups = {
        "ModelConfig": config.model,
        "OptimConfig": config.optim,
        "WandbConfig": config.tracker.wandb,
        "SlurmConfig": config.launch.slurm,
        "SourceConfig": config.data.sources[0],
        type(before.router).__name__: config.router,
        type(before.attention).__name__: config.attention,
    }
    for name, group in groups.items():
        assert set(known()[name]) <= set(group.keys()), name


def test_a_default_that_changes_reinterprets_no_saved_config(tmp_path, monkeypatch):
    """An old run goes on under the default that held; a new one is made under today's."""
    config = composed("router=threshold")
    assert "rope_theta" not in config.model
    OmegaConf.save(config, tmp_path / "config.yaml")
    monkeypatch.setitem(HELD, "ModelConfig", HELD["ModelConfig"] | {"rope_theta": 500.0})
    monkeypatch.setitem(
        HELD,
        "ThresholdConfig",
        HELD["ThresholdConfig"] | {"capacity_factor": 3.0},
    )
    old = load_run_config(tmp_path / "config.yaml")
    assert old.model.rope_theta == 500.0
    assert complete(config).model.rope_theta == 10000.0
    del old.router["capacity_factor"]
    assert complete(old, held=True).router.capacity_factor == 3.0


def test_a_setting_that_is_given_stays_whatever_its_value():
    config = composed(
        "+model.head_dim=null", "+model.rope_theta=${optim.lr}", "train.num_steps=???"
    )
    complete(config)
    assert config.model.head_dim is None and config.model.rope_theta == config.optim.lr
    assert OmegaConf.is_missing(config.train, "num_steps")


@pytest.mark.parametrize(
    "damage",
    [
        {"model": 3},
        {"router": None},
        {"router": {"name": "os.system"}},
        {"router": {"_target_": "os.system"}},
        {"data": []},
        {"data": {"sources": "x"}},
        {"router": {"name": ["a"]}},
        {"alarms": {"a": 1}},
        {"model": "${nowhere}"},
        {"launch": {"slurm": "???"}},
        {},
    ],
)
def test_what_is_no_config_is_left_for_the_checks_to_refuse(damage):
    complete(OmegaConf.create(damage))
