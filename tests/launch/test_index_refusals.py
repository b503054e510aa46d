"""What attention by an index is refused with, before torch is imported."""

from __future__ import annotations

import copy

import pytest

from launch.config.build import ConfigError
from launch.config.overrides import plain
from launch.config.parse import parse
from launch.saved.index import without_index
from launch.saved.initial import Given, _of_index
from launch.saved.resume import other_projections
from tests import composing


def composed(*overrides: str) -> dict:
    return plain(composing.composed(*overrides))


@pytest.fixture(scope="module")
def base() -> dict:
    return composed("attention=dsa")


def problems(config: dict, world_size: int = 1) -> list[str]:
    try:
        parse(config, world_size)
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


ENTRIES = ("model.num_kv_heads=1", "model.qk_norm=none", "attention.output_groups=1")


@pytest.fixture(scope="module")
def compressed() -> dict:
    return composed("attention=csa", *ENTRIES)


@pytest.mark.parametrize("preset", ["compressed", "csa", "hca", "v4", "v4_flash", "csa2"])
def test_every_preset_of_compressed_attention_is_valid(preset):
    assert problems(composed(f"attention={preset}", *ENTRIES)) == []


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("attention", {"dense_steps": 0}, "an index which has learned nothing would choose"),
        ("optim", {"freeze": ["indexer"]}, "leaves the index of attention=compressed"),
        ("optim", {"qk_clip": 100.0}, "attention=compressed has no largest logit"),
        ("lora", {"rank": 4}, "which matrices of attention=compressed have adapters"),
        ("parallel", {"tensor_parallel_size": 2}, "one head of keys for all"),
        ("parallel", {"context_parallel_size": 2}, "one head of keys for all"),
        ("model", {"num_kv_heads": 2}, "set model.num_kv_heads=1"),
    ],
)
def test_what_compressed_attention_does_not_do_is_refused(compressed, section, changes, words):
    config = copy.deepcopy(compressed)
    config[section] |= changes
    assert any(words in problem for problem in problems(config)), problems(config)


def test_without_csa_there_is_no_index_to_teach(compressed):
    config = copy.deepcopy(compressed)
    config["attention"] |= {"layer_kinds": "hca", "dense_steps": 0}
    assert problems(config) == []
    config["optim"]["freeze"] = ["indexer"]
    assert any("attention is not indexed" in problem for problem in problems(config))


def test_entries_fit_no_other_attention_and_no_other_shape(compressed, base):
    own = compressed["attention"]
    for old, new in ((own, base["attention"]), ({"name": "dense"}, own)):
        assert "compressed attention are others" in str(other_projections(old, new))
    assert other_projections(own, {**own, "top_k": 9}) is None
    others = {"csa_ratio": 8, "layer_kinds": "hca", "o_lora_rank": 4}
    for key, value in (others | {"entry_layers": 2, "index_keys": "projected"}).items():
        assert f"attention.{key}" in str(other_projections(own, {**own, key: value}))
    assert without_index(own, own) is None
    assert "do not have" in str(without_index(base["attention"], own))
    assert "do not have" in str(without_index(own, {**own, "index_heads": 2}))


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


INSIDE = ("attention=scc", "attention.select=index")


def test_an_index_inside_sparse_attention_needs_no_dense_steps_and_has_to_learn():
    base = composed(*INSIDE)
    assert problems(base) == []
    for section, changes, words in (
        ("optim", {"freeze": ["indexer"]}, "leaves the index of attention.select=index"),
        ("attention", {"index_coeff": 0.0}, "nothing would teach the index"),
        ("lora", {"rank": 4}, "leave the index of attention.select=index as it is"),
    ):
        config = copy.deepcopy(base)
        config[section] |= changes
        assert any(words in problem for problem in problems(config)), problems(config)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ([4, 4], None),
        ([2, 6], None),
        ([3, 5], "lets layer 3 follow the choice of layer 2, but pipeline stages are cut"),
    ],
)
def test_layers_that_follow_an_index_are_on_its_stage(split, words):
    followed = ("attention.index_layers=2", "model.num_layers=8", "parallel=single")
    config = composed(*INSIDE, *followed)
    config["parallel"] |= {"pipeline_parallel_size": 2, "pipeline_split": split}
    found = problems(config, 2)
    assert found == [] if words is None else any(words in text for text in found), found


def test_layers_that_read_entries_are_where_these_are_made():
    """In the stage and the run of layers of their source, wherever the cuts are."""
    asked = ("attention.layer_kinds=csa", "model.num_layers=8", "parallel=single", *ENTRIES)
    for more, size, laps, words in (
        ("attention.entry_layers=4", 2, 1, None),
        ("attention.entry_layers=4", 2, 2, "entry_layers 4 lets layer 2 read the entries"),
        ("attention.entry_layers=8", 2, 1, "layer 4 begin anew (attention.entry_layers)"),
        ("attention.entry_layers=[0,4]", 2, 1, None),
        ("attention.entry_layers=[0,3]", 2, 1, "lets layer 4 read the entries of layer 3"),
    ):
        config = composed("attention=csa", more, *asked)
        config["parallel"] |= {
            "pipeline_parallel_size": size,
            "virtual_stages": laps,
            "pipeline_split": [8 // (size * laps)] * (size * laps),
        }
        try:
            parse(config, 2)
            found = []
        except ConfigError as refused:
            found = refused.problems
        about = [text for text in found if "pipeline stages are cut" in text]
        assert len(about) == (words is not None), found
        assert words is None or words in about[0]


def test_only_weights_with_the_same_index_inside_may_choose():
    own = composed(*INSIDE)["attention"]
    mass = {**own, "select": "mass"}
    assert without_index(own, own) is None and without_index(own, mass) is None
    assert without_index(own, {**own, "top_k": 9, "index_steps": 3}) is None
    for weights in ({"name": "dense"}, mass, {**own, "index_layers": 2}):
        assert "use attention.select=mass" in str(without_index(weights, own))

        # A run that begins with them learns first.
        given = Given("init.run=x", {}, {}, weights, {}, None, None, True, 9)
        assert "attention.index_steps is 0 with init.run=x" in str(_of_index(given, own))
        assert _of_index(given, {**own, "index_steps": 5}) is None
    assert _of_index(Given("init.run=x", {}, {}, own, {}, None, None, True, 9), own) is None
