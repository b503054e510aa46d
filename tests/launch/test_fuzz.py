"""Whatever a config holds: parsing gives a RunConfig or an error whose every line names a key;
nothing is executed.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.config.build import ConfigError
from launch.config.overrides import plain
from launch.config.parse import parse
from tests.composing import composed
from train.config.run import RunConfig

CONFIGS = (
    (1, ()),
    (1, ("experiment=quickstart_sparse",)),
    (1, ("router=top_p", "balance=none", "attention=nsa")),
    (
        8,
        (
            "experiment=olmoe_1b_7b",
            "launch=deepspeed",
            "launch.num_devices=8",
            "parallel=ep8",
            "router=threshold",
            "balance=none",
            "deepspeed=zero3",
            "train.global_batch_size=64",
        ),
    ),
    (
        2,
        (
            "parallel=pp2",
            "parallel.virtual_stages=2",
            "attention=csa",
            "attention.output_groups=2",
            "model.num_kv_heads=1",
            "model.qk_norm=none",
            "balance=quantile",
        ),
    ),
    (4, ("parallel=cp4_gather", "attention=scc", "attention.entries=gated", "optim=muon")),
    (
        2,
        (
            "attention=mla_lite",
            "model.num_kv_heads=4",
            "model.qk_norm=none",
            "optim.decay_style=WSD",
            "optim.wsd_decay_steps=10",
            "profile.steps=[2,3]",
        ),
    ),
    (2, ("parallel=tp2", "attention=dense", "train.batch_size_rampup=[8,8,64]")),
)
EXECUTING = (
    "os.system",
    "builtins.eval",
    "builtins.exec",
    "subprocess.Popen",
    "torch.load",
    "runpy.run_path",
)
NOT_COMPONENTS = (
    "model.transformer.Transformer",
    "model.something_that_is_not_a_class",
    "model.config.ModelConfig",
    "model.moe.layer.MoELayer",
    "model.attention.cache.KVCache",
    "model.attention.base.Attention",
    "model.routers.base.Router",
    "model.dispatch.all_to_all._Plan",
    "model.dispatch.all_to_all.Protocol",
    "model.routers.top_k.RouteSpec",
    "model.transformer.torch.nn.Linear",
    "model.config.Any",
    "model.dispatch.all_to_all.AllToAllDispatcher",
    "model.attention.dense.DenseAttention",
    "model.routers.top_k.TopKRouter",
    "model",
    "model.",
    "model..os",
    "model.x\0y.Z",
    "model." + "a." * 500 + "b",
    "model.\ud800.x",
    "models.evil.Evil",
    "",
)
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    10**40,
    -(10**40),
    10**400,
    0.0,
    -0.5,
    1e-30,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
    "",
    " ",
    "???",
    "${oc.env:HOME}",
    "zürich 東京 🙂",
    "\ud800",
    "a\nb",
    "\0",
    "\u2028",
    "x" * 100_000,
    "1",
    "nan",
    "-1",
    "true",
    [],
    [1, "a", None],
    {},
    {"_target_": "os.system", "command": "true"},
    {"deep": {"er": [1]}},
    [[[]]],
    {"0": 1},
    {1: 2},
    [{}],
    1 + 2j,
    b"bytes",
    *EXECUTING,
    *NOT_COMPONENTS,
)
SECTIONS = "|".join(sorted(f.name for f in dataclasses.fields(RunConfig)))
KEYS = (
    "unknown",
    "num_step",
    "",
    "a.b",
    "a\nb",
    "\ud800",
    "x" * 10_000,
    "name",
    "_target_",
    "_args_",
    "_partial_",
    1,
    None,
    (1, 2),
    1.5,
)


@pytest.fixture(scope="module")
def configs() -> Iterator[list[tuple[int, dict]]]:
    """(ranks, composed config as plain data); os.system is a trap meanwhile."""
    found = [(size, plain(composed(*overrides))) for size, overrides in CONFIGS]
    for size, config in found:
        assert check(config, size) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "system", lambda command: pytest.fail(f"executed {command!r}"))
        yield found


def places(node: dict | list, path: tuple = ()) -> list[tuple]:
    """Paths of all leaves and branches below a node."""
    found = []
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        found.append((*path, key))
        if isinstance(value, (dict, list)):
            found += places(value, (*path, key))
    return found


def at(node, path: tuple):
    for key in path:
        node = node[key]
    return node


@st.composite
def mutations(draw) -> tuple[int, list[tuple]]:
    """Which config, and what is done to it: (kind, where it is as a share of all places, value or
    key).
    """
    steps = st.tuples(
        st.sampled_from(("set", "set", "set", "remove", "add")),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=20),
        st.sampled_from(KEYS),
    )
    return draw(st.integers(0, len(CONFIGS) - 1)), draw(st.lists(steps, min_size=1, max_size=3))


def mutate(config: dict, steps: list[tuple]) -> dict:
    """A changed copy."""
    config = copy.deepcopy(config)
    for kind, share, value, key in steps:
        found = places(config)
        path = found[int(share * len(found))]
        parent, last = at(config, path[:-1]), path[-1]
        if kind == "remove":
            del parent[last]
        elif kind == "add" and isinstance(parent, dict):
            parent[key] = copy.deepcopy(value)
        else:
            parent[last] = copy.deepcopy(value)
    return config


def check(config: dict, world_size: int) -> list[str]:
    """Parse; the problems found. Nothing may be imported for it."""
    before = set(sys.modules)
    try:
        assert isinstance(parse(config, world_size), RunConfig)
        problems = []
    except ConfigError as error:
        assert error.problems
        problems = error.problems
    assert set(sys.modules) == before
    for line in problems:
        assert line.isprintable() and len(line) <= 600, f"not one printable line: {line!r}"
        assert re.search(rf"\b({SECTIONS})\b", line) or line.startswith("unknown key "), (
            f"names no key: {line!r}"
        )
    return problems


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(mutation=mutations())
def test_any_config_is_accepted_or_refused_with_lines_that_name_keys(configs, mutation):
    index, steps = mutation
    size, config = configs[index]
    check(mutate(config, steps), size)


KINDS_OF_VALUES = (None, True, 0, -1, 2**31, 0.5, math.nan, "", "???", [], [{}], {}, {1: 2})


def every_place(config: dict, size: int, values_of: Callable[[int], Sequence]) -> None:
    """Put the values of the number of each place there, one after another."""
    for number, path in enumerate(places(config)):
        for value in values_of(number):
            changed = copy.deepcopy(config)
            at(changed, path[:-1])[path[-1]] = value
            check(changed, size)


def test_every_place_takes_two_kinds_of_values_or_says_so(configs):
    """Each kind at a sixth of the places, and neighbours, which are of one record, get different
    ones.
    """
    size, config = configs[0]
    every_place(
        config,
        size,
        lambda number: [KINDS_OF_VALUES[(2 * number + i) % len(KINDS_OF_VALUES)] for i in (0, 1)],
    )


@pytest.mark.nightly
@pytest.mark.parametrize("index", range(len(CONFIGS)))
def test_every_place_takes_every_kind_of_value_or_says_so(configs, index):
    size, config = configs[index]
    every_place(config, size, lambda number: KINDS_OF_VALUES)


# --- what the fuzz found --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (
            "model.num_layers",
            2**31,
            "model.num_layers is a number of 32 bits; it must be at most 10000",
        ),
        (
            "model.num_mtp_layers",
            2**31,
            "model.num_mtp_layers is a number of 32 bits; it must be at most 10000",
        ),
        ("optim.lr", 10**30, "optim.lr is a number of 100 bits"),
        ("train.num_steps", True, "train.num_steps is True; it must be a whole number"),
        ("deepspeed.zero_optimization", {1: 2}, "unknown key deepspeed.zero_optimization.1"),
        ("deepspeed", {1: 2}, "deepspeed has the key 1; it must be text"),
        ("router.1", 2, "unknown key router.1"),
        ("seed\nevil", 1, "unknown key seed\\nevil: did you mean seed?"),
        ("launch.env", {"A": {"B": "c"}}, "launch.env.A is {'B': 'c'}; it must be text"),
        ("launch.env", {"HF_TOKEN": "hf_" + "aB3" * 12}, "launch.env.HF_TOKEN is a secret"),
        (
            "train.num_steps",
            "hf_" + "aB3" * 12,
            "train.num_steps is '<redacted>'; it must be a whole number",
        ),
        (
            "router.name",
            "model.transformer.Transformer",
            "router.name is 'model.transformer.Transformer'; choose one of top_k, top_p",
        ),
        ("router.name", "dense", "router.name is 'dense'; choose one of top_k, top_p"),
        (
            "attention.name",
            "top_k",
            "attention.name is 'top_k'; choose one of dense, windowed, sparse, indexed, "
            "compressed, mla",
        ),
        ("dispatcher.name", "", "dispatcher.name is ''; choose one of local, all_to_all"),
        ("router", {"_target_": "model.attention.dense.DenseAttention"}, "router.name is 'dense'"),
        (
            "attention",
            {"_target_": "model.attention.base.Attention"},
            "attention._target_ is 'model.attention.base.Attention', which no version of this",
        ),
    ],
)
def test_bad_values_are_named(configs, path, value, words):
    size, config = configs[0]
    config = copy.deepcopy(config)
    *parents, last = path.split(".")
    at(config, tuple(parents))[int(last) if last.isdigit() else last] = value
    assert any(words in line for line in check(config, size)), check(config, size)


def test_a_missing_knob_is_named(configs):
    size, config = configs[0]
    assert check(config | {"router": {"name": config["router"]["name"]}}, size) == [
        "router.top_k is missing"
    ]


def test_numbers_become_the_text_of_variables(configs):
    size, config = configs[0]
    env = {"OMP_NUM_THREADS": 4, "RATIO": 0.5, "NAME": "x"}
    assert parse(config | {"launch": config["launch"] | {"env": env}}, size).launch.env == {
        "OMP_NUM_THREADS": "4",
        "RATIO": "0.5",
        "NAME": "x",
    }
