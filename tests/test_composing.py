"""A config of tests/composing.py is the one that Hydra composes."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from tests.composing import CONF, composed


def by_hydra(command: str, *overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, overrides=list(overrides))


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("train", ()),
        ("train", ("train.seq_len=64", "router=top_p", "router.budget=3", "balance=quantile")),
        ("train", ("experiment=deepseek_v3", "attention=scc", "+attention.new={a: [1, 2]}")),
        ("train", ("experiment=quickstart", "++model.head_dim=8")),
        ("train", ("model.hidden_size=64", "model.hidden_size=32", "train.seq_len=${seed}")),
        ("train", ("data=files", "data.sources.0.path=x", "~alarms", "+launch.env.A=b")),
        ("evaluate", ("run=a", "max_sequences=4")),
    ],
)
def test_it_is_what_hydra_composes(command, overrides):
    ours, theirs = composed(*overrides, command=command), by_hydra(command, *overrides)
    assert OmegaConf.to_yaml(ours) == OmegaConf.to_yaml(theirs)
    assert OmegaConf.is_struct(ours) == OmegaConf.is_struct(theirs)
    assert OmegaConf.to_container(ours, resolve=True) == OmegaConf.to_container(
        theirs, resolve=True
    )


def test_one_config_does_not_change_another():
    first = composed("router=top_p")
    first.train.seq_len = 7
    assert composed("router=top_p").train.seq_len == by_hydra("train").train.seq_len != 7


@pytest.mark.parametrize(
    "override", ["model.hidden=3", "nothing=3", "router=none_such", "+seed=1", "~train.none_such"]
)
def test_what_hydra_refuses_is_refused(override):
    messages = []
    for how in (lambda: composed(override), lambda: by_hydra("train", override)):
        with pytest.raises(ConfigCompositionException) as error:
            how()
        messages.append(str(error.value))
    assert messages[0] == messages[1]
