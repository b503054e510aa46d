"""What attention by an index is refused with, before torch is imported."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from launch.config.build import ConfigError
from launch.config.overrides import plain
from launch.config.parse import parse
from launch.saved.index import without_index
from launch.saved.initial import Given, _of_index

CONF = str(Path(__file__).resolve().parent.parent.parent / "conf")


def composed(*overrides: str) -> dict:
    with initialize_config_dir(CONF, version_base="1.3"):
        return plain(compose("train", overrides=list(overrides)))


@pytest.fixture(scope="module")
def base() -> dict:
    return composed("attention=dsa")


def problems(config: dict) -> list[str]:
    try:
        parse(config, 1)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("attention", {"dense_steps": 0}, "an index which has learned nothing would choose"),
        ("attention", {"index_coeff": 0.0}, "nothing would teach the index"),
        ("optim", {"freeze": ["indexer"]}, "optim.freeze=indexer leaves the index"),
        ("optim", {"freeze": ["blocks.0.attention.indexer.*"]}, "leaves the index"),
        ("optim", {"qk_clip": 100.0}, "attention=indexed has no largest logit"),
    ],
)
def test_an_index_that_would_not_learn_is_refused(base, section, changes, words):
    config = copy.deepcopy(base)
    config[section] |= changes
    assert any(words in problem for problem in problems(config)), problems(config)


def test_the_other_weights_may_be_frozen_and_a_dense_model_has_no_index(base):
    config = copy.deepcopy(base)
    frozen = ["embedding", "norms", "attention", "router", "experts"]
    config["optim"]["freeze"] = frozen
    config["balance"] = composed("balance=none")["balance"]
    assert problems(config) == []
    config["attention"] = {"name": "dense"}
    config["optim"]["freeze"] = ["indexer"]
    assert any("attention is not indexed" in problem for problem in problems(config))


@pytest.mark.parametrize("preset", ["indexed", "dsa", "msa", "qsa"])
def test_every_preset_is_valid(preset):
    assert parse(composed(f"attention={preset}"), 1).attention.name == "indexed"


def test_only_weights_with_the_same_index_may_choose(base):
    own = base["attention"]
    dense, other = {"name": "dense"}, {**own, "index_heads": 8}
    assert without_index(own, own) is None and without_index(own, dense) is None
    assert without_index(own, {**own, "top_k": 9, "dense_steps": 3}) is None
    for weights in (dense, other, {**own, "dense_layers": [0]}):
        assert "do not have" in str(without_index(weights, own))

    def given(attention: dict, step: int, is_run: bool = True) -> Given:
        return Given("init.run=x", {}, {}, attention, {}, None, None, is_run, step)

    at_once = {**own, "dense_steps": 0}
    assert _of_index(given(own, 1000), at_once) is None
    assert "learned for 999 of its 1000 steps" in str(_of_index(given(own, 999), at_once))
    assert "do not have" in str(_of_index(given(dense, 1000), at_once))
    assert _of_index(given(dense, 1000), own) is None
